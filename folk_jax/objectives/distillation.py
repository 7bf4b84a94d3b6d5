"""Predicting what the teacher says: the half that FOLK, DINO and iBOT share.

Shape letters: B images, V student views, Q teacher views, T patch tokens, K prototypes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from folk_jax import schedules
from folk_jax.errors import UserError
from folk_jax.models import BackboneOutput, ProjectionHead
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

  def logits(self, params: Params, feature: jax.Array) -> jax.Array:
    """Features [..., D] to logits [..., K], float32."""
    return self._head.apply({'params': params['projection']}, feature)

  def class_loss(
    self, student_BVK: jax.Array, teacher_BQK: jax.Array, centre_K: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Cross-view loss on one token an image (DINO, equation 3): mean loss, statistics, the next centre."""
    temperatures = self._temperatures(step)
    loss_B = losses.distillation_loss(student_BVK, teacher_BQK, centre_K, *temperatures)
    statistics = losses.distillation_statistics(student_BVK, teacher_BQK, centre_K, *temperatures)
    return jnp.mean(loss_B), statistics, self._moved(centre_K, teacher_BQK)

  def patch_loss(
    self,
    student_BVTK: jax.Array,
    teacher_BVTK: jax.Array,
    mask_BVT: jax.Array,
    centre_K: jax.Array,
    step: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Same-view loss on masked patch tokens (iBOT, arXiv 2111.07832, equation 2): mean loss, the next centre."""
    loss_B = losses.patch_distillation_loss(
      student_BVTK, teacher_BVTK, centre_K, *self._temperatures(step), mask_BVT
    )
    return jnp.mean(loss_B), self._moved(centre_K, teacher_BVTK)

  def _temperatures(self, step: jax.Array) -> tuple[float, jax.Array]:
    ramp_steps = round(self.teacher_temperature_epochs * self.parts.steps_per_epoch)
    ramp = schedules.linear_then_constant(
      self.teacher_temperature_start, self.teacher_temperature, ramp_steps
    )
    return self.student_temperature, ramp(step)

  def _moved(self, centre_K: jax.Array, teacher: jax.Array) -> jax.Array:
    return losses.updated_centre(centre_K, teacher, self.centre_momentum)
