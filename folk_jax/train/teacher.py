"""The EMA teacher, as the last link of an optax chain: it lives, is checkpointed and is sharded with the optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class EmaTeacherState(NamedTuple):
  """State of `ema_teacher`.

  Attributes:
    count: int32 scalar, optimiser steps so far.
    teacher: float32 trees by name, a subset of the parameters' top-level keys; found by `optax.tree.get`.
  """

  count: jax.Array
  teacher: dict[str, Any]


def ema_teacher(
  momentum: Callable[[jax.Array], jax.Array], parts: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """Passes updates through and keeps teacher = m * teacher + (1 - m) * (parameters + updates).

  It stands last, where `updates` is what will really be added, and inside gradient accumulation, so that it moves
  once per optimiser step (DINO, arXiv 2104.14294, section 3.1; FOLK, arXiv 2409.10362).

  Args:
    momentum: m as a function of the step, in [0, 1].
    parts: the top-level keys of the parameters that the teacher mirrors.

  Returns:
    A transformation whose state is an `EmaTeacherState`; the teacher starts as a copy of the student.
  """

  def init(params):
    # A copy: student and teacher that share buffers would be donated twice by the training step.
    teacher = {part: jax.tree.map(_float32_copy, params[part]) for part in parts}
    return EmaTeacherState(count=jnp.zeros([], jnp.int32), teacher=teacher)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError('ema_teacher averages the params: update needs them as its third argument')
    m = momentum(state.count)
    student = optax.apply_updates(
      {part: params[part] for part in parts}, {part: updates[part] for part in parts}
    )
    teacher = jax.tree.map(
      lambda t, s: m * t + (1 - m) * s.astype(jnp.float32), state.teacher, student
    )
    return updates, EmaTeacherState(count=optax.safe_increment(state.count), teacher=teacher)

  return optax.GradientTransformationExtraArgs(init, update)


def _float32_copy(x: jax.Array) -> jax.Array:
  return jnp.array(x, dtype=jnp.float32, copy=True)
