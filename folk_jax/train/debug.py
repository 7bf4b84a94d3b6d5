"""`config.debug`: every step is checked before it is made, and the first check that fails stops the run by name.

One program holds the step's own computation and the checks, in the order in which a step goes: weights, views, masks,
targets, losses, gradients, new weights. It changes nothing: the step that follows is the one of a run without checks,
bit for bit. It costs a second step, the gradients' copies, and a wait at each step: for finding a mistake, not for
training. With accumulation the losses and gradients are those of the microbatches; views and masks are looked at whole.

Not `jax_debug_nans`: it looks at whole programs, runs again what has been donated, fails on several processes, and
knows of numbers that are not finite alone. Not checkify: it would make every operation of the step carry an error.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from folk_jax.objectives import Objective, losses
from folk_jax.objectives.base import encode, from_fields
from folk_jax.objectives.distillation import Distillation
from folk_jax.objectives.views import FILTER, augmented, fold, view_keys
from folk_jax.signal import fourier
from folk_jax.signal.augment import normalise
from folk_jax.signal.filters import FILTERS, Filter
from folk_jax.signal.shard import over_batch
from folk_jax.train import sharding
from folk_jax.train.explain import explain
from folk_jax.train.guard import RunStopped
from folk_jax.train.state import TrainState, teacher_of
from folk_jax.train.step import Step

# Of float32 sums over some thousand probabilities.
_SUM_TOLERANCE = 1e-3
# What interpolation and colour changes may leave outside [0, 1] by rounding.
_RANGE_TOLERANCE = 1e-5

Checks = dict[str, jax.Array]


def make_checks(objective: Objective, step: Step, seed: int) -> Callable[[TrainState, Any], Checks]:
  """The pure function (state, batch) -> checks by name, true where they hold, in the order of a step.

  Args:
    objective: the method; what it has no field for (a filter, a teacher's temperatures) is not checked.
    step: the run's own.
    seed: of the run.
  """

  def checks(state: TrainState, batch: Mapping[str, jax.Array]) -> Checks:
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    teacher = teacher_of(state)
    found = _by_module('parameters', state.params)
    found |= _by_module('teacher', teacher or {}) | _by_module('extra', state.extra)
    keys_BV = view_keys(rng, batch['index'], batch['views'].shape[1])

    def prepare(view_BVHWC, keys_BV):
      return augmented(objective.parts, view_BVHWC, keys_BV)

    image_NHWC = over_batch(prepare, batch['views'], keys_BV)
    found['views: finite'] = _finite(image_NHWC)
    found['views: in [0, 1]'] = _within(image_NHWC)
    if hasattr(objective, 'portions'):
      found |= filter_checks(objective, image_NHWC, keys_BV.reshape(-1))
    if hasattr(objective, 'teacher_temperature') and 'centre' in state.extra:
      found |= teacher_checks(objective, teacher, state.extra, image_NHWC)
    after, metrics = step(state, batch)
    # The total comes last of the losses, the gradients after them.
    order = sorted(metrics, key=lambda name: (name.startswith('gradient_norm'), name == 'loss'))
    for name in order:
      found[f'metric {name}: finite'] = _finite(metrics[name])
    found |= _by_module('new parameters', after.params)
    found |= _by_module('new teacher', teacher_of(after) or {})
    found |= _by_module('new extra', after.extra)
    return found

  return checks


def filter_checks(objective: Any, image_NHWC: jax.Array, keys_N: jax.Array) -> Checks:
  """Of the frequency filter: its mask, and what it makes of the images.

  Args:
    objective: one with the fields of `Filter`, its name as `filter`.
    image_NHWC: float32 in [0, 1].
    keys_N: each view's own.
  """
  backend = objective.parts.spectral_backend
  filters = from_fields(Filter, objective, name=objective.filter, backend=backend)
  kind, width = FILTERS[filters.name], image_NHWC.shape[2]

  def examine(image_NHWC, keys_N):
    keys_N = fold(keys_N, FILTER)
    filtered_NHWC, kept_NHFM = filters(image_NHWC, keys_N)
    keep = filters.com_probability if kind.keep is None else float(kind.keep)
    k_N, keep_N = fourier.draw_filters(
      keys_N, filters.portions or (0.5,), keep, *image_NHWC.shape[1:3]
    )
    selected_NHFM = kept_NHFM == keep_N[:, None, None, None]
    mirrored_H = -np.arange(image_NHWC.shape[1]) % image_NHWC.shape[1]
    pairs = [
      selected_NHFM[:, :, column] == selected_NHFM[:, mirrored_H, column]
      for column in fourier.self_conjugate_columns(width)
    ]
    symmetric_N = jnp.all(jnp.stack(pairs), axis=(0, 2, 3))
    weight_F = jnp.asarray(fourier.hermitian_weights(width))[:, None]
    count_NM = jnp.sum(selected_NHFM * weight_F, axis=(1, 2))
    enough_N = jnp.all(count_NM >= k_N[:, None], axis=1)
    # The strongest: fewer than k are stronger than the weakest selected, with which others may tie.
    spectrum_NHFC = fourier.half_spectrum(image_NHWC, backend)
    magnitude_NHFM = fourier.ranking_magnitude(spectrum_NHFC, width, filters.ranking)
    weakest_NM = jnp.min(jnp.where(selected_NHFM, magnitude_NHFM, jnp.inf), axis=(1, 2))
    stronger_NM = jnp.sum((magnitude_NHFM > weakest_NM[:, None, None]) * weight_F, axis=(1, 2))
    no_more_N = jnp.all(stronger_NM < k_N[:, None], axis=1)
    return filtered_NHWC, symmetric_N, enough_N, no_more_N

  filtered_NHWC, symmetric_N, enough_N, no_more_N = over_batch(examine, image_NHWC, keys_N)
  found = {}
  if not filters.name.startswith('wavelet'):  # They change every Fourier coefficient.
    found['masks: conjugate-symmetric'] = jnp.all(symmetric_N)
    if kind.sized_by == 'portions':
      found['masks: as many coefficients as asked'] = jnp.all(enough_N)
    if filters.name in ('com_rcom', 'com', 'rcom'):
      found['masks: no more coefficients than asked'] = jnp.all(no_more_N)
  found['filtered views: finite'] = _finite(filtered_NHWC)
  if filters.clamp:
    found['filtered views: in [0, 1]'] = _within(filtered_NHWC)
  return found


def teacher_checks(objective: Any, teacher: Any, extra: Any, image_NHWC: jax.Array) -> Checks:
  """Of what the teacher says of unfiltered views in [0, 1], at the sharpest temperature of the run.

  Args:
    objective: one with the fields of `Distillation`.
    teacher: its trees.
    extra: the objective's state, with `centre`.
    image_NHWC: float32.
  """
  parts = objective.parts
  distillation = from_fields(Distillation, objective)
  clean_NHWC = normalise(image_NHWC, parts.mean, parts.std)
  output, _ = encode(parts, 'teacher', teacher, extra, clean_NHWC, patches=False)
  logits_NK = distillation.logits(teacher, output.pooled)
  temperature = min(distillation.teacher_temperature, distillation.teacher_temperature_start)
  target_NK = losses.teacher_probabilities(logits_NK, extra['centre'], temperature)
  row_N = jnp.sum(target_NK, axis=-1)
  return {
    'teacher features: finite': _finite(output.pooled),
    'teacher logits: finite': _finite(logits_NK),
    'targets: finite': _finite(target_NK),
    'targets: rows sum to 1': jnp.all(jnp.abs(row_N - 1) < _SUM_TOLERANCE),
  }


def _by_module(what: str, tree: Mapping[str, Any]) -> Checks:
  """Finite, for each module of two levels: `parameters backbone/blocks`."""
  found: Checks = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = [jax.tree_util.keystr((entry,), simple=True) for entry in path[:2]]
    key = f'{what} {"/".join(names)}: finite'
    found[key] = found.get(key, True) & _finite(leaf)
  return found


def _finite(array: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(array))


def _within(image: jax.Array) -> jax.Array:
  # A comparison with NaN is false, which the check before has said.
  return ~jnp.any((image < -_RANGE_TOLERANCE) | (image > 1 + _RANGE_TOLERANCE))


class Debugger:
  """Runs the checks of each step of a run."""

  def __init__(self, objective: Objective, step: Step, seed: int, state: TrainState, mesh: Mesh):
    """Compiles nothing yet; `state` gives shapes and shardings."""
    self._objective, self._seed = objective, seed
    self._names: list[str] = []

    def flags(state, batch):
      found = make_checks(objective, step, seed)(state, batch)
      self._names = list(found)  # jit's dictionaries come back sorted.
      return jnp.stack([jnp.asarray(value) for value in found.values()])

    self._flags = jax.jit(
      flags,
      in_shardings=(sharding.state_shardings(state, mesh), sharding.batch_sharding(mesh)),
      out_shardings=sharding.replicated(mesh),
    )

  def failed(self, state: TrainState, batch: Mapping[str, jax.Array]) -> list[str]:
    """The checks that do not hold for the step that `state` and `batch` are about to make, in the order of a step."""
    holds = np.asarray(self._flags(state, batch))
    return [name for name, good in zip(self._names, holds, strict=True) if not good]

  def check(self, step: int, state: TrainState, batch: Mapping[str, jax.Array]) -> None:
    """Checks the step that `state` and `batch` are about to make.

    Raises:
      RunStopped: names the first check that fails, the others, and the operation where a number stopped being finite.
    """
    failed = self.failed(state, batch)
    if not failed:
      return
    more = f' (and {len(failed) - 1} checks after it)' if len(failed) > 1 else ''
    raise RunStopped(
      f'config.debug: step {step} fails the check "{failed[0]}"{more}; the step was not made. '
      f'{self._origin(state, batch)}'
    )

  def _origin(self, state: TrainState, batch: Mapping[str, jax.Array]) -> str:
    if jax.process_count() > 1:
      return 'With one process the operation is named, too.'
    found = explain(self._objective, state, batch, self._seed)
    if found.origin is None:
      return 'The loss and its gradient are finite.'
    image = 'the whole batch'
    if found.row is not None:
      image = f'image {int(np.asarray(batch["index"])[found.row])}'
    return f'First in {image}: {found.origin}.'
