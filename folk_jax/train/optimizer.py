"""AdamW and SGD as the papers' code has them: schedules, decay masks, clips, a late last layer, layer decay."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from folk_jax import schedules
from folk_jax.errors import UserError
from folk_jax.train.teacher import ema_teacher

# Leaves under this key carry a leading layer axis (models/vit.py scans over it): they count as one axis less.
_STACKED = 'blocks'


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """Fields of `config.optimizer`; the learning rate is for 256 images and is scaled linearly by the batch.

  `b1`, `b2` and `eps` are AdamW's, `momentum` is SGD's. `layer_decay` 1 and an empty `frozen` change nothing.
  """

  learning_rate: float
  final_learning_rate: float
  warmup_epochs: float
  schedule: str
  weight_decay: float
  final_weight_decay: float
  decay_exclude: tuple[str, ...]
  b1: float
  b2: float
  eps: float
  clip: float
  clip_by: str
  freeze_last_layer_epochs: float
  name: str = 'adamw'
  momentum: float = 0.9
  layer_decay: float = 1.0
  frozen: tuple[str, ...] = ()


class DelayedState(NamedTuple):
  """State of `delayed`: the step count and the wrapped state, untouched until the start."""

  count: jax.Array
  inner: Any


def delayed(inner: optax.GradientTransformation, start_step: int) -> optax.GradientTransformation:
  """Zero updates before `start_step`, then `inner` as if it began there.

  The reference drops the last layer's gradients during the first epoch, so that its moments and its bias correction
  start with the first real gradient and no decay touches it before (DINO's utils.cancel_gradients_last_layer).
  """

  def init(params):
    return DelayedState(jnp.zeros([], jnp.int32), inner.init(params))

  def update(updates, state, params=None):
    started = state.count >= start_step
    moved, inner_state = inner.update(updates, state.inner, params)
    moved = jax.tree.map(lambda u: jnp.where(started, u, jnp.zeros_like(u)), moved)
    inner_state = jax.tree.map(
      lambda new, old: jnp.where(started, new, old), inner_state, state.inner
    )
    return moved, DelayedState(optax.safe_increment(state.count), inner_state)

  return optax.GradientTransformation(init, update)


def clip_by_parameter(limit: float) -> optax.GradientTransformation:
  """Scales each parameter's gradient to a norm of at most `limit`; stacked layers count one by one.

  As DINO's and iBOT's code clips: min(1, limit / (norm + 1e-6)) per parameter tensor.
  """

  def clip(path, gradient):
    axes = tuple(range(1 if _is_stacked(path) else 0, gradient.ndim))
    norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes, keepdims=True))
    return gradient * jnp.minimum(1.0, limit / (norm + 1e-6))

  return optax.stateless(lambda updates, params: jax.tree.map_with_path(clip, updates))


_CLIPS: dict[str, Callable[[float], optax.GradientTransformation]] = {
  'parameter': clip_by_parameter,
  'global': optax.clip_by_global_norm,
}


def layer_scales(params: Any, decay: float) -> Any:
  """Factors of the learning rate by layer, as BEiT's fine-tuning has them (arXiv 2106.08254; MFM's code, too).

  Of a ViT of L blocks, block l of 0 .. L-1 gets decay^(L - l); patch embedding, class token and positions get
  decay^(L + 1); the final norm and every head get 1.

  Args:
    params: trees by name, with `backbone`, whose blocks are stacked on a leading axis.
    decay: in (0, 1].

  Returns:
    A tree like `params`, of float32 arrays that broadcast against its leaves.

  Raises:
    UserError: a backbone without stacked blocks.
  """
  backbone = params['backbone']
  if _STACKED not in backbone:
    raise UserError(
      f'config.optimizer.layer_decay {decay} needs a ViT, whose blocks have an order; found a backbone of '
      f'{", ".join(sorted(backbone)[:3])}, ...: set it to 1.0.'
    )
  depth = jax.tree.leaves(backbone[_STACKED])[0].shape[0]
  power_L = np.arange(depth, 0, -1)

  def scale(path, leaf):
    if _name(path[0]) != 'backbone' or _name(path[1]) == 'norm':
      return np.float32(1)
    if _name(path[1]) != _STACKED:
      return np.float32(decay ** (depth + 1))
    return np.float32(decay**power_L).reshape(-1, *[1] * (leaf.ndim - 1))

  return jax.tree.map_with_path(scale, params)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Multiplies updates by `layer_scales`; weight decay, which is among them, is scaled as the reference scales it."""

  def init(params):
    layer_scales(params, decay)  # Refuses what has no layers before anything is trained.
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scales = layer_scales(updates, decay)
    return jax.tree.map(jnp.multiply, updates, scales), state

  return optax.GradientTransformation(init, update)


def without_frozen(frozen: tuple[str, ...]) -> optax.GradientTransformation:
  """Zeros in place of the gradients of the trees named: a clip of the global norm must not count them."""

  def init(params):
    if unknown := sorted(set(frozen) - set(params)):
      raise UserError(
        f'unknown config.optimizer.frozen {unknown[0]!r}. Known: {", ".join(sorted(params))}.'
      )
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    zeros = {name: jax.tree.map(jnp.zeros_like, updates[name]) for name in frozen}
    return dict(updates) | zeros, state

  return optax.GradientTransformation(init, update)


# Name -> the links between the clipped gradient and the learning rate, given the settings and the link that adds decay.
_RULES: dict[str, Callable[..., tuple[optax.GradientTransformation, ...]]] = {
  'adamw': lambda s, decay: (optax.scale_by_adam(s.b1, s.b2, s.eps), decay),
  # torch's: the decay is part of the gradient that momentum gathers, without dampening or Nesterov.
  'sgd': lambda s, decay: (decay, optax.trace(s.momentum)),
}


def decay_mask(params: Any, exclude: tuple[str, ...] = ()) -> Any:
  """True where weight decay applies: parameters of two axes or more (layers unstacked) that `exclude` doesn't name."""

  def decays(path, leaf):
    names = [_name(entry) for entry in path]
    return leaf.ndim - _is_stacked(path) > 1 and not any(name in exclude for name in names)

  return jax.tree.map_with_path(decays, params)


def make_optimizer(
  settings: OptimizerSettings,
  *,
  batch_size: int,
  steps_per_epoch: float,
  total_steps: int,
  teacher_parts: tuple[str, ...] = (),
  momentum: tuple[float, float] = (0.996, 1.0),
) -> tuple[optax.GradientTransformationExtraArgs, dict[str, Callable[[jax.Array], jax.Array]]]:
  """The whole chain: clip, AdamW or SGD, late last layer, layer decay, EMA teacher.

  Args:
    settings: `config.optimizer`.
    batch_size: global batch in images.
    steps_per_epoch: optimiser steps an epoch.
    total_steps: length of the run; the schedules end there.
    teacher_parts: parameter trees that the teacher mirrors; () for no teacher.
    momentum: the teacher's momentum at the start and at the end, a cosine between.

  Returns:
    The transformation, and its schedules by name (learning_rate, weight_decay, teacher_momentum) for the log.

  Raises:
    UserError: for an unknown `name`, `clip_by` or `schedule`, or a `layer_decay` or `momentum` out of range; and from
      the transformation's `init`, for a `frozen` name that isn't there or layer decay without a ViT.
  """
  if settings.name not in _RULES:
    raise UserError(f'unknown config.optimizer.name {settings.name!r}. Known: {", ".join(_RULES)}.')
  if not 0 < settings.layer_decay <= 1:
    raise UserError(
      f'config.optimizer.layer_decay {settings.layer_decay} must lie in (0, 1]; 1.0 is none.'
    )
  if not 0 <= settings.momentum < 1:
    raise UserError(f'config.optimizer.momentum {settings.momentum} must lie in [0, 1).')
  if settings.clip_by not in _CLIPS:
    raise UserError(
      f'unknown config.optimizer.clip_by {settings.clip_by!r}. Known: {", ".join(_CLIPS)}.'
    )
  if settings.schedule not in ('dino', 'timm'):
    raise UserError(f'unknown config.optimizer.schedule {settings.schedule!r}. Known: dino, timm.')
  warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
  if warmup_steps >= total_steps:
    raise UserError(
      f'config.optimizer.warmup_epochs {settings.warmup_epochs} is {warmup_steps} steps, which is not less than the '
      f"run's {total_steps}: lower it or train longer."
    )
  scale = batch_size / 256
  rates = {
    'learning_rate': schedules.warmup_cosine(
      peak=settings.learning_rate * scale,
      final=settings.final_learning_rate,
      warmup_steps=warmup_steps,
      total_steps=total_steps,
      convention=settings.schedule,
    ),
    'weight_decay': schedules.cosine(
      settings.weight_decay, settings.final_weight_decay, total_steps
    ),
    'teacher_momentum': schedules.cosine(*momentum, total_steps),
  }

  def rule(start_step: int) -> optax.GradientTransformation:
    """The optimiser whose own step 0 is the run's `start_step`."""
    decay = optax.add_decayed_weights(
      _shifted(rates['weight_decay'], start_step),
      mask=lambda tree: decay_mask(tree, settings.decay_exclude),
    )
    rate = optax.scale_by_learning_rate(_shifted(rates['learning_rate'], start_step))
    return optax.chain(*_RULES[settings.name](settings, decay), rate)

  late = round(settings.freeze_last_layer_epochs * steps_per_epoch)
  groups = {'now': rule(0), 'late': delayed(rule(late), late)}
  links = [_CLIPS[settings.clip_by](settings.clip)] if settings.clip else []
  if settings.frozen:
    groups['frozen'] = optax.set_to_zero()
    links.insert(0, without_frozen(settings.frozen))
  links.append(optax.partition(groups, lambda params: _labels(params, settings.frozen)))
  if settings.layer_decay != 1:
    links.append(scale_by_layer(settings.layer_decay))
  if teacher_parts:
    links.append(ema_teacher(rates['teacher_momentum'], teacher_parts))
  else:
    del rates['teacher_momentum']
  return optax.with_extra_args_support(optax.chain(*links)), rates


def without_update(before: Any, after: Any) -> Any:
  """The state after a step whose update is not made: moments, their bias correction and the teacher as `before`.

  The schedules' positions are those of `after`: they say where the run is, as its step does, so that a skipped step
  shifts no schedule and what is logged beside it is what is applied.

  Args:
    before: the optax state before the step.
    after: the one that the update returned, which was not finite.

  Returns:
    An optax state.
  """

  def choose(path, old, new):
    is_position = path and _name(path[-1]) == 'count' and jnp.issubdtype(new.dtype, jnp.integer)
    return new if is_position else old

  def stay(path, old, new):
    # Adam's own count is of updates made: it corrects the bias of the moments beside it.
    return old if isinstance(old, optax.ScaleByAdamState) else choose(path, old, new)

  return jax.tree.map_with_path(
    stay, before, after, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
  )


def _shifted(schedule: optax.Schedule, start_step: int) -> optax.Schedule:
  return lambda count: schedule(count + start_step)


def _labels(params: Any, frozen: tuple[str, ...]) -> Any:
  """'frozen' for the trees so named, 'late' for the projection head's last layer, 'now' for everything else."""

  def label(path, _):
    names = [_name(entry) for entry in path]
    return 'frozen' if names[0] in frozen else 'late' if 'last_layer' in names else 'now'

  return jax.tree.map_with_path(label, params)


def _is_stacked(path: tuple[Any, ...]) -> bool:
  return _STACKED in map(_name, path)


def _name(entry: Any) -> str:
  return str(getattr(entry, 'key', getattr(entry, 'name', entry)))
