"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, arXiv 2104.14294).

A student sees all views of an image, its EMA teacher the global ones; from each view the student predicts what the
teacher says of the others. Two global views; local crops are an option (`config.local_views`).

Shape letters: B images, V global views, L local views, N = B*V views in a row, H, W pixels, C channels, K prototypes.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

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
from folk_jax.objectives.distillation import Distillation
from folk_jax.objectives.views import (
  DROP_PATH,
  augmented_local,
  augmented_normalised,
  fold,
  view_keys,
)
from folk_jax.signal.shard import over_batch


@dataclasses.dataclass(frozen=True)
class Dino:
  """DINO's objective. Fields are those of `config.objective`, all [C]; see `Distillation` for each.

  Attributes:
    parts: backbone, head, views, normalisation.
    student_temperature, teacher_temperature, teacher_temperature_start, teacher_temperature_epochs, centre_momentum:
      as in `Distillation`.
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit', 'resnet')
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone', 'projection')

  parts: Parts
  student_temperature: float
  teacher_temperature: float
  teacher_temperature_start: float
  teacher_temperature_epochs: float
  centre_momentum: float

  def __post_init__(self):
    self._distillation.check_run('', views=2)

  @functools.cached_property
  def _distillation(self) -> Distillation:
    return from_fields(Distillation, self)

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh student parameters {backbone, projection} and the centre, zero. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    keys = jax.random.split(rng)
    output, backbone, moments = self.parts.init_backbone(keys[0])
    projection, centre_K = self._distillation.init(keys[1], output)
    extra = statistics_state(self.parts, moments, runs_teacher=True) | {'centre': centre_K}
    return {'backbone': backbone, 'projection': projection}, extra

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """DINO's loss on one batch (equations 1 to 4). See `Objective.loss`."""
    distillation, views = self._distillation, batch['views'].shape[1]
    keys_BV = view_keys(rng, batch['index'], views)

    # 1. The global views go through both networks, and no gradient through the teacher.
    image_NHWC = over_batch(
      functools.partial(augmented_normalised, self.parts), batch['views'], keys_BV
    )
    drop_keys_N = fold(keys_BV, DROP_PATH).reshape(-1)
    student, extra = encode(
      self.parts, 'student', params, extra, image_NHWC, drop_keys_N, patches=False
    )
    seen, extra = encode(self.parts, 'teacher', teacher, extra, image_NHWC, patches=False)
    student_BVK = by_image(distillation.logits(params, student.pooled), views)
    teacher_BQK = by_image(distillation.logits(teacher, seen.pooled), views)

    # 2. The local views go through the student alone.
    if self.parts.local_views:
      local_BLK, extra = local_logits(distillation, params, extra, batch, rng)
      student_BVK = jnp.concatenate([student_BVK, local_BLK], axis=1)

    # 3. Cross-entropy over the pairs of different views (equation 3); the centre moves (equation 4).
    loss, alive, centre_K = distillation.class_loss(student_BVK, teacher_BQK, extra['centre'], step)
    metrics = {'loss': loss, 'loss_distillation': loss}
    metrics |= alive | statistics.feature_statistics(seen.pooled)
    return LossOutput(loss=loss, metrics=metrics, extra=extra | {'centre': centre_K})

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Nothing is rebuilt that could be measured. See `Objective.evaluate`."""
    del params, teacher, extra, rng
    return count_valid(batch)


def by_image(logits_NK: jax.Array, views: int) -> jax.Array:
  """Rows ordered (image, view) to [B, V, K]."""
  return logits_NK.reshape(-1, views, logits_NK.shape[-1])


def local_logits(
  distillation: Distillation, params: Params, extra: Any, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, Any]:
  """The student's logits [B, L, K] of the local views, and `extra` with its statistics brought up to date.

  Local views are numbered after the global ones, so that no two views of an image share a key.
  """
  parts, views = distillation.parts, batch['views'].shape[1]
  count = parts.local_views.count
  keys_BL = view_keys(rng, batch['index'], views + count)[:, views:]
  image_NhwC = over_batch(functools.partial(augmented_local, parts), batch['local_views'], keys_BL)
  drop_keys_N = fold(keys_BL, DROP_PATH).reshape(-1)
  output, extra = encode(parts, 'student', params, extra, image_NhwC, drop_keys_N, patches=False)
  return by_image(distillation.logits(params, output.pooled), count), extra
