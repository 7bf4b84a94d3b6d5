"""Supervised fine-tuning of a whole network, as MFM (arXiv 2206.07706) and BEiT (arXiv 2106.08254) do it.

Soft targets from mixup, CutMix and label smoothing, cross-entropy, and a linear classifier on the mean of the patch
tokens; without a pre-trained backbone (`config.init_from`) it is training from scratch. A teacher, where the run keeps
one, is the moving average of the weights, and is what is judged.

Where we differ from the reference [D]: it drops the backbone's final norm in favour of the head's; here the backbone
always applies its own, and the head's comes after the mean.

Shape letters: B images, V views (one), H, W pixels, C channels, D width, K classes.
"""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.models import BackboneOutput
from folk_jax.models.features import FEATURES, encode_options, feature
from folk_jax.models.norm import LAYER_NORM_EPSILON
from folk_jax.objectives import statistics
from folk_jax.objectives.base import (
  Batch,
  LossOutput,
  Params,
  Parts,
  encode,
  from_fields,
  statistics_state,
)
from folk_jax.objectives.views import (
  CORRUPT,
  DROP_PATH,
  augmented_normalised,
  fold,
  to_float,
  view_keys,
)
from folk_jax.signal.augment import normalise
from folk_jax.signal.mixing import Mixing, erase, mix, soft_targets
from folk_jax.signal.shard import over_batch

# The step's key folded with this is the batch's own; a sample's keys are folded twice.
_BATCH = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Supervised:
  """Cross-entropy with the labels of augmented, erased and mixed images.

  Attributes:
    parts: backbone, one view, normalisation, number of classes.
    pooling: what the classifier sees, one of `models.features`: 'mean_patch' [C]; 'pooled', the class token or a
      ResNet's average; 'concat', both.
    head_norm: whether a LayerNorm stands between pooling and classifier: yes for a ViT [C].
    head_scale: standard deviation of the classifier's fresh kernel over 0.02: 0.001 [C].
    label_smoothing: in [0, 1): 0.1 [C].
    mixup: a of mixup's Beta(a, a): 0.8 [C]; 0 for none.
    cutmix: the same for CutMix: 1.0 [C].
    mix_probability: that a batch is mixed: 1.0 [C].
    switch_probability: that CutMix is taken where both are on: 0.5 [C].
    erasing: probability that an image loses a rectangle: 0.25 [C].

  Raises:
    UserError: a field out of range, data without classes, or more than one view.
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit', 'resnet')
  needs_labels: ClassVar[bool] = True  # Of every image, in [0, K): others are refused by name.
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone', 'head')

  parts: Parts
  pooling: str
  head_norm: bool
  head_scale: float
  label_smoothing: float
  mixup: float
  cutmix: float
  mix_probability: float
  switch_probability: float
  erasing: float

  def __post_init__(self):
    _ = self._mixing  # Checks its fields.
    if self.parts.classes < 2:
      raise UserError(
        f'config.data has {self.parts.classes} labelled classes and supervised training needs 2 or more: give class '
        'folders (path/train/<class>/...) or a data set with labels.'
      )
    if len(self.parts.augmentations) != 1:
      raise UserError(
        f'config.views has {len(self.parts.augmentations)} views; supervised training takes 1.'
      )
    known = [name for name, how in FEATURES.items() if not how.last_blocks]
    if self.pooling not in known:
      raise UserError(
        f'unknown config.objective.pooling {self.pooling!r}. Known: {", ".join(known)}.'
      )
    if not 0 <= self.label_smoothing < 1:
      raise UserError(
        f'config.objective.label_smoothing {self.label_smoothing} must lie in [0, 1).'
      )
    if not 0 <= self.erasing <= 1:
      raise UserError(f'config.objective.erasing {self.erasing} must lie in [0, 1].')
    if not self.head_scale >= 0:
      raise UserError(f'config.objective.head_scale {self.head_scale} must not be negative.')

  @property
  def _mixing(self) -> Mixing:
    return from_fields(Mixing, self)

  @property
  def _read(self) -> dict[str, Any]:
    """What the backbone is asked for."""
    return encode_options(self.pooling, self.parts.backbone)

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh parameters {backbone, head}. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    backbone_rng, head_rng = jax.random.split(rng)
    output, backbone, moments = self.parts.init_backbone(backbone_rng)
    width = feature(output, self.pooling).shape[-1]
    shape = (width, self.parts.classes)
    head = {
      'kernel': 0.02 * self.head_scale * jax.random.normal(head_rng, shape),
      'bias': jnp.zeros(self.parts.classes),
    }
    if self.head_norm:
      head['norm'] = {'scale': jnp.ones(width), 'bias': jnp.zeros(width)}
    params = {'backbone': backbone, 'head': head}
    return params, statistics_state(self.parts, moments, runs_teacher=False)

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """Cross-entropy with soft targets. See `Objective.loss`.

    A label outside [0, K) makes the loss NaN, at which the run's guard stops: it is never trained on as another class.
    """
    del teacher, step  # A moving average may be kept to be judged; the loss needs none.
    keys_BV = view_keys(rng, batch['index'], batch['views'].shape[1])
    chex.assert_axis_dimension(keys_BV, 1, 1)

    # 1. The view: augmented, erased, mixed with its neighbour's, as its target is.
    image_BHWC, target_BK = over_batch(
      self._inputs,
      batch['views'],
      keys_BV,
      batch['label'],
      replicated=(jax.random.fold_in(rng, _BATCH),),
    )
    # 2. The network's guess.
    drop_keys_B = fold(keys_BV, DROP_PATH)[:, 0]
    output, extra = encode(
      self.parts, 'student', params, extra, image_BHWC, drop_keys_B, **self._read
    )
    logits_BK = self.head_logits(params, output)
    # 3. Cross-entropy, averaged over images.
    loss = -jnp.mean(jnp.sum(target_BK * jax.nn.log_softmax(logits_BK), axis=1))
    # Of a mixed image the heavier label is the right one.
    right_B = jnp.argmax(logits_BK, axis=1) == jnp.argmax(target_BK, axis=1)
    metrics = {'loss': loss, 'right': jnp.mean(right_B, dtype=jnp.float32)}
    metrics |= statistics.feature_statistics(feature(output, self.pooling))
    return LossOutput(loss=loss, metrics=metrics, extra=extra)

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Sums of top1, top5 and loss over the valid rows of a held-out batch; of the teacher where there is one.

    An unlabelled valid row makes them NaN: no number is better than a wrong one. See `Objective.evaluate`.
    """
    del rng
    judged = params if teacher is None else dict(params) | dict(teacher)
    network = 'student' if teacher is None else 'teacher'
    image_BHWC = normalise(to_float(batch['views'][:, 0]), self.parts.mean, self.parts.std)
    logits_BK = self.logits(judged, evaluation_statistics(extra, network), image_BHWC)
    label_B, valid_B = batch['label'], batch['valid']
    target_BK = soft_targets(label_B, self.parts.classes, 0.0)
    loss_B = -jnp.sum(target_BK * jax.nn.log_softmax(logits_BK), axis=1)
    rank_B = jnp.where(jnp.isnan(loss_B), jnp.nan, ranks(logits_BK, label_B))
    values = {
      'top1': jnp.where(jnp.isnan(rank_B), jnp.nan, rank_B < 1),
      'top5': jnp.where(jnp.isnan(rank_B), jnp.nan, rank_B < 5),
      'loss': loss_B,
      'count': jnp.ones_like(loss_B),
    }
    return {name: jnp.sum(jnp.where(valid_B, value, 0.0)) for name, value in values.items()}

  def logits(self, params: Params, network_statistics: Any, image_NHWC: jax.Array) -> jax.Array:
    """What the fine-tuned network says of normalised images, without drop path: float32 [N, K].

    Args:
      params: with `backbone` and `head`: the student's, or the teacher's.
      network_statistics: that network's of BatchNorm (`evaluation_statistics`); {} for a ViT.
      image_NHWC: float32, normalised.
    """
    output, _ = self.parts.encode(params['backbone'], network_statistics, image_NHWC, **self._read)
    return self.head_logits(params, output)

  def head_logits(self, params: Params, output: BackboneOutput) -> jax.Array:
    """The classifier on what the backbone returned: float32 [N, K]."""
    feature_ND = feature(output, self.pooling)
    head = params['head']
    if self.head_norm:
      centred_ND = feature_ND - jnp.mean(feature_ND, axis=1, keepdims=True)
      variance_N1 = jnp.mean(jnp.square(centred_ND), axis=1, keepdims=True)
      feature_ND = centred_ND * jax.lax.rsqrt(variance_N1 + LAYER_NORM_EPSILON)
      feature_ND = feature_ND * head['norm']['scale'] + head['norm']['bias']
    return feature_ND @ head['kernel'] + head['bias']

  def _inputs(
    self, view_BVHWC: jax.Array, keys_BV: jax.Array, label_B: jax.Array, batch_key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Images as the network sees them, and their targets, [B, H, W, C] and [B, K]."""
    image_BHWC = augmented_normalised(self.parts, view_BVHWC, keys_BV)
    image_BHWC = erase(image_BHWC, fold(keys_BV, CORRUPT)[:, 0], self.erasing)
    target_BK = soft_targets(label_B, self.parts.classes, self.label_smoothing)
    if not self._mixing.acts:
      return image_BHWC, target_BK
    return mix(image_BHWC, target_BK, batch_key, self._mixing)


def ranks(logits_BK: jax.Array, label_B: jax.Array) -> jax.Array:
  """How many classes are put before the right one; top-k counts ranks below k.

  Of equal logits the class of the lower number comes first, so that a constant guess is right once in K. Beside a NaN
  a class comes last.

  Args:
    logits_BK: float.
    label_B: integers in [0, K).

  Returns:
    int32 [B] in [0, K].
  """
  chex.assert_rank([logits_BK, label_B], [2, 1])
  right_B1 = jnp.take_along_axis(logits_BK, label_B[:, None], axis=1)
  earlier_BK = jnp.arange(logits_BK.shape[1]) < label_B[:, None]
  # Not "greater": nothing is greater than NaN.
  before_BK = ~(logits_BK <= right_B1) | (earlier_BK & (logits_BK == right_B1))
  return jnp.sum(before_BK, axis=1, dtype=jnp.int32)


def evaluation_statistics(extra: Any, network: str) -> Any:
  """BatchNorm's statistics that `network` is judged with; {} for a backbone without any.

  [D] Recalibrated ones (`clean_stats`) where the state has them: those of training are of mixed and erased images, and
  a moving average of weights has none of its own.
  """
  return {**extra.get('batch_stats', {}), **extra.get('clean_stats', {})}.get(network, {})
