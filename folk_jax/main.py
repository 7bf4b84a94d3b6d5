"""The command: flags, configuration, checks, one task.

  python -m folk_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

A workdir that holds a run is resumed. Any field is set with --config.a.b=value; recipes take arguments after a colon,
such as --config=configs/vit_b.py:data=folder,path=/images. Exit status: 0 done, 2 a mistake in what was asked (one
line on stderr), 143 saved and stopped by SIGTERM (start it again), 130 saved and stopped by Ctrl-C or another SIGINT,
1 anything else. A second signal leaves at once, and the newest checkpoint is whole. Signals end `task=evaluate` at
once: it keeps its results piece by piece.

Several processes are one run where TPU pods, GKE, Slurm or Open MPI start them, and with three flags anywhere else:
--coordinator=HOST:PORT --processes=N --process=I. docs/scaling.md has the commands.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from folk_jax import cli, distributed
from folk_jax import config as config_lib
from folk_jax.errors import UserError

if __name__ == '__mp_main__':
  # A loader's worker of this command, which begins by importing it. A terminal sends Ctrl-C, and Slurm SIGTERM, to all
  # processes; they are for the command, which needs batches up to the step that it saves, and which ends its workers.
  for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, signal.SIG_IGN)

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Recipe, such as configs/vit_b.py:smoke; every field can be overridden.',
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where the run lives: config.json, metrics.jsonl, tensorboard/, checkpoints/, export/.',
)
flags.mark_flags_as_required(['config', 'workdir'])
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, any free port; where no launcher says it.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many processes the run has.')
_PROCESS = flags.DEFINE_integer('process', None, 'The number of this one, from 0.')
_LOCAL_DEVICES = flags.DEFINE_list(
  'local_devices', None, "Numbers of this host's GPUs that are this process's, such as 0,1."
)
_MEETING_SECONDS = flags.DEFINE_integer(
  'meeting_seconds', 300, 'How long to wait for the processes to meet.', lower_bound=1
)


def _pretrain(config, workdir: str) -> None:
  # Imported here, so that --help and mistyped flags needn't wait for jax.
  from folk_jax.train import loop
  from folk_jax.train.guard import RunStopped

  try:
    loop.pretrain(config, workdir)
  except RunStopped as stopped:
    print(f'stopped: {stopped}', file=sys.stderr)
    sys.exit(1)


def _evaluate(config, workdir: str) -> None:
  from folk_jax import evaluate

  evaluate.evaluate(config, workdir)


# What may differ between the hosts of a run: where things lie on them, and how many cores they have.
_OF_A_HOST = ('data.path', 'data.workers', 'data.threads', 'data.prefetch', 'compilation_cache')


def _common(config) -> str:
  """The configuration as text, without what may differ between hosts."""
  flat = config_lib.flatten(config.to_dict())
  return repr(sorted((k, repr(v)) for k, v in flat.items() if not k.endswith(_OF_A_HOST)))


def _check_bucket(workdir: str) -> None:
  """Raises `UserError` where a workdir in a bucket lacks the package that reaches it."""
  if '://' not in workdir:
    return
  from etils import epath

  try:
    epath.Path(workdir).exists()
  except ImportError as error:
    raise UserError(
      f'--workdir={workdir}: {error}; into this environment: pip install gcsfs (s3fs for s3://)'
    ) from error


TASKS: dict[str, Callable] = {'pretrain': _pretrain, 'evaluate': _evaluate}
# Those that look for signals at every step, and save.
_HEEDING_SIGNALS = ('pretrain',)


def main(argv: Sequence[str]) -> None:
  """Runs the configuration's task."""
  del argv
  config = _CONFIG.value
  if config.task not in TASKS:
    raise config_lib.unknown('task', config.task, TASKS)
  config_lib.validate(config)
  _check_bucket(_WORKDIR.value)
  cluster = distributed.from_flags(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  cluster = distributed.with_devices(
    cluster or distributed.detect(os.environ), _LOCAL_DEVICES.value
  )
  heeds = config.task in _HEEDING_SIGNALS
  try:
    with distributed.joined(cluster, _MEETING_SECONDS.value, heed_signals=heeds) as several:
      if several:
        distributed.check_alike(configuration=_common(config), workdir=_WORKDIR.value)
        distributed.check_shared(_WORKDIR.value)
      try:
        TASKS[config.task](config, _WORKDIR.value)
      except distributed.Preempted as told:
        print(f'stopped: {told}', file=sys.stderr)
        sys.exit(told.status)
  except distributed.NotMet as late:
    print(f'error: {cli.one_line(str(late))}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main)
