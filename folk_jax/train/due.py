"""What a run owes after a step: a save, evaluations, or neither; and what was put off."""

from collections.abc import Callable, Mapping
from typing import Any


class Due:
  """Falls due by periods, and stays due until it is done: over skipped steps, and over the end of a process."""

  def __init__(
    self, total: int, save_every: int, eval_every: int, evaluation_due: Callable[[int], bool]
  ):
    """Nothing is due yet.

    Args:
      total: the run's last step, at which everything falls due.
      save_every, eval_every: steps; 0 for the last one alone.
      evaluation_due: whether an evaluation with a period of its own falls on a step.
    """
    self._total, self._save_every, self._eval_every = total, save_every, eval_every
    self._evaluation_due = evaluation_due
    self.saves = False
    self._evaluations: list[int] = []

  @property
  def evaluations(self) -> tuple[int, ...]:
    """The steps whose evaluation is due, oldest first: the step just made, and those that were put off."""
    return tuple(self._evaluations)

  def falls(self, step: int, preempted: bool) -> bool:
    """Counts what falls due at `step`; whether anything is due then."""
    last = step == self._total
    self.saves |= last or preempted or _every(self._save_every, step)
    if last or _every(self._eval_every, step) or self._evaluation_due(step):
      self._evaluations.append(step)
    return self.saves or bool(self._evaluations)

  def evaluated(self) -> None:
    self._evaluations.clear()

  def saved(self) -> None:
    self.saves = False

  def kept(self) -> dict[str, Any]:
    """What a checkpoint's meta keeps: a run that was told to leave is saved first and evaluated by the next start."""
    return {'evaluations': self._evaluations[:]}

  def restore(self, meta: Mapping[str, Any]) -> None:
    """Takes up what `kept` left in a checkpoint's meta; older checkpoints left nothing."""
    self._evaluations += meta.get('due', {}).get('evaluations', [])


def _every(period: int, step: int) -> bool:
  return bool(period) and step % period == 0
