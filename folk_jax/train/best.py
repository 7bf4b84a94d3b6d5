"""The best checkpoint beside the last ones: chosen by one number of the evaluations on validation images.

`<workdir>/best/<step>/` is laid out as `<workdir>/checkpoints/<step>/` is, and there is one. Its meta also holds
`best`: {metric, value}, which is how a resumed run knows what to exceed.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.train.initial import BEST

# Parts of names of numbers that are better where they are lower.
_LOWER_IS_BETTER = ('loss', 'error', 'reconstruction')


def check_metric(metric: str, reported: Iterable[str]) -> None:
  """Checks what a run is to choose by; '' chooses nothing.

  Args:
    metric: `config.checkpoint.best`: a name, or a minus and the name of a number whose lowest value is the best.
    reported: the names that an evaluation reports.

  Raises:
    UserError: a number that no evaluation reports, or one that is better where it is lower, without its minus.
  """
  if not metric:
    return
  reported, name = sorted(reported), metric.removeprefix('-')
  if name not in reported:
    raise UserError(
      f'config.checkpoint.best {metric!r} is not among what an evaluation of this run reports: {", ".join(reported)}.'
    )
  if name == metric and any(part in name for part in _LOWER_IS_BETTER):
    raise UserError(
      f'config.checkpoint.best {metric!r} is better where it is lower: write -{metric} to keep its lowest value.'
    )


class Best:
  """Keeps the state of the best evaluation so far; without a metric it keeps none. A context manager.

  In a run of several processes each of them makes this object and calls its methods alike, and the first decides.
  """

  def __init__(self, metric: str, workdir: str, about: Mapping[str, Any], asynchronous: bool):
    """Opens, or makes, `<workdir>/best`, and reads what was the best there.

    A best that was chosen by another number, or by evaluations with other settings, counts for nothing: the next
    evaluation takes its place. So does one that is damaged, which is kept aside.

    Args:
      metric: as `check_metric` takes it.
      workdir: the run's folder.
      about: the run's meta, saved with the state; `config` is in it, as JSON has it.
      asynchronous: as `Checkpoints` takes it.

    Raises:
      UserError: a folder that can't be made, or a checkpoint in it of a newer format.
    """
    self._metric, self._about = metric, about
    self._step: int | None = None
    self._value = math.nan
    self._checkpoints = None
    if not metric:
      return
    directory = str(epath.Path(workdir).expanduser() / BEST)
    self._checkpoints = checkpoint.Checkpoints(directory, 0, 1, 0, asynchronous)
    found = self._checkpoints.newest_meta()
    if found is None:
      return
    step, meta = found
    chosen = meta.get('best', {})
    if (chosen.get('metric'), _settings(meta)) == (metric, _settings(about)):
      self._step, self._value = step, chosen['value']
    else:
      logging.warning(
        'step %d in %s was the best by %s, as evaluated then; the next evaluation takes its place',
        step,
        directory,
        chosen.get('metric'),
      )

  def offer(self, step: int, scalars: Mapping[str, float], state: Any) -> bool:
    """Saves `state` where its evaluation is better than the best so far; returns whether it is.

    Equal is not better, and what is not finite never is.

    Raises:
      UserError, RuntimeError: as `Checkpoints.save`.
    """
    if self._checkpoints is None:
      return False
    value = float(scalars[self._metric.removeprefix('-')])
    if not self._agreed(self._is_better(value)):
      return False
    # Steps that are done again, after a kill, and this time with another outcome (on other devices, say): of steps
    # the newest is kept, so that those ahead of it must go first; killed in between, the next evaluation is the best.
    for ahead in self._checkpoints.all_steps():
      if ahead >= step:
        self._checkpoints.delete(ahead)
    chosen = {'metric': self._metric, 'value': value}
    self._checkpoints.save(step, state, {**self._about, 'step': step, 'best': chosen}, force=True)
    self._step, self._value = step, value
    return True

  def _is_better(self, value: float) -> bool:
    sign = -1 if self._metric.startswith('-') else 1
    return math.isfinite(value) and (self._step is None or sign * value > sign * self._value)

  def _agreed(self, decision: bool) -> bool:
    """The first process's decision: a save in which one of them doesn't join would wait for it for ever."""
    if jax.process_count() == 1:
      return decision
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))

  def wait(self) -> None:
    """Waits until a save under way is on disk. A later step is saved only then: the best is never behind the last."""
    if self._checkpoints is not None:
      self._checkpoints.wait()

  def line(self) -> str:
    """What a person wants to know at the end; '' where there is none."""
    if self._step is None:
      return ''
    name = self._metric.removeprefix('-').removeprefix('eval/')
    return (
      f'best {name}: {self._value:.4g} at step {self._step}, kept in {self._checkpoints.directory}'
    )

  def __enter__(self) -> 'Best':
    return self

  def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
    if self._checkpoints is not None:
      self._checkpoints.__exit__(kind, value, trace)


def _settings(about: Mapping[str, Any]) -> dict[str, Any]:
  """What must agree for two evaluations of a run to be comparable: all but how many images go at a time."""
  settings = about.get('config', {}).get('evaluation', {})  # Meta of format 0 may not have them.
  return {k: v for k, v in settings.items() if k != 'batch_size'}
