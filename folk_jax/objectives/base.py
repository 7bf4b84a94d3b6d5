"""The contract of an objective: what is corrupted, what is predicted, which losses. Everything else is shared.

An objective is a frozen dataclass, pure and jittable, without I/O. To add one: a file here, a line in `OBJECTIVES`
(`__init__.py`) and a test file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import struct

from folk_jax.signal.augment import Augmentation

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


@struct.dataclass
class LossOutput:
  """What one evaluation of an objective returns.

  Attributes:
    loss: float32 scalar, the mean over the batch's images.
    metrics: float32 scalars by name, averaged over microbatches and logged as `train/<name>`.
    extra: the objective's own state after this batch (a centre, batch statistics), as `init` laid it out. It must be
      affine in the batch mean, so that the mean over microbatches is what the whole batch would have given.
  """

  loss: jax.Array
  metrics: dict[str, jax.Array]
  extra: Any


class Objective(Protocol):
  """A pre-training (or fine-tuning) method.

  `params` is a dict of parameter trees with the key `backbone` and one key a head. `teacher` holds the trees named by
  `teacher_parts` (an EMA of the student's), or None where the run keeps no teacher.
  """

  parts: 'Parts'  # What it was built from.
  teacher_parts: tuple[str, ...]  # Top-level keys of `params` that the teacher mirrors.

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh `(params, extra)`; `batch` may be abstract (shapes and dtypes only)."""
    ...

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """The loss on one batch; `rng` is this step's key, the same on every device and for every microbatch."""
    ...

  def evaluate(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Sums over a held-out batch's valid images, `count` their number; reported as `eval/<name>` = sum / count."""
    ...


@dataclasses.dataclass(frozen=True)
class Parts:
  """What every objective is built from, besides its own fields.

  Attributes:
    backbone: the Flax module that student and teacher share; it returns a `BackboneOutput`.
    image_size: side of a view in pixels.
    patch: side of a patch in pixels (the backbone's stride).
    projection: fields of `ProjectionHead`.
    augmentations: one a view, in the order of the batch's view axis.
    mean, std: per-channel normalisation of images in [0, 1].
    steps_per_epoch: optimiser steps an epoch, for schedules that count epochs.
    has_teacher: whether the run keeps an EMA teacher.
    dtype: compute type of heads, 'float32' or 'bfloat16'.
  """

  backbone: Any
  image_size: int
  patch: int
  projection: Mapping[str, Any]
  augmentations: tuple[Augmentation, ...]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  steps_per_epoch: float
  has_teacher: bool
  dtype: str


Builder = Callable[..., Objective]


def sample_keys(rng: jax.Array, index: jax.Array, view: int) -> jax.Array:
  """One key a sample: keyed on (step's rng, the sample's number in the data set, view), never on its place in a batch.

  Args:
    rng: a typed key, this step's.
    index: int [B].
    view: the view's number.

  Returns:
    A key array [B].
  """
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(rng, i), view))(index)
