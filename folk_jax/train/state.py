"""What a run carries from step to step, and nothing else: this is what a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
  """The state of a run.

  Attributes:
    step: int32 scalar, optimiser steps done.
    params: float32 trees by name: `backbone`, and a head each.
    opt_state: the optax state; its last link holds the EMA teacher (`teacher_of`).
    extra: the objective's own state (centres, BatchNorm's statistics: `objectives.base.statistics_state`).
  """

  step: jax.Array
  params: dict[str, Any]
  opt_state: Any
  extra: Any


def create(
  params: dict[str, Any], extra: Any, optimizer: optax.GradientTransformation
) -> TrainState:
  """A state at step 0 for fresh or imported parameters."""
  return TrainState(
    step=jnp.zeros([], jnp.int32), params=params, opt_state=optimizer.init(params), extra=extra
  )


def teacher_of(state: TrainState) -> dict[str, Any] | None:
  """The EMA teacher's trees, or None where the run keeps no teacher."""
  return optax.tree.get(state.opt_state, 'teacher', None)


def weights(state: TrainState, which: str) -> dict[str, Any]:
  """Parameters for evaluation: the student's, with the teacher's in place of those it mirrors if `which` asks so."""
  teacher = teacher_of(state) if which == 'teacher' else None
  return dict(state.params) | dict(teacher or {})


def statistics(state: TrainState, which: str) -> Any:
  """BatchNorm's statistics that fit clean images: recalibrated ones, or of a network that saw clean images in training.

  Returns:
    A tree; {} where the backbone has none.
  """
  if 'batch_stats' not in state.extra:
    return {}
  return {**state.extra['batch_stats'], **state.extra['clean_stats']}[which]
