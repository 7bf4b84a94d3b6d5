"""Watches the numbers that can go wrong, and says in words what happened and what to try.

Three things: steps that were skipped because a number was not finite (counted, their images kept, a limit), losses that
stand out (`spikes.py`), and collapse (at log points). What it remembers goes into a checkpoint's meta, so that a
resumed run counts on; a checkpoint without it starts from nothing.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from folk_jax.errors import UserError
from folk_jax.train.faults import Faults
from folk_jax.train.spikes import Spikes

_ACTIONS = {'on_nonfinite': ('skip', 'stop'), 'on_collapse': ('stop', 'warn')}
# Steps in flight whose numbers have not been read: reading older ones stalls nothing.
LAG = 4
# The share of skipped steps is taken of so many steps, the last ones.
SHARE_OF = 1000
# Numbers of every step; the others of a step are read where it was skipped.
_EVERY_STEP = ('loss', 'gradient_norm', 'nonfinite')
_QUIET_STEPS = 100


class RunStopped(Exception):
  """A run that its guard stopped; the message says why, at which step, and what to try."""


@dataclasses.dataclass(frozen=True)
class GuardSettings:
  """Fields of `config.guard`.

  Attributes:
    on_nonfinite: what follows a step that was skipped: 'skip' goes on, up to the limits, 'stop' ends the run at once.
    max_skipped: steps that may be skipped in a row, not negative.
    max_skipped_share: share of the last 1000 steps that may be skipped, in [0, 1].
    on_collapse: 'stop' or 'warn'.
    collapse_entropy: teacher entropy / ln K above which the teacher is uniform.
    collapse_mean_entropy: entropy of the teacher's mean output / ln K below which all images fall to one output.
    collapse_rank: effective rank of a batch's features below which they lie in one direction.
    collapse_std: spread of a batch's features (1: over the whole sphere) below which all images share one.
    patience: log points in a row before a collapse is called one, at least 1.
    spike_deviations: median absolute deviations above the median of the last losses that make a spike; 0: none.
    spike_window: so many losses, at least 2.

  Raises:
    UserError: for an unknown action or a number out of range.
  """

  on_nonfinite: str
  max_skipped: int
  max_skipped_share: float
  on_collapse: str
  collapse_entropy: float
  collapse_mean_entropy: float
  collapse_rank: float
  collapse_std: float
  patience: int
  spike_deviations: float
  spike_window: int

  def __post_init__(self):
    for field, known in _ACTIONS.items():
      if getattr(self, field) not in known:
        raise UserError(
          f'unknown config.guard.{field} {getattr(self, field)!r}. Known: {", ".join(known)}.'
        )
    for field, least in {'patience': 1, 'max_skipped': 0, 'spike_window': 2}.items():
      if getattr(self, field) < least:
        raise UserError(
          f'config.guard.{field} is {getattr(self, field)}; it must be at least {least}.'
        )
    if not 0 <= self.max_skipped_share <= 1:
      raise UserError(
        f'config.guard.max_skipped_share is {self.max_skipped_share}; it must be between 0 and 1.'
      )
    if not self.spike_deviations >= 0:
      raise UserError(
        f'config.guard.spike_deviations is {self.spike_deviations}; it must not be negative (0: none).'
      )


@dataclasses.dataclass(frozen=True)
class _Sign:
  """A sign of collapse: which numbers show it, and what is said of them and the settings that count."""

  name: str
  shows: Callable[[Mapping[str, float], GuardSettings], bool]
  words: str


_SIGNS = (
  _Sign(
    'entropy',
    lambda found, settings: found.get('teacher_entropy', 0.0) > settings.collapse_entropy,
    'the teacher is uniform (entropy / ln K = {teacher_entropy:.4f} for {patience} log points). Try a lower '
    'objective.teacher_temperature, a higher objective.centre_momentum, a lower optimizer.learning_rate, a longer '
    'warm-up or fewer projection.outputs.',
  ),
  _Sign(
    'one_output',
    lambda found, settings: (
      found.get('teacher_entropy_of_mean', 1.0) < settings.collapse_mean_entropy
    ),
    'the teacher gives all images one output (entropy of its mean output / ln K = {teacher_entropy_of_mean:.4f}, '
    'student and teacher agree on {agreement:.0%} of the views, for {patience} log points). Try a lower '
    'objective.centre_momentum, so that the centre follows sooner, a higher objective.teacher_temperature, a lower '
    'optimizer.learning_rate or a longer warm-up.',
  ),
  _Sign(
    'constant',
    lambda found, settings: found.get('feature_std', math.inf) < settings.collapse_std,
    'all images share one feature (spread {feature_std:.4f} of 1 for {patience} log points). Look whether the images '
    'differ (data.path), and try a lower optimizer.learning_rate, a longer warm-up, a lower optimizer.weight_decay or '
    'model.dtype=float32.',
  ),
  _Sign(
    'rank',
    lambda found, settings: (
      found.get('effective_rank', math.inf) < settings.collapse_rank
      and not found.get('feature_std', math.inf) < settings.collapse_std
    ),
    'the features lie in one direction (effective rank {effective_rank:.3f} for {patience} log points). Try a higher '
    'objective.centre_momentum, a lower optimizer.learning_rate or a lower optimizer.weight_decay.',
  ),
)


def watch(
  settings: GuardSettings,
  workdir: str,
  *,
  seed: int,
  start: int,
  learning_rate: Callable[[int], Any],
) -> 'Guard':
  """The guard of a run that starts at step `start`, with its files in `workdir`.

  Args:
    settings: `config.guard`.
    workdir: the run's folder.
    seed: of the run, which `faults/` notes.
    start: the step it resumes from, or 0.
    learning_rate: by the number of steps done; `spikes.jsonl` notes it.
  """
  process, processes = jax.process_index(), jax.process_count()
  spikes = Spikes(
    settings.spike_deviations,
    settings.spike_window,
    lambda step: float(learning_rate(step)),
    workdir,
    start,
    primary=process == 0,
  )
  return Guard(settings, Faults(workdir, seed, process, processes), spikes)


_TRY = 'Try a lower optimizer.learning_rate, a longer warm-up, a smaller optimizer.clip, or model.dtype=float32.'


class Guard:
  """What a run's host knows of its health. All processes of a run see the same numbers, and decide alike."""

  def __init__(
    self, settings: GuardSettings, faults: Faults | None = None, spikes: Spikes | None = None
  ):
    """Watches with `settings`; without `faults` and `spikes` nothing is written."""
    self._settings, self._faults, self._spikes = settings, faults, spikes
    self._streak = {sign.name: 0 for sign in _SIGNS}
    self._pending: collections.deque[tuple[int, Any, Mapping[str, Any]]] = collections.deque()
    self.skipped, self._row = 0, 0
    self._recent: collections.deque[int] = collections.deque()
    self._quiet_until, self._past_limit = 0, ''

  def restore(self, meta: Mapping[str, Any]) -> None:
    """Goes on from a checkpoint's meta; one from before there was a guard in it starts from nothing."""
    kept = meta.get('guard')
    if kept is None:
      return
    self.skipped, self._row = kept['skipped'], kept['row']
    self._recent.extend(kept['recent'])
    self._streak |= {name: kept['streak'].get(name, 0) for name in self._streak}
    if self._spikes:
      self._spikes.restore(kept['losses'])

  def kept(self) -> dict[str, Any]:
    """What `restore` takes, for a checkpoint's meta, as `guard`: JSON-able. Call it after `settle`."""
    losses = self._spikes.kept() if self._spikes else []
    counts = {'skipped': self.skipped, 'row': self._row, 'recent': list(self._recent)}
    return counts | {'streak': dict(self._streak), 'losses': losses}

  def launched(self, step: int, index_B: np.ndarray, values: Mapping[str, Any]) -> None:
    """Takes a step that was just launched, and reads the one `LAG` steps before it.

    Args:
      step: its number.
      index_B: the samples of this process's rows, on the host.
      values: the step's metrics, on the device.

    Raises:
      RunStopped: where what was read is past a limit.
    """
    for name in _EVERY_STEP:
      if hasattr(values[name], 'copy_to_host_async'):
        values[name].copy_to_host_async()
    self._pending.append((step, index_B, values))
    if len(self._pending) > LAG:
      self.settle(step - LAG)

  def skipped_by(self, step: int) -> int:
    """How many steps of the whole run up to `step` were skipped.

    Waits for that step: its numbers, and those of the steps before it, are read from the device, judged as spikes, and
    written where they are not finite. Raises nothing: a limit that is passed here is raised by the next `settle`.
    """
    while self._pending and self._pending[0][0] <= step:
      self._read(*self._pending.popleft())
    return self.skipped

  def settle(self, step: int) -> bool:
    """Reads every step up to `step`, which it waits for.

    Returns:
      True where `step` was made, False where it was skipped: then these weights are not known to make a finite step.

    Raises:
      RunStopped: where what was read is past a limit.
    """
    self.skipped_by(step)
    if self._past_limit:
      raise RunStopped(self._past_limit)
    return not self._row

  def check(self, step: int, metrics: Mapping[str, float]) -> None:
    """Raises `RunStopped`, or logs a warning, where a log point's `metrics` (without `train/`) tell of collapse."""
    self.settle(step)
    if metrics.get('nonfinite'):
      return  # Numbers of a step that was not made: they neither lengthen nor end a streak.
    settings = self._settings
    for sign in _SIGNS:
      self._streak[sign.name] = self._streak[sign.name] + 1 if sign.shows(metrics, settings) else 0
      # Once, when it has held for `patience` log points in a row.
      if self._streak[sign.name] == settings.patience:
        known = collections.defaultdict(lambda: math.nan, metrics)
        words = sign.words.format_map(known | {'patience': settings.patience})
        if settings.on_collapse == 'stop':
          raise RunStopped(f'collapse at step {step}: {words}')
        logging.warning(f'collapse at step {step}: {words}')

  def _read(self, step: int, index_B: np.ndarray, values: Mapping[str, Any]) -> None:
    found = {name: float(values[name]) for name in _EVERY_STEP}
    if not found['nonfinite']:
      self._row = 0
      if self._spikes:
        self._spikes.offer(step, found['loss'], found['gradient_norm'], index_B)
      return
    self.skipped, self._row = self.skipped + 1, self._row + 1
    self._recent.append(step)
    while self._recent[0] <= step - SHARE_OF:
      self._recent.popleft()
    found = {
      name: float(value)
      for name, value in values.items()
      if name.startswith(('loss', 'gradient_norm', 'nonfinite'))
    }
    kept = self._faults.record(step, index_B, found) if self._faults else ''
    said = f'non-finite numbers at step {step} ({_described(found)})'
    if over := self._over():
      self._past_limit = self._past_limit or f'{said}; {over}. {kept}{_TRY}'
    elif self._row == 1 and step >= self._quiet_until:
      self._quiet_until = step + _QUIET_STEPS
      logging.warning(f'{said}: the step was skipped, nothing was updated. {kept}')

  def _over(self) -> str:
    """Which limit has been passed, in words; '' for none."""
    settings, recent = self._settings, len(self._recent)
    since = 'no update was made, and the last checkpoint is from before'
    if settings.on_nonfinite == 'stop':
      return f'config.guard.on_nonfinite is stop: {since}'
    if self._row > settings.max_skipped:
      return f'{self._row} steps in a row were skipped, past config.guard.max_skipped: {since}'
    if recent > settings.max_skipped_share * SHARE_OF:
      return (
        f'{recent} of the last {SHARE_OF} steps were skipped, more than config.guard.max_skipped_share '
        f'{settings.max_skipped_share:g}: what is not finite comes back'
      )
    return ''


def _described(found: Mapping[str, float]) -> str:
  """The loss, its parts that are not finite, and the gradient's norm, by network where one of them is not finite."""
  parts = [f'loss {found["loss"]:g}']
  parts += [
    f'{name} {value:g}'
    for name, value in found.items()
    if name.startswith('loss_') and not math.isfinite(value)
  ]
  parts.append(f'gradient norm {found["gradient_norm"]:g}')
  prefix = 'gradient_norm_'
  norms = {
    name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)
  }
  if not math.isfinite(found['gradient_norm']):
    parts[-1] += ': ' + ', '.join(f'{name} {value:g}' for name, value in norms.items())
  elif math.isfinite(found['loss']):
    parts.append("the objective's own state")
  return ', '.join(parts)
