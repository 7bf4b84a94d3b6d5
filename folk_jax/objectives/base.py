"""The contract of an objective: what is corrupted, what is predicted, which losses. Everything else is shared.

An objective is a frozen dataclass, pure and jittable, without I/O. docs/adding_an_objective.md adds one step by step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from folk_jax import models
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
      affine in the batch mean, so that the mean over microbatches is what the whole batch would have given. (The
      variances of a BatchNorm are those of the microbatches, as everywhere with accumulation.)
  """

  loss: jax.Array
  metrics: dict[str, jax.Array]
  extra: Any


class Objective(Protocol):
  """A pre-training (or fine-tuning) method.

  `params` is a dict of parameter trees with the key `backbone` and one key a head. `teacher` holds the trees named by
  `teacher_parts` (an EMA of the student's), or None where the run keeps no teacher. One that trains on labels also says
  `needs_labels: ClassVar[bool] = True`: images without one are then refused by name.
  """

  backbones: ClassVar[tuple[str, ...]]  # Names of the backbones that it can train.
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

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Sums over a held-out batch's valid images, `count` their number; reported as `eval/<name>` = sum / count.

    `params` are the student's; an objective whose teacher is what is judged takes `teacher` where there is one. Sums
    may be arrays where the objective also has `finish(totals) -> scalars`, which then takes the place of
    `mean_over_count`: a mean of ratios is not the ratio of sums.
    """
    ...


@dataclasses.dataclass(frozen=True)
class LocalViews:
  """Small crops that the student sees beside the global views (DINO, arXiv 2104.14294, section 3.1).

  Attributes:
    count: how many an image.
    size: their side in pixels.
    augmentation: what is done to each of them.
  """

  count: int
  size: int
  augmentation: Augmentation


@dataclasses.dataclass(frozen=True)
class Parts:
  """What every objective is built from, besides its own fields.

  Attributes:
    backbone: the Flax module that student and teacher share; it returns a `BackboneOutput`.
    model: the backbone's name, a key of `models.BACKBONES`.
    image_size: side of a view in pixels.
    patch: pixels a side that a position of its feature map stands for (a ViT's patch, a ResNet's stride).
    projection: fields of `ProjectionHead`, or None where the run has none.
    augmentations: one a view, in the order of the batch's view axis.
    mean, std: per-channel normalisation of images in [0, 1].
    steps_per_epoch: optimiser steps an epoch, for schedules that count epochs.
    has_teacher: whether the run keeps an EMA teacher.
    dtype: compute type of heads, 'float32' or 'bfloat16'.
    local_views: small crops beside the views, or None.
    classes: of the data set's labels; 0 where there are none or the method needs none.
    spectral_backend: of Fourier transforms, a name in `signal.dft.BACKENDS`.
  """

  backbone: Any
  model: str
  image_size: int
  patch: int
  projection: Mapping[str, Any] | None
  augmentations: tuple[Augmentation, ...]
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  steps_per_epoch: float
  has_teacher: bool
  dtype: str
  local_views: LocalViews | None = None
  classes: int = 0
  spectral_backend: str = 'fft'

  def init_backbone(self, rng: jax.Array) -> tuple[models.BackboneOutput, Any, Any]:
    """What the backbone returns for one image, its fresh parameters and its BatchNorm statistics ({} for none)."""
    image_1HWC = jnp.zeros((1, self.image_size, self.image_size, 3))
    output, variables = self.backbone.init_with_output(rng, image_1HWC)
    return output, variables['params'], variables.get('batch_stats', {})

  def encode(
    self,
    params: Any,
    statistics: Any,
    image_NHWC: jax.Array,
    sample_keys: jax.Array | None = None,
    train: bool = False,
    **options: Any,
  ) -> tuple[models.BackboneOutput, Any]:
    """`models.encode` with this backbone."""
    return models.encode(
      self.backbone, params, statistics, image_NHWC, sample_keys, train=train, **options
    )


def statistics_state(parts: Parts, statistics: Any, runs_teacher: bool) -> dict[str, Any]:
  """The part of `extra` that holds BatchNorm's running statistics; empty for a backbone without any.

  Args:
    parts: says whether the run keeps a teacher.
    statistics: of a fresh backbone.
    runs_teacher: whether the loss runs the teacher, which then has statistics of its own.

  Returns:
    `batch_stats`: by network ('student', 'teacher'), of what it saw in training; and `clean_stats`: the same for the
    networks that saw no clean image in training. Those the loop recalibrates on clean images before it evaluates or
    saves: statistics of filtered images don't fit unfiltered ones.
  """
  if not statistics:
    return {}
  trained, clean = ['student'], ['student']
  if parts.has_teacher:
    (trained if runs_teacher else clean).append('teacher')
  # Copies: leaves that share a buffer would be donated twice by the training step.
  return {
    'batch_stats': {name: jax.tree.map(jnp.copy, statistics) for name in trained},
    'clean_stats': {name: jax.tree.map(jnp.copy, statistics) for name in clean},
  }


def with_statistics(extra: dict[str, Any], statistics: Any) -> dict[str, Any]:
  """`extra` with imported statistics in place of every network's own."""
  return extra | {
    name: {network: jax.tree.map(jnp.array, statistics) for network in extra[name]}
    for name in ('batch_stats', 'clean_stats')
  }


def encode(
  parts: Parts,
  network: str,
  params: Params,
  extra: Mapping[str, Any],
  image_NHWC: jax.Array,
  sample_keys: jax.Array | None = None,
  **options: Any,
) -> tuple[models.BackboneOutput, dict[str, Any]]:
  """Runs a network in training: BatchNorm by the batch's own statistics, whose running means go into `extra`.

  Args:
    parts: holds the backbone.
    network: 'student' or 'teacher'.
    params: that network's, with the key `backbone`.
    extra: the objective's state.
    image_NHWC: normalised images.
    sample_keys: keys [N] for drop path, or None.
    **options: of the backbone's call.

  Returns:
    The backbone's output, and `extra` with that network's statistics brought up to date.
  """
  statistics = statistics_of(extra, network)
  with jax.named_scope(network):  # What a profile and the dry-run sort by, as everywhere.
    output, statistics = parts.encode(
      params['backbone'], statistics, image_NHWC, sample_keys, train=True, **options
    )
  extra = dict(extra)
  if statistics:
    extra['batch_stats'] = extra['batch_stats'] | {network: statistics}
  return output, extra


def statistics_of(extra: Mapping[str, Any], network: str) -> Any:
  """BatchNorm's running statistics of what `network` saw in training; {} for a backbone without any."""
  return extra['batch_stats'][network] if 'batch_stats' in extra else {}


def from_fields(kind: type, objective: Any, **given: Any) -> Any:
  """A component from those fields of an objective that it shares with it; `given` come beside them."""
  names = {field.name for field in dataclasses.fields(kind)} - given.keys()
  return kind(**{name: getattr(objective, name) for name in names}, **given)


def mean_over_count(totals: Mapping[str, Any]) -> dict[str, Any]:
  """Sums over all held-out batches to means over images: what is reported unless an objective has a `finish`."""
  count = max(totals['count'], 1.0)
  return {name: total / count for name, total in totals.items() if name != 'count'}


def count_valid(batch: Batch) -> dict[str, jax.Array]:
  """What an objective answers to `evaluate` that has nothing to measure on held-out images."""
  return {'count': jnp.sum(batch['valid'].astype(jnp.float32))}


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
