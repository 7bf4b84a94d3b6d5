"""The images of steps that went wrong, kept for replay: `<workdir>/faults/step_<n>.json`, one a process.

A file holds the step, the seed, the numbers of the images in the data set, row by row, and what was not finite. A batch
is a function of (seed, step), so the file says what `folk_jax.replay` can check and what a person can look up.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from folk_jax import checkpoint
from folk_jax.checkpoint.files import is_remote

FOLDER = 'faults'
# A start of a run keeps no more: a run past its limits would fill the disk.
LIMIT = 100


class Faults:
  """Writes the files of one run."""

  def __init__(self, workdir: str, seed: int, process_index: int = 0, process_count: int = 1):
    self._workdir, self._seed = epath.Path(workdir).expanduser(), seed
    self._process, self._processes = process_index, process_count
    self._written = 0

  def record(self, step: int, index_B: np.ndarray, found: Mapping[str, float]) -> str:
    """Writes a step's file; says where it is and what to do with it, or '' where there is none.

    Args:
      step: its number.
      index_B: the samples of this process's rows.
      found: numbers of the step, by name.
    """
    if self._written == LIMIT:
      return ''
    self._written += 1
    file = path_of(self._workdir, step, self._process, self._processes)
    about = {
      'step': step,
      'seed': self._seed,
      'config': 'config.json',
      'process': self._process,
      'processes': self._processes,
      'metrics': {name: jsonable(value) for name, value in found.items()},
      'indices': [int(index) for index in index_B],
    }
    try:
      checkpoint.replace_text(file, json.dumps(about, allow_nan=False) + '\n')
    except failures(file) as error:  # A run goes on without the file.
      logging.warning('cannot keep the images of step %d: %s', step, error)
      return ''
    return (
      f'Its images are in {file}; to look into it: python -m folk_jax.replay --workdir={self._workdir} '
      f'--step={step}. '
    )


def path_of(workdir: epath.Path, step: int, process: int = 0, processes: int = 1) -> epath.Path:
  """The file of a step; of a run of several processes each writes its own."""
  suffix = f'_process_{process}' if processes > 1 else ''
  return workdir / FOLDER / f'step_{step}{suffix}.json'


def read(workdir: str, step: int) -> list[dict[str, Any]]:
  """The files of a step, in the order of the processes; none where nothing was kept."""
  folder = epath.Path(workdir).expanduser() / FOLDER
  first = path_of(folder.parent, step)
  if first.exists():
    return [json.loads(first.read_text())]
  files = folder.glob(f'step_{step}_process_*.json') if folder.exists() else ()
  return sorted((json.loads(file.read_text()) for file in files), key=lambda one: one['process'])


def jsonable(value: float) -> float | str:
  """A number as JSON has it: what is not finite as text that `float` reads."""
  return value if math.isfinite(value) else str(value)


def failures(path: Any) -> tuple[type[Exception], ...]:
  """What reading or writing a path may raise: in a bucket anything, as gcsfs's and aiohttp's errors are no OSErrors."""
  return (Exception,) if is_remote(path) else (OSError,)
