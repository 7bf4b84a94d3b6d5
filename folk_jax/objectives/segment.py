"""Semantic segmentation: a whole network is fine-tuned to name the class of every pixel.

Heads: a linear layer on the patch features, or UPerNet (arXiv 1807.10221) as BEiT (arXiv 2106.08254) and MAE (arXiv
2111.06377) use it on a ViT. Evaluation slides windows of the training crop's size over whole images.

Shape letters: B images, V views (one), H, W pixels, S side of a crop, C channels, D width, K classes; h, w positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError
from folk_jax.models import segmentation
from folk_jax.objectives import statistics
from folk_jax.objectives.base import (
  Batch,
  LossOutput,
  Params,
  Parts,
  encode,
  statistics_of,
  statistics_state,
)
from folk_jax.objectives.views import (
  DROP_PATH,
  MASK,
  augmented_normalised,
  fold,
  to_float,
  view_keys,
)
from folk_jax.signal import windows
from folk_jax.signal.augment import normalise
from folk_jax.signal.shard import over_batch


@dataclasses.dataclass(frozen=True)
class Segment:
  """Pixel cross-entropy, and mean intersection over union on whole images.

  Attributes:
    parts: backbone, one view, normalisation.
    head: 'linear' or 'upernet'.
    layers: numbers, from 0, of the blocks (of a ResNet: stages) that the head sees, after the final norm [D]; () for
      the last one (linear), or four evenly spaced ones (upernet).
    channels: of UPerNet's levels: 512 [C].
    dropout: of channels before UPerNet's classifiers: 0.1 [C].
    auxiliary_weight: of UPerNet's auxiliary loss: 0.4 [C]; 0 for none.
    classes: K.
    ignore: id of the pixels that don't count.
    stride: from window to window in evaluation, as a share of the window, in (0, 1]: 2/3 [C].
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit', 'resnet')
  teacher_parts: ClassVar[tuple[str, ...]] = ()

  parts: Parts
  head: str
  layers: tuple[int, ...]
  channels: int
  dropout: float
  auxiliary_weight: float
  classes: int
  ignore: int
  stride: float

  def __post_init__(self):
    if self.head not in HEADS:
      raise UserError(f'unknown config.objective.head {self.head!r}. Known: {", ".join(HEADS)}.')
    if self.parts.has_teacher or len(self.parts.augmentations) != 1:
      raise UserError(
        f'segmentation trains on one view without a teacher; config has {len(self.parts.augmentations)} views and '
        f'teacher.enabled {self.parts.has_teacher}.'
      )
    if self.parts.classes and self.parts.classes != self.classes:
      raise UserError(
        f'config.objective.classes is {self.classes} and the data have {self.parts.classes}: set both, '
        'config.objective.classes and config.data.masks.classes.'
      )
    if not 2 <= self.classes <= self.ignore <= 255:
      raise UserError(
        f'config.objective has classes {self.classes} and ignore {self.ignore}; give 2 <= classes <= ignore <= 255.'
      )
    if not 0 < self.stride <= 1:
      raise UserError(f'config.objective.stride {self.stride} must be a share in (0, 1].')
    if not 0 <= self.dropout < 1 or self.auxiliary_weight < 0 or self.channels < 1:
      raise UserError(
        f'config.objective has dropout {self.dropout}, auxiliary_weight {self.auxiliary_weight} and channels '
        f'{self.channels}; give a dropout in [0, 1), a weight of 0 or more, and channels.'
      )
    if any(not 0 <= layer < self._depth for layer in self.layers):
      raise UserError(
        f'config.objective.layers {self.layers}: the {self.parts.model} has the layers 0..{self._depth - 1}.'
      )
    if self.layers and self.head == 'upernet' and len(self.layers) != segmentation.LEVELS:
      raise UserError(
        f'config.objective.layers {self.layers}: upernet takes {segmentation.LEVELS}, or () for evenly spaced ones.'
      )

  @property
  def _is_pyramid(self) -> bool:
    """Whether the backbone's layers are maps of falling size already: a ResNet's stages are."""
    return self.parts.model == 'resnet'

  @property
  def _depth(self) -> int:
    return segmentation.LEVELS if self._is_pyramid else self.parts.backbone.depth

  @functools.cached_property
  def _head(self) -> Any:
    return HEADS[self.head](self)

  @functools.cached_property
  def _layers(self) -> tuple[int, ...]:
    evenly = {
      'linear': (self._depth - 1,),
      'upernet': segmentation.pyramid_layers(self._depth),
    }
    return self.layers or evenly[self.head]

  @property
  def window_stride(self) -> int:
    """Pixels from window to window in evaluation."""
    return max(1, round(self.stride * self.parts.image_size))

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh parameters {backbone, head}. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    backbone_rng, head_rng = jax.random.split(rng)
    _, backbone, moments = self.parts.init_backbone(backbone_rng)
    image_1HWC = jnp.zeros((1, self.parts.image_size, self.parts.image_size, 3))
    maps = jax.eval_shape(
      lambda: self._maps(self.parts.encode(backbone, moments, image_1HWC, **self._encoding)[0])
    )
    maps = jax.tree.map(lambda map_1hwD: jnp.zeros(map_1hwD.shape, map_1hwD.dtype), maps)
    params = {'backbone': backbone, 'head': self._head.init(head_rng, maps)['params']}
    # [D] Training shows clean images: its own statistics are judged, not others of padded canvases.
    extra = statistics_state(self.parts, moments, runs_teacher=False)
    return params, extra | ({'clean_stats': {}} if extra else {})

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """Cross-entropy over a crop's pixels. See `Objective.loss`.

    As in mmseg, the sum over the labelled pixels is divided by all pixels of the crop: a crop counts by how much of it
    is labelled, and the mean over crops is that over microbatches.
    """
    del teacher, step
    chex.assert_equal_shape_prefix((batch['views'], batch['mask']), 4)
    keys_BV = view_keys(rng, batch['index'], batch['views'].shape[1])
    # 1. The view; its mask was cut with it.
    image_BHWC = over_batch(
      functools.partial(augmented_normalised, self.parts), batch['views'], keys_BV
    )
    mask_BHW = batch['mask'][:, 0]
    # 2. The features of the chosen layers, and the scores at their size.
    drop_keys_B = fold(keys_BV, DROP_PATH)[:, 0]
    output, extra = encode(
      self.parts, 'student', params, extra, image_BHWC, drop_keys_B, **self._encoding
    )
    channel_keys_B = fold(keys_BV, MASK)[:, 0]
    found = self._head.apply({'params': params['head']}, self._maps(output), channel_keys_B)
    # 3. Scores at the size of the mask, and their cross-entropy.
    logits_BHWK, auxiliary_BHWK = (
      scores if scores is None else segmentation.resize(scores, *mask_BHW.shape[1:])
      for scores in found
    )
    loss, metrics = pixel_loss(logits_BHWK, mask_BHW, self.classes), {}
    if auxiliary_BHWK is not None:
      auxiliary = pixel_loss(auxiliary_BHWK, mask_BHW, self.classes)
      metrics = {'loss_segmentation': loss, 'loss_auxiliary': auxiliary}
      loss = loss + self.auxiliary_weight * auxiliary
    counts_BHW = mask_BHW < self.classes
    right_BHW = counts_BHW & (jnp.argmax(logits_BHWK, axis=-1) == mask_BHW)
    right, counted = (jnp.sum(x, dtype=jnp.float32) for x in (right_BHW, counts_BHW))
    metrics |= {'loss': loss, 'pixel_accuracy': right / jnp.maximum(counted, 1.0)}
    metrics |= statistics.feature_statistics(output.pooled)
    return LossOutput(loss=loss, metrics=metrics, extra=extra)

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """`count`, and the int32 [K, K] `confusion` of the valid images' pixels. See `Objective.evaluate`."""
    del teacher, rng
    guess_BHW = self.predict(params, extra, batch['views'][:, 0])
    mask_BHW, valid_B = batch['mask'][:, 0], batch['valid']
    return {
      'count': jnp.sum(valid_B.astype(jnp.float32)),
      'confusion': windows.confusion(guess_BHW, mask_BHW, valid_B, self.classes),
    }

  def finish(self, totals: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`signal.windows.scores` of the whole set's confusion: the mean of images' IoUs would be another number."""
    return windows.scores(totals['confusion'])

  def predict(self, params: Params, extra: Any, image_BHWC: jax.Array) -> jax.Array:
    """Classes of whole images, by sliding windows whose scores are averaged.

    Args:
      params: {backbone, head}.
      extra: the objective's state; it holds BatchNorm's statistics, if there are any.
      image_BHWC: uint8, each side at least the crop's.

    Returns:
      int32 [B, H, W] in [0, K).
    """
    side = self.parts.image_size
    network = statistics_of(extra, 'student')
    image_BHWC = normalise(to_float(image_BHWC), self.parts.mean, self.parts.std)

    def window_logits(image_BSSC):
      output, _ = self.parts.encode(params['backbone'], network, image_BSSC, **self._encoding)
      logits_BhwK, _ = self._head.apply({'params': params['head']}, self._maps(output))
      return segmentation.resize(logits_BhwK, side, side)

    logits_BHWK = windows.slide(window_logits, image_BHWC, side, self.window_stride)
    return jnp.argmax(logits_BHWK, axis=-1).astype(jnp.int32)

  @property
  def _encoding(self) -> dict[str, Any]:
    return {'layers': tuple(sorted(set(self._layers))), 'normalise_layers': True}

  def _maps(self, output: Any) -> tuple[jax.Array, ...]:
    return tuple(output.layers[layer][1] for layer in self._layers)


def _linear(objective: Segment) -> segmentation.LinearHead:
  return segmentation.LinearHead(objective.classes, objective.parts.dtype)


def _upernet(objective: Segment) -> segmentation.UPerNet:
  return segmentation.UPerNet(
    classes=objective.classes,
    channels=objective.channels,
    factors=() if objective._is_pyramid else segmentation.factors(objective.parts.patch),
    dropout=objective.dropout,
    auxiliary=objective.auxiliary_weight > 0,
    dtype=objective.parts.dtype,
  )


HEADS: dict[str, Callable[[Segment], Any]] = {'linear': _linear, 'upernet': _upernet}


def pixel_loss(logits_BHWK: jax.Array, mask_BHW: jax.Array, classes: int) -> jax.Array:
  """Cross-entropy summed over the labelled pixels, over the number of all pixels.

  Args:
    logits_BHWK: float32.
    mask_BHW: integers; what is K or more isn't labelled.
    classes: K.

  Returns:
    float32 scalar.
  """
  chex.assert_shape(logits_BHWK, (*mask_BHW.shape, classes))
  # A product with zeros and ones: its gradient is one too, where a gather's would be a scatter.
  truth_BHWK = jax.nn.one_hot(mask_BHW, classes, dtype=jnp.float32)  # A row of zeros for K or more.
  return -jnp.mean(jnp.sum(truth_BHWK * jax.nn.log_softmax(logits_BHWK), axis=-1))
