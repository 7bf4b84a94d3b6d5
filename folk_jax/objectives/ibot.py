"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., ICLR 2022, arXiv 2111.07832).

DINO's class-token loss across views, and on each view's masked patch tokens the teacher's answer for the same tokens
of the unmasked view. One projection head serves both kinds of token.

Shape letters: B images, V global views, N = B*V views in a row, H, W pixels, h, w patches a side, C channels, D width,
T patches, S of them that may be masked, K prototypes.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.objectives import statistics
from folk_jax.objectives.base import (
  Batch,
  LossOutput,
  Params,
  Parts,
  count_valid,
  encode,
  from_fields,
  statistics_state,
)
from folk_jax.objectives.dino import by_image, local_logits
from folk_jax.objectives.distillation import Distillation
from folk_jax.objectives.views import DROP_PATH, MASK, augmented_normalised, fold, view_keys
from folk_jax.signal import patch_masks
from folk_jax.signal.shard import over_batch


@dataclasses.dataclass(frozen=True)
class Ibot:
  """iBOT's objective. Fields are those of `config.objective`, all [C].

  Attributes:
    parts: backbone, head, views, normalisation.
    mask_probability: share of the views that are masked at all, in (0, 1]: 0.5.
    mask_ratio: mean share of a masked view's patches: 0.3.
    mask_ratio_spread: the share is drawn uniformly from mask_ratio -+ this: 0.2.
    patch_weight: weight of the patch loss beside the class loss: 1.
    student_temperature, teacher_temperature, teacher_temperature_start, teacher_temperature_epochs, centre_momentum:
      as in `Distillation`, for both losses.
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit',)
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone', 'projection')

  parts: Parts
  mask_probability: float
  mask_ratio: float
  mask_ratio_spread: float
  patch_weight: float
  student_temperature: float
  teacher_temperature: float
  teacher_temperature_start: float
  teacher_temperature_epochs: float
  centre_momentum: float

  def __post_init__(self):
    low, high = self._ratios
    if not 0 < low <= high < 1:
      raise UserError(
        f'config.objective.mask_ratio {self.mask_ratio} -+ mask_ratio_spread {self.mask_ratio_spread} must lie '
        'between 0 and 1.'
      )
    if not 0 < self.mask_probability <= 1:
      raise UserError(
        f'config.objective.mask_probability {self.mask_probability} must be above 0 and at most 1.'
      )
    if not self.patch_weight > 0:
      raise UserError(
        f'config.objective.patch_weight {self.patch_weight} must be positive: without it, iBOT is dino.'
      )
    self._distillation.check_run('', views=2)

  @property
  def _ratios(self) -> tuple[float, float]:
    return self.mask_ratio - self.mask_ratio_spread, self.mask_ratio + self.mask_ratio_spread

  @functools.cached_property
  def _distillation(self) -> Distillation:
    return from_fields(Distillation, self)

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh student parameters {backbone, projection, mask_token} and the centres, zero. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    keys = jax.random.split(rng)
    output, backbone, moments = self.parts.init_backbone(keys[0])
    projection, centre_K = self._distillation.init(keys[1], output)
    extra = statistics_state(self.parts, moments, runs_teacher=True)
    extra |= {'centre': centre_K, 'patch_centre': jnp.zeros_like(centre_K)}
    mask_token_D = jnp.zeros(output.patches.shape[-1:])  # As the reference's `masked_embed`.
    return {'backbone': backbone, 'projection': projection, 'mask_token': mask_token_D}, extra

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """iBOT's loss on one batch (equations 2 and 3). See `Objective.loss`."""
    distillation = self._distillation
    views = batch['views'].shape[1]
    keys_BV = view_keys(rng, batch['index'], views)

    # 1. The student sees each view with blocks of patches replaced by its mask token, the teacher all of it.
    image_NHWC, mask_Nhw, masked_NS = over_batch(self._views, batch['views'], keys_BV)
    student, extra = encode(
      self.parts,
      'student',
      params,
      extra,
      image_NHWC,
      fold(keys_BV, DROP_PATH).reshape(-1),
      mask_Nhw=mask_Nhw,
      mask_token_D=params['mask_token'],
    )
    seen, extra = encode(self.parts, 'teacher', teacher, extra, image_NHWC)
    student_BVK = by_image(distillation.logits(params, student.pooled), views)
    teacher_BQK = by_image(distillation.logits(teacher, seen.pooled), views)
    if self.parts.local_views:
      local_BLK, extra = local_logits(distillation, params, extra, batch, rng)
      student_BVK = jnp.concatenate([student_BVK, local_BLK], axis=1)

    # 2. L_[CLS]: across views (equation 3).
    class_loss, alive, centre_K = distillation.class_loss(
      student_BVK, teacher_BQK, extra['centre'], step
    )
    # 3. L_MIM: the same view, masked patches only (equation 2).
    mask_NT = mask_Nhw.reshape(len(mask_Nhw), -1)
    tokens = tuple(
      output.patches.reshape(*mask_NT.shape, output.patches.shape[-1]) for output in (student, seen)
    )
    masked = masked_NS, jnp.take_along_axis(mask_NT, masked_NS, axis=1)
    patch_loss, patch_centre_K = distillation.patch_loss(
      params, teacher, tokens, views, extra['patch_centre'], step, masked
    )
    loss = class_loss + self.patch_weight * patch_loss
    metrics = {'loss': loss, 'loss_distillation': class_loss, 'loss_patch': patch_loss}
    metrics |= alive | statistics.feature_statistics(seen.pooled)
    extra |= {'centre': centre_K, 'patch_centre': patch_centre_K}
    return LossOutput(loss=loss, metrics=metrics, extra=extra)

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Nothing is rebuilt that could be measured. See `Objective.evaluate`."""
    del params, teacher, extra, rng
    return count_valid(batch)

  def _views(
    self, view_BVHWC: jax.Array, keys_BV: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised images [N, H, W, C], their masks, bool [N, h, w], and the masked patches' numbers first [N, S]."""
    grid = (self.parts.image_size // self.parts.patch,) * 2
    mask_Nhw = patch_masks.block_masks(
      fold(keys_BV, MASK).reshape(-1), grid, self.mask_probability, self._ratios
    )
    masked_NS = patch_masks.masked_first(mask_Nhw, self._ratios[1])
    return augmented_normalised(self.parts, view_BVHWC, keys_BV), mask_Nhw, masked_NS
