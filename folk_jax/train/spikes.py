"""Losses that stand out: `<workdir>/spikes.jsonl` has a line for each, with the images of its step.

A spike is a loss that lies so many median absolute deviations above the median of the last losses. Both are robust: a
spike hardly moves them, so that the next one stands out as well; and a loss that stays where it jumped is no spike once
half the window has it. A steady rise never is one: its end lies two deviations above its middle.
"""

import collections
import json
from collections.abc import Callable, Iterable

import numpy as np
from absl import logging
from etils import epath

from folk_jax import checkpoint
from folk_jax.train.faults import failures, jsonable

FILE = 'spikes.jsonl'
# Losses before anything is judged, and the newest lines kept.
_LEAST, _LINES = 32, 200
# A deviation is at least this share of the median: a loss that hardly moves has no spikes of rounding.
_LEAST_DEVIATION = 1e-3
_QUIET_STEPS = 100


class Spikes:
  """Looks at the loss of every step."""

  def __init__(
    self,
    deviations: float,
    window: int,
    rate: Callable[[int], float],
    workdir: str,
    start_step: int = 0,
    primary: bool = True,
  ):
    """Opens the log; a resumed run drops lines of steps after the one it resumes from, which it does again.

    Args:
      deviations: that make a spike, above 0; 0 for none.
      window: so many of the last losses are the measure, at least 2.
      rate: the learning rate by the number of steps done.
      workdir: the run's folder.
      start_step: the step it resumes from.
      primary: whether this process writes.
    """
    self._deviations, self._rate, self._primary = deviations, rate, primary
    self._losses: collections.deque[float] = collections.deque(maxlen=window)
    self._file = epath.Path(workdir).expanduser() / FILE
    self._quiet_until = 0
    self._lines: collections.deque[str] = collections.deque(maxlen=_LINES)
    if primary and deviations:
      self._take_up(start_step)

  def _take_up(self, start_step: int) -> None:
    """Reads the lines that an earlier start wrote, up to a step."""
    try:
      there = self._file.read_text().splitlines() if self._file.exists() else []
    except failures(self._file) as error:  # Nor is it written then, over what may be there.
      self._primary = False
      logging.warning('cannot read %s: spikes are not kept there: %s', self._file, error)
      return
    self._lines.extend(line for line in there if _step_of(line) <= start_step)
    if list(self._lines) != there:
      self._write()

  def restore(self, losses: Iterable[float]) -> None:
    """Goes on from what `kept` gave."""
    self._losses.extend(losses)

  def kept(self) -> list[float]:
    """The last losses, for a checkpoint's meta."""
    return list(self._losses)

  def offer(self, step: int, loss: float, gradient_norm: float, index_B: np.ndarray) -> bool:
    """Judges the loss of a step by those before it; writes and says where it stands out. Whether it does."""
    found = self._judge(loss)
    self._losses.append(loss)
    if found is None:
      return False
    median, deviations = found
    record = {
      'step': step,
      'loss': loss,
      'median': median,
      'deviations': round(deviations, 1),
      'gradient_norm': jsonable(gradient_norm),
      'learning_rate': self._rate(step - 1),
      'indices': [int(index) for index in index_B],
    }
    self._lines.append(json.dumps(record, allow_nan=False))
    self._write()
    if step >= self._quiet_until:
      self._quiet_until = step + _QUIET_STEPS
      logging.warning(
        f'the loss of step {step}, {loss:.4g}, is {deviations:.0f} median absolute deviations above the median '
        f'{median:.4g} of the last {len(self._losses) - 1}; its images, and those of any spike of the next '
        f'{_QUIET_STEPS} steps, are in {self._file}'
      )
    return True

  def _judge(self, loss: float) -> tuple[float, float] | None:
    if not self._deviations or len(self._losses) < min(_LEAST, self._losses.maxlen):
      return None
    losses = np.asarray(self._losses)
    median = float(np.median(losses))
    deviation = float(np.median(np.abs(losses - median)))
    deviation = max(deviation, _LEAST_DEVIATION * abs(median), 1e-30)
    deviations = (loss - median) / deviation
    return (median, deviations) if deviations > self._deviations else None

  def _write(self) -> None:
    if not self._primary:
      return
    try:
      checkpoint.replace_text(self._file, ''.join(f'{line}\n' for line in self._lines))
    except failures(self._file) as error:  # A run goes on without its log.
      logging.warning('cannot write %s: %s', self._file, error)


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError, TypeError):
    return np.inf  # Not ours, or cut short.
