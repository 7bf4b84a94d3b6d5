"""Runs of folk_jax.main as child processes, as small as runs get, and what their workdirs hold.

The fault scripts and tests/faults start runs with these flags and compare workdirs with these functions.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Also for this process, where it reads checkpoints.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A recipe that compiles in seconds, with every kind of random draw: crops, colours, blur, filters, drop path.
TINY = (
  '--config=configs/vit_b.py:smoke,data=synthetic',
  '--config.image_size=16',
  '--config.data.test_resize=18',
  '--config.data.limit=40',
  '--config.model.width=24',
  '--config.model.depth=1',
  '--config.model.heads=2',
  '--config.model.drop_path=0.3',
  '--config.projection.hidden=32',
  '--config.projection.bottleneck=16',
  '--config.projection.outputs=24',
  '--config.views.view_1.blur_sigma=(0.1,0.5)',
  '--config.views.view_2.blur_sigma=(0.1,0.5)',
  '--config.evaluation.at_start=False',
  '--config.evaluation.knn=(1,5)',
  '--config.evaluation.knn_headline=5',
  '--config.logging.progress=False',
  '--config.logging.tensorboard=False',
)

# The steps of the tests' runs, few of which are taken: programs hold the schedules, and are compiled once for all.
TOTAL = 200
TINY_TOTAL = (*TINY, f'--config.total_steps={TOTAL}')

# What clocks say, and so differs from run to run.
_OF_CLOCKS = re.compile('second|data_wait|goodput')


def shared_cache(base: pathlib.Path) -> pathlib.Path:
  """A folder of compiled programs for all test processes of a session, from pytest's base folder of this one."""
  base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  (base / 'faults_cache').mkdir(exist_ok=True)
  return base / 'faults_cache'


def start(
  workdir: pathlib.Path,
  *flags: str,
  cache: pathlib.Path | str = '',
  devices: int = 1,
  program: Sequence[str] = ('-m', 'folk_jax.main'),
  environment: Mapping[str, str] | None = None,
  stdout: Any = subprocess.PIPE,
  stderr: Any = subprocess.PIPE,
) -> subprocess.Popen:
  """Starts folk_jax.main in a process group of its own.

  Args:
    workdir: the run's.
    *flags: of folk_jax.main; `TINY` to begin with.
    cache: folder of compiled programs, of which even the quickest are kept; '' for none.
    devices: how many CPU devices jax is to see.
    program: what Python is to run.
    environment: variables on top of this process's.
    stdout: as `subprocess.Popen` takes it, and so is `stderr`.
  """
  command = [sys.executable, *program, *flags, f'--workdir={workdir}']
  command.append(f'--config.compilation_cache={cache}')
  flag = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip(),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
      **(environment or {}),
    },
    stdin=subprocess.DEVNULL,
    stdout=stdout,
    stderr=stderr,
    text=True,
    start_new_session=True,
  )


def end(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str, str]:
  """Waits; returns (status, stdout, stderr). Nothing of its process group is left behind."""
  try:
    out, err = process.communicate(timeout=seconds)
  finally:
    kill(process)
  return process.returncode, out or '', err or ''


def kill(process: subprocess.Popen) -> None:
  """SIGKILL to the process and to all that it has started."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()
  for stream in (process.stdout, process.stderr):
    if stream is not None:
      stream.close()


def within(seconds: float, condition: Callable[[], Any], pause: float = 0.01) -> bool:
  """Whether `condition` comes true in so many seconds."""
  until = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > until:
      return False
    time.sleep(pause)
  return True


def steps_on_disk(workdir: pathlib.Path) -> list[int]:
  """The whole checkpoints, ascending: Orbax renames a step's folder to its number when all is written."""
  folder = workdir / 'checkpoints'
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
  """Every array of a checkpoint (the newest) by its path: parameters, optimiser, teacher, extra, step."""
  import jax

  from folk_jax import checkpoint

  tree, _, _ = checkpoint.read_subtree(str(workdir / 'checkpoints'), (), step)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differences(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> str:
  """'' where all arrays are equal bit for bit, else a sentence that names the first that is not."""
  if found.keys() != expected.keys():
    return f'other arrays: {sorted(found.keys() ^ expected.keys())[:3]}'
  unequal = [
    name
    for name, array in expected.items()
    if (array.dtype, array.shape) != (found[name].dtype, found[name].shape)
    or array.tobytes() != found[name].tobytes()
  ]
  return f'{len(unequal)} of {len(expected)} arrays differ, first {unequal[0]}' if unequal else ''


def metrics(workdir: pathlib.Path) -> tuple[dict[int, dict[str, float]], str]:
  """What metrics.jsonl says by step, clocks apart; and '' or a sentence where a step has one number twice."""
  from folk_jax.train import metrics as metrics_lib

  by_step: dict[int, dict[str, float]] = {}
  twice = ''
  for line in metrics_lib.read_metrics(str(workdir)):
    values = {key: value for key, value in line.items() if not _OF_CLOCKS.search(key)}
    step = int(values.pop('step'))
    known = by_step.setdefault(step, {})
    if known.keys() & values.keys():
      twice = twice or f'step {step} stands in metrics.jsonl twice'
    known |= values
  return by_step, twice


def lost(workdir: pathlib.Path, reference: pathlib.Path, steps: Sequence[int]) -> str:
  """'' where a workdir ended as the reference did, bit for bit; else a sentence.

  Args:
    workdir: of a run that has ended.
    reference: of the same run that nothing disturbed.
    steps: those that must be in metrics.jsonl, each once.
  """
  if steps_on_disk(workdir)[-1:] != steps_on_disk(reference)[-1:]:
    return f'the newest checkpoints are {steps_on_disk(workdir)} and {steps_on_disk(reference)}'
  if unequal := differences(state(workdir), state(reference)):
    return f'the final state is another one: {unequal}'
  found, twice = metrics(workdir)
  if twice or sorted(found) != list(steps):
    return twice or f'metrics.jsonl has the steps {sorted(found)}'
  expected, _ = metrics(reference)
  # As text: NaN, which nothing equals, is the same number here.
  unequal = [step for step in steps if repr(found[step]) != repr(expected[step])]
  return f'the numbers logged at step {unequal[0]} are others' if unequal else ''
