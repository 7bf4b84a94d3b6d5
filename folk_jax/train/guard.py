"""Watches the numbers that can collapse, and says in words what happened and what to try."""

import dataclasses
import math
from collections.abc import Mapping

from absl import logging

from folk_jax.errors import UserError

_ACTIONS = ('stop', 'warn')


class RunStopped(Exception):
  """A run that its guard stopped; the message says why, at which step, and what to try."""


@dataclasses.dataclass(frozen=True)
class GuardSettings:
  """Fields of `config.guard`.

  Attributes:
    on_nonfinite, on_collapse: 'stop' or 'warn'.
    collapse_entropy: teacher entropy / ln K above which the teacher is uniform.
    collapse_rank: effective rank of a batch's features below which they lie in one direction.
    patience: log points in a row before a collapse is called one, at least 1.

  Raises:
    UserError: for an unknown action or a patience below 1.
  """

  on_nonfinite: str
  on_collapse: str
  collapse_entropy: float
  collapse_rank: float
  patience: int

  def __post_init__(self):
    for field in ('on_nonfinite', 'on_collapse'):
      if getattr(self, field) not in _ACTIONS:
        raise UserError(
          f'unknown config.guard.{field} {getattr(self, field)!r}. Known: {", ".join(_ACTIONS)}.'
        )
    if self.patience < 1:
      raise UserError(f'config.guard.patience is {self.patience}; it must be at least 1.')


class Guard:
  """Checks the metrics of each log point. The total loss shows no collapse: reconstruction hides it."""

  def __init__(self, settings: GuardSettings):
    self._settings = settings
    self._streak = {'entropy': 0, 'rank': 0}
    self._warned_nonfinite = False

  def check(self, step: int, metrics: Mapping[str, float]) -> None:
    """Raises `RunStopped`, or logs a warning, where a log point's `metrics` (without `train/`) tell of trouble."""
    self.check_finite(step, metrics)
    uniform = metrics.get('teacher_entropy', 0.0) > self._settings.collapse_entropy
    if self._lasts('entropy', uniform):
      self._act(
        self._settings.on_collapse,
        f'collapse at step {step}: the teacher is uniform (entropy / ln K = {metrics["teacher_entropy"]:.4f} for '
        f'{self._settings.patience} log points). Try a lower objective.teacher_temperature, a higher '
        'objective.centre_momentum, a lower optimizer.learning_rate, a longer warm-up or fewer projection.outputs.',
      )
    flat = metrics.get('effective_rank', math.inf) < self._settings.collapse_rank
    if self._lasts('rank', flat):
      self._act(
        self._settings.on_collapse,
        f'collapse at step {step}: the features lie in one direction (effective rank '
        f'{metrics["effective_rank"]:.3f} for {self._settings.patience} log points). Try a higher '
        'objective.centre_momentum, a lower optimizer.learning_rate or a lower optimizer.weight_decay.',
      )

  def check_finite(self, step: int, metrics: Mapping[str, float]) -> bool:
    """Whether the numbers are finite; the part of `check` that may also run between log points: it counts nothing."""
    finite = not metrics.get('nonfinite') and math.isfinite(metrics['loss'])
    if finite or self._warned_nonfinite:
      return finite
    self._warned_nonfinite = True
    self._act(
      self._settings.on_nonfinite,
      f'non-finite numbers at step {step} (loss {metrics["loss"]}, gradient norm {metrics["gradient_norm"]}). The '
      'last checkpoint is from before. Try a lower optimizer.learning_rate, a longer warm-up, a smaller '
      'optimizer.clip, or model.dtype=float32.',
    )
    return False

  def _lasts(self, what: str, now: bool) -> bool:
    """True once, when `now` has held for `patience` checks in a row."""
    self._streak[what] = self._streak[what] + 1 if now else 0
    return self._streak[what] == self._settings.patience

  def _act(self, action: str, message: str) -> None:
    if action == 'stop':
      raise RunStopped(message)
    logging.warning(message)
