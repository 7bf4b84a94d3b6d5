"""Several processes as one run: who they are, how they meet, who speaks, and how they end together.

Nothing here touches jax, and nothing happens, where one process runs alone. `folk_jax.main` joins the processes
before anything asks for devices; the other rooms ask `jax.process_index()` and `jax.process_count()`.
`cluster.py` knows the launchers, `rendezvous.py` how processes meet, `signals.py` what tells them to end, `leaving.py`
how one that fails ends.

Shape letters: P processes, T things told.
"""

import contextlib
import logging
import os
import zlib
from collections.abc import Iterator, Sequence

from folk_jax.distributed import leaving, rendezvous, signals
from folk_jax.distributed.cluster import Cluster, detect, from_flags, with_devices
from folk_jax.distributed.rendezvous import NotMet
from folk_jax.distributed.signals import Preempted, preempted, told
from folk_jax.errors import UserError

__all__ = [
  'Cluster',
  'NotMet',
  'Preempted',
  'check_alike',
  'check_shared',
  'detect',
  'from_flags',
  'joined',
  'preempted',
  'told',
  'with_devices',
]

# A new file may take a moment to be seen by the other clients of a network file system.
_SHARED_SECONDS = 10.0


@contextlib.contextmanager
def joined(
  cluster: Cluster | None, seconds: float = 300, heed_signals: bool = True
) -> Iterator[bool]:
  """Inside, this process is one of its cluster's; with None, or a cluster of one, nothing but signals change.

  Process 0 speaks; the others write to stderr what ends them and what they find in their data. A failure in one of
  several processes ends it without waiting for the others, which jax then ends too.

  Args:
    cluster: from `from_flags` or `detect`.
    seconds: how long to wait for the processes to meet.
    heed_signals: whether SIGTERM and SIGINT ask (`preempted`) instead of killing: for work that looks, and saves. Else
      `preempted` is always False.

  Yields:
    Whether there are several.

  Raises:
    NotMet: they do not meet in time; another try may succeed.
    UserError: they disagree on who they are, or jax cannot tell it.
  """
  if cluster is None or cluster.processes == 1:
    with signals.heeding() if heed_signals else contextlib.nullcontext():
      yield False
    return
  index = _join(cluster, seconds, heed_signals)
  if index:
    leaving.hush()
  tell = signals.jaxs_notice() if heed_signals else None
  # Without jax's notice there is nobody to tell: what jax does with signals stays as it is.
  heeds = signals.heeding(tell, speaks=not index) if tell else contextlib.nullcontext()
  with heeds, leaving.together(index):
    yield True


def _join(cluster: Cluster, seconds: float, heed_signals: bool) -> int:
  if cluster.coordinator is not None:
    # jax waits too, but ends a process that has waited too long with an abort and a stack trace.
    rendezvous.meet(cluster.coordinator, cluster.processes, cluster.process, seconds)
  import jax

  logging.getLogger('jax._src.distributed').setLevel(logging.WARNING)
  # On a CPU, programs that do not wait for one another run at once: two of them that sum over all processes would be
  # run in one order here and in another there, and wait for ever.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if not heed_signals:
    jax.config.update('jax_enable_preemption_service', False)  # It takes SIGTERM for itself.
  arguments = {'initialization_timeout': max(1, round(seconds))}
  if cluster.coordinator is not None:
    arguments |= {
      'coordinator_address': cluster.coordinator,
      'num_processes': cluster.processes,
      'process_id': cluster.process,
      'local_device_ids': cluster.local_devices and list(cluster.local_devices),
      # jax would give a Slurm task the GPU of its number even where it is alone on its host.
      'cluster_detection_method': 'deactivate',
    }
  try:
    jax.distributed.initialize(**arguments)
  except (ValueError, RuntimeError) as error:
    said = ' '.join(str(error).split())
    said = f'{cluster.found_by} says that this is one of several processes, but jax cannot join them: {said}'
    if isinstance(error, RuntimeError):  # Somebody did not answer in time: a slice may come later.
      raise NotMet(said) from error
    raise UserError(f"{said}; on a TPU it needs the package's extra tpu") from error
  return jax.process_index()


def check_alike(**told: str) -> None:
  """Raises `UserError`, on every process, where one was told something else than process 0, or has fewer devices.

  Args:
    **told: text by name: the configuration, the workdir.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  mine = [zlib.crc32(text.encode()) for text in told.values()] + [jax.local_device_count()]
  all_PT = multihost_utils.process_allgather(np.array(mine, np.uint32))
  for column, what in enumerate([*told, 'number of devices']):
    others = [i for i, value in enumerate(all_PT[:, column]) if value != all_PT[0, column]]
    if others:
      raise UserError(
        f"{what} of {_processes(others)} differs from process 0's: start all of them alike"
      )


def check_shared(workdir: str) -> None:
  """Raises `UserError`, on every process, where one does not see the files that process 0 writes to `workdir`."""
  if '://' in workdir:
    return  # A bucket is.
  import jax
  import numpy as np
  from etils import epath
  from jax.experimental import multihost_utils

  folder = epath.Path(workdir).expanduser()
  token = np.frombuffer(os.urandom(4), np.uint32)[0]
  token = int(multihost_utils.broadcast_one_to_all(token))
  file, written, made = folder / f'.seen_by_all_{token:08x}', True, False
  try:
    if not jax.process_index():
      made = not folder.exists()
      folder.mkdir(parents=True, exist_ok=True)
      file.write_text('')
  except OSError:
    written = False  # What follows says it to all.
  multihost_utils.sync_global_devices('the file is written')
  seen = written and leaving.within(_SHARED_SECONDS, file.exists)
  seen_P = multihost_utils.process_allgather(np.array(seen))
  if not jax.process_index():
    if written:
      file.unlink(missing_ok=True)
    if written and made and not seen_P.all():
      folder.rmdir()  # As it was.
  if not seen_P[0]:
    raise UserError(f'cannot use workdir {workdir}: process 0 cannot write there.')
  if not seen_P.all():
    blind = [i for i, one in enumerate(seen_P) if not one]
    raise UserError(
      f'workdir {workdir} is not shared: {_processes(blind)} cannot see what process 0 writes there; '
      'give a --workdir on shared storage or in a bucket (gs://...)'
    )


def _processes(numbers: Sequence[int]) -> str:
  shown = ', '.join(map(str, numbers[:8])) + (', ...' if len(numbers) > 8 else '')
  return f'process {shown}' if len(numbers) == 1 else f'processes {shown}'
