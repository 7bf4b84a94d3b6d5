"""Predicting what the teacher says: the half that FOLK, DINO and iBOT share.

Shape letters: B images, V student views, Q teacher views, N = B*V rows, T patch tokens, S of them masked, D features,
E bottleneck, K prototypes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from folk_jax import schedules
from folk_jax.errors import UserError
from folk_jax.models import BackboneOutput, ProjectionHead, select
from folk_jax.objectives import losses
from folk_jax.objectives.base import Params, Parts


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Self-distillation with centring and sharpening (DINO, arXiv 2104.14294, section 3.1).

  Attributes:
    parts: backbone, projection head.
    student_temperature: positive.
    teacher_temperature: positive, reached after the ramp.
    teacher_temperature_start: positive, where the ramp begins.
    teacher_temperature_epochs: length of the linear ramp, not negative.
    centre_momentum: of the centres, in [0, 1].
  """

  parts: Parts
  student_temperature: float
  teacher_temperature: float
  teacher_temperature_start: float
  teacher_temperature_epochs: float
  centre_momentum: float

  def __post_init__(self):
    for field in ('student_temperature', 'teacher_temperature', 'teacher_temperature_start'):
      if not getattr(self, field) > 0:
        raise UserError(f'config.objective.{field} {getattr(self, field)} must be positive.')
    if not self.teacher_temperature_epochs >= 0:
      raise UserError(
        f'config.objective.teacher_temperature_epochs {self.teacher_temperature_epochs} must not be negative.'
      )
    if not 0 <= self.centre_momentum <= 1:
      raise UserError(
        f'config.objective.centre_momentum {self.centre_momentum} must be between 0 and 1.'
      )

  def check_run(self, weights: str, views: int) -> None:
    """Raises UserError where the run lacks what distillation needs.

    Args:
      weights: the fields of `config.objective` that would switch it off, for the message; '' for none.
      views: how many views it needs.
    """
    or_off = f' or set {weights} to 0' if weights else ''
    if not self.parts.has_teacher:
      raise UserError(
        f'config.teacher.enabled is False but the objective distils: enable the teacher{or_off}.'
      )
    if self.parts.projection is None:
      raise UserError('distillation needs config.projection: see configs/vit_b.py for its fields.')
    if len(self.parts.augmentations) < views:
      raise UserError(
        f'cross-view distillation needs two views and config.views has {len(self.parts.augmentations)}: '
        f'add a view{or_off}.'
      )

  @property
  def _head(self) -> ProjectionHead:
    return ProjectionHead(**self.parts.projection, dtype=self.parts.dtype)

  def init(self, rng: jax.Array, output: BackboneOutput) -> tuple[Any, jax.Array]:
    """Fresh parameters of the projection head, and a centre of zeros [K]."""
    return self._head.init(rng, output.pooled)['params'], jnp.zeros((self._head.outputs,))

  @jax.named_scope('distillation')
  def logits(self, params: Params, feature: jax.Array) -> jax.Array:
    """Features [..., D] to logits [..., K], float32."""
    return self._head.apply({'params': params['projection']}, feature)

  @jax.named_scope('distillation')
  def class_loss(
    self, student_BVK: jax.Array, teacher_BQK: jax.Array, centre_K: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Cross-view loss on one token an image (DINO, equation 3): mean loss, statistics, the next centre."""
    temperatures = self._temperatures(step)
    loss_B = losses.distillation_loss(student_BVK, teacher_BQK, centre_K, *temperatures)
    statistics = losses.distillation_statistics(student_BVK, teacher_BQK, centre_K, *temperatures)
    return jnp.mean(loss_B), statistics, self._moved(centre_K, teacher_BQK)

  @jax.named_scope('distillation')
  def patch_loss(
    self,
    params: Params,
    teacher: Params,
    patch_NTD: tuple[jax.Array, jax.Array],
    views: int,
    centre_K: jax.Array,
    step: jax.Array,
    masked: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Same-view loss on masked patch tokens (iBOT, arXiv 2111.07832, equation 2): mean loss, the next centre.

    Args:
      params: the student's.
      teacher: the teacher's.
      patch_NTD: the student's patch tokens and the teacher's.
      views: V of the N = B*V rows, ordered (b, v).
      centre_K: of the patch tokens.
      step: of the run.
      masked: numbers of the tokens that the loss is taken on [N, S], and bool [N, S], which of them were masked; all
        tokens by default. The centre is that of all the teacher's tokens, as in iBOT's code.
    """
    student_NSD, teacher_NTD = patch_NTD
    teacher_NTE = self._embed(teacher, teacher_NTD)
    teacher_EK, student_EK = (self._prototypes(who) for who in (teacher, params))
    # The mean of the logits is the logits of the mean: no token need be compared for it.
    mean_E = jnp.mean(teacher_NTE.astype(teacher_EK.dtype).astype(jnp.float32), axis=(0, 1))
    mean_K = jnp.matmul(mean_E, teacher_EK.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    teacher_NSE, mask_NS = teacher_NTE, jnp.ones(teacher_NTE.shape[:2], bool)
    if masked is not None:
      index_NS, mask_NS = masked
      # In the type that the head computes in: the selection is exact in either.
      student_NSD = select(student_NSD.astype(self.parts.dtype), index_NS)
      teacher_NSE = select(teacher_NTE, index_NS)

    def by_image(rows):
      return rows.reshape(-1, views, *rows.shape[1:])

    loss_B = losses.patch_distillation_loss(
      by_image(self._embed(params, student_NSD)),
      by_image(teacher_NSE),
      student_EK,
      teacher_EK,
      centre_K,
      *self._temperatures(step),
      by_image(mask_NS),
    )
    return jnp.mean(loss_B), self._moved(centre_K, mean_K)

  def _embed(self, params: Params, feature: jax.Array) -> jax.Array:
    return self._head.apply({'params': params['projection']}, feature, method='embed')

  def _prototypes(self, params: Params) -> jax.Array:
    return self._head.apply({'params': params['projection']}, method='prototypes')

  def _temperatures(self, step: jax.Array) -> tuple[float, jax.Array]:
    ramp_steps = round(self.teacher_temperature_epochs * self.parts.steps_per_epoch)
    ramp = schedules.linear_then_constant(
      self.teacher_temperature_start, self.teacher_temperature, ramp_steps
    )
    return self.student_temperature, ramp(step)

  def _moved(self, centre_K: jax.Array, teacher: jax.Array) -> jax.Array:
    return losses.updated_centre(centre_K, teacher, self.centre_momentum)
