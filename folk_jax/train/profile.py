"""A trace of some steps: where the time of a step goes, on host and device."""

from typing import Any

import jax
from etils import epath

# Steps before the trace: the first compiles, and the loader fills its queues.
_WARM_UP = 10


class Profile:
  """Traces `steps` steps of a run into `<workdir>/profile`, for TensorBoard, xprof or Perfetto.

  Every process traces its own devices; with `steps` 0 nothing is traced.
  """

  def __init__(self, steps: int, workdir: str, start: int, total: int):
    """Chooses the steps: from the 11th after `start` on, or as late as a short run allows."""
    self.directory = str(epath.Path(workdir).expanduser() / 'profile')
    first = start + 1 + min(_WARM_UP, max(0, total - start - steps))
    self.steps = range(first, min(first + steps, total + 1)) if steps else range(0)

  def before(self, step: int) -> None:
    """Called before a step is launched."""
    if self.steps and step == self.steps[0]:
      jax.profiler.start_trace(self.directory, create_perfetto_trace=True)

  def after(self, step: int, values: Any) -> bool:
    """Called with a step's results; True where they end the trace, which waits for them."""
    if not self.steps or step != self.steps[-1]:
      return False
    jax.block_until_ready(values)
    jax.profiler.stop_trace()
    return True
