"""A trace of some steps: where the time of a step goes, on host and device."""

import jax
from absl import logging
from etils import epath

# Steps before the trace: the first compiles, and the loader fills its queues.
_WARM_UP = 10


class Profile:
  """Traces `steps` steps of a run into `<workdir>/profile`, for TensorBoard, xprof or Perfetto.

  Every process traces its own devices, into a folder of its own where there are several; with `steps` 0 nothing is
  traced. A trace that can't be written is a warning: no run ends for it.
  """

  def __init__(self, steps: int, workdir: str, start: int, total: int):
    """Chooses the steps: from the 11th after `start` on, or as late as a short run allows."""
    directory = epath.Path(workdir).expanduser() / 'profile'
    if jax.process_count() > 1:
      directory /= f'process_{jax.process_index()}'
    self.directory = str(directory)
    first = start + 1 + min(_WARM_UP, max(0, total - start - steps))
    self.steps = range(first, min(first + steps, total + 1)) if steps else range(0)

  def begins(self, step: int) -> bool:
    """Whether the trace begins before this step."""
    return bool(self.steps) and step == self.steps[0]

  def ends(self, step: int) -> bool:
    """Whether it ends after this one, whose results are to be waited for first."""
    return bool(self.steps) and step == self.steps[-1]

  def start(self) -> None:
    """Begins the trace."""
    # jax writes the file for Perfetto through pathlib: not into a bucket.
    jax.profiler.start_trace(self.directory, create_perfetto_trace='://' not in self.directory)

  def stop(self) -> bool:
    """Ends and writes the trace; False where that failed."""
    try:
      jax.profiler.stop_trace()
    except (OSError, ValueError, RuntimeError) as error:
      logging.warning('the trace of some steps could not be written: %s', error)
      return False
    return True
