"""FOLK: frequency-guided masking with distillation (Monsefi et al., ICLR 2025, arXiv 2409.10362).

Two views u, v of an image are filtered by their own spectra (Com keeps the strongest frequencies, RCom removes them).
The student sees only the filtered views u~, v~; it rebuilds the removed frequencies of each, and from u~ predicts what
its EMA teacher says of the unfiltered v, and from v~ of u. Where the paper is silent, docs/fidelity.md says what we
chose; each choice is a field here.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, F = W//2+1 stored frequencies, C channels,
D width, T patches, K prototypes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from folk_jax import schedules
from folk_jax.errors import UserError
from folk_jax.models.heads import ProjectionHead, ReconstructionHead
from folk_jax.objectives import losses, statistics
from folk_jax.objectives.base import Batch, LossOutput, Params, Parts, sample_keys
from folk_jax.signal import fourier
from folk_jax.signal.augment import augment, normalise
from folk_jax.signal.shard import over_batch

# What a sample's key is folded with, so that no two kinds of draw share bits.
_AUGMENT, _FILTER, _DROP_PATH = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Folk:
  """FOLK's objective. Fields are those of `config.objective`; [P], [C], [D] as in docs/fidelity.md.

  Attributes:
    parts: backbone, heads, views, normalisation.
    portions: shares of the H*W coefficients, in (0, 1); one is drawn per view and image [P].
    com_probability: probability of Com, in [0, 1]; RCom otherwise [D].
    ranking: 'shared' (one mask, ranked by the sum over channels) or 'per_channel' [D].
    clamp: whether filtered views are clamped to [0, 1] [D].
    gamma: exponent of the frequency distance [D].
    reduce: 'per_image' or 'pooled' [D].
    reconstruction_weight, distillation_weight, patch_weight: weights of the losses; 0 leaves the part out [D].
    student_temperature, teacher_temperature, teacher_temperature_start, teacher_temperature_epochs, centre_momentum:
      DINO's [C].
  """

  parts: Parts
  portions: tuple[float, ...]
  com_probability: float
  ranking: str
  clamp: bool
  gamma: float
  reduce: str
  reconstruction_weight: float
  distillation_weight: float
  patch_weight: float
  student_temperature: float
  teacher_temperature: float
  teacher_temperature_start: float
  teacher_temperature_epochs: float
  centre_momentum: float

  def __post_init__(self):
    if not self.portions or any(not 0 < portion < 1 for portion in self.portions):
      raise UserError(
        f'config.objective.portions {self.portions} must be numbers between 0 and 1, at least one.'
      )
    if not 0 <= self.com_probability <= 1:
      raise UserError(
        f'config.objective.com_probability {self.com_probability} must be between 0 and 1.'
      )
    for field, known in (
      ('ranking', ('shared', 'per_channel')),
      ('reduce', ('per_image', 'pooled')),
    ):
      if getattr(self, field) not in known:
        raise UserError(
          f'unknown config.objective.{field} {getattr(self, field)!r}. Known: {", ".join(known)}.'
        )
    for field in (
      'gamma',
      'student_temperature',
      'teacher_temperature',
      'teacher_temperature_start',
    ):
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
    weights = (self.reconstruction_weight, self.distillation_weight, self.patch_weight)
    if min(weights) < 0 or not any(weights):
      raise UserError(
        f'the weights of the losses {weights} must not be negative, and one must be positive.'
      )
    if self._distils and not self.parts.has_teacher:
      raise UserError(
        'config.teacher.enabled is False but config.objective.distillation_weight or patch_weight is positive: '
        'enable the teacher or set both weights to 0.'
      )
    if self.distillation_weight and len(self.parts.augmentations) < 2:
      raise UserError(
        f'cross-view distillation needs two views and config.views has {len(self.parts.augmentations)}: '
        'add a view or set config.objective.distillation_weight to 0.'
      )

  @property
  def _distils(self) -> bool:
    return self.distillation_weight > 0 or self.patch_weight > 0

  @property
  def teacher_parts(self) -> tuple[str, ...]:
    """The teacher mirrors the backbone and, where something is distilled, the projection head."""
    return ('backbone', 'projection') if self._distils else ('backbone',)

  @property
  def _projection(self) -> ProjectionHead:
    return ProjectionHead(**self.parts.projection, dtype=self.parts.dtype)

  @property
  def _reconstruction(self) -> ReconstructionHead:
    return ReconstructionHead(self.parts.patch, dtype=self.parts.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh student parameters {backbone, projection, reconstruction} and the centres, zero. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    side = self.parts.image_size
    keys = jax.random.split(rng, 3)
    image_NHWC = jnp.zeros((1, side, side, 3))
    output, variables = self.parts.backbone.init_with_output(keys[0], image_NHWC)
    params, extra = {'backbone': variables['params']}, {}
    if self._distils:
      params['projection'] = self._projection.init(keys[1], output.pooled)['params']
      outputs = self.parts.projection['outputs']
      extra['centre'] = jnp.zeros((outputs,))
      if self.patch_weight:
        extra['patch_centre'] = jnp.zeros((outputs,))
    if self.reconstruction_weight:
      params['reconstruction'] = self._reconstruction.init(keys[2], output.patches)['params']
    return params, extra

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """The total loss of the paper on one batch. See `Objective.loss`."""
    batch_size, views = batch['views'].shape[:2]
    view_keys = [sample_keys(rng, batch['index'], view) for view in range(views)]
    keys_BV = jnp.stack(view_keys, axis=1)

    # 1. Views u, v and their filtered versions u~, v~, where the images are: one augmentation, one spectrum.
    filtered_NHWC, clean_NHWC, kept_NHFC = over_batch(self._views, batch['views'], keys_BV)

    # 2. The student sees u~ and v~ only.
    drop_keys_N = _fold(keys_BV.reshape(-1), _DROP_PATH)
    student = self._backbone(params, filtered_NHWC, drop_keys_N)
    total, metrics, extra = jnp.zeros(()), {}, dict(extra)
    judged = student

    # 3. It rebuilds the removed frequencies of its own view.
    if self.reconstruction_weight:
      prediction_NHWC = self._reconstruction.apply(
        {'params': params['reconstruction']}, student.patches
      )
      sum_N, count_N = self._distance(prediction_NHWC, clean_NHWC, kept_NHFC)
      metrics['loss_reconstruction'] = losses.reduce_frequency(sum_N, count_N, self.reduce)
      total += self.reconstruction_weight * metrics['loss_reconstruction']

    # 4. It predicts what the teacher says of the other view, unfiltered (DINO, arXiv 2104.14294, eq. 3).
    if self._distils:
      judged = seen = self._backbone(teacher, clean_NHWC, None)
      temperatures = self.student_temperature, self._teacher_temperature(step)
      if self.distillation_weight:
        student_BVK = self._logits(params, student.pooled).reshape(batch_size, views, -1)
        teacher_BVK = self._logits(teacher, seen.pooled).reshape(batch_size, views, -1)
        loss_B = losses.distillation_loss(student_BVK, teacher_BVK, extra['centre'], *temperatures)
        metrics['loss_distillation'] = jnp.mean(loss_B)
        total += self.distillation_weight * metrics['loss_distillation']
        metrics |= losses.distillation_statistics(
          student_BVK, teacher_BVK, extra['centre'], *temperatures
        )
        extra['centre'] = losses.updated_centre(extra['centre'], teacher_BVK, self.centre_momentum)
      # 5. Option: and of the same view's patches (iBOT, arXiv 2111.07832, eq. 2; the filter is the mask).
      if self.patch_weight:
        shape = (batch_size, views, -1, self.parts.projection['outputs'])
        student_BVTK = self._logits(params, student.patches).reshape(shape)
        teacher_BVTK = self._logits(teacher, seen.patches).reshape(shape)
        loss_B = losses.patch_distillation_loss(
          student_BVTK,
          teacher_BVTK,
          extra['patch_centre'],
          *temperatures,
          jnp.ones(student_BVTK.shape[:3]),
        )
        metrics['loss_patch'] = jnp.mean(loss_B)
        total += self.patch_weight * metrics['loss_patch']
        extra['patch_centre'] = losses.updated_centre(
          extra['patch_centre'], teacher_BVTK, self.centre_momentum
        )

    # Of the teacher where there is one: the student's features differ by the filter before they differ by the image.
    metrics |= statistics.feature_statistics(judged.pooled)
    return LossOutput(loss=total, metrics=metrics | {'loss': total}, extra=extra)

  def evaluate(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Reconstruction of held-out images beside that of predicting the mean colour. See `Objective.evaluate`."""
    valid_B = batch['valid'].astype(jnp.float32)
    sums = {'count': jnp.sum(valid_B)}
    if self.reconstruction_weight:
      keys_B = sample_keys(rng, batch['index'], 0)
      filtered_BHWC, clean_BHWC, kept_BHFC = over_batch(
        self._filtered, batch['views'][:, 0], keys_B
      )
      output = self._backbone(params, filtered_BHWC, None)
      prediction_BHWC = self._reconstruction.apply(
        {'params': params['reconstruction']}, output.patches
      )
      for name, guess_BHWC in (('', prediction_BHWC), ('_of_mean', jnp.zeros_like(clean_BHWC))):
        sum_B, count_B = self._distance(guess_BHWC, clean_BHWC, kept_BHFC)
        sums[f'reconstruction{name}'] = jnp.sum(valid_B * sum_B / jnp.maximum(count_B, 1))
    return sums

  def _views(
    self, view_BVHWC: jax.Array, keys_BV: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """uint8 views to (filtered [N,H,W,C], clean [N,H,W,C], both normalised, kept [N,H,F,1 or C])."""
    image_BVHWC = jnp.stack(
      [
        augment(_to_float(view_BVHWC[:, v]), _fold(keys_BV[:, v], _AUGMENT), settings)
        for v, settings in enumerate(self.parts.augmentations)
      ],
      axis=1,
    )
    return self._filter(image_BVHWC.reshape(-1, *image_BVHWC.shape[2:]), keys_BV.reshape(-1))

  def _filtered(
    self, image_BHWC: jax.Array, keys_B: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_views`, for one uint8 image each and without augmentation."""
    return self._filter(_to_float(image_BHWC), keys_B)

  def _filter(
    self, image_NHWC: jax.Array, keys_N: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    height, width = image_NHWC.shape[1:3]
    k_N, com_N = fourier.draw_filters(
      _fold(keys_N, _FILTER), self.portions, self.com_probability, height, width
    )
    filtered_NHWC, kept_NHFC = fourier.filter_images(
      image_NHWC, k_N, com_N, self.ranking, self.clamp
    )
    mean, std = self.parts.mean, self.parts.std
    return normalise(filtered_NHWC, mean, std), normalise(image_NHWC, mean, std), kept_NHFC

  def _distance(
    self, prediction_NHWC: jax.Array, target_NHWC: jax.Array, kept_NHFC: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Frequency distance on the coefficients that the filter removed: (sum [N], count [N])."""

    def distance(prediction_NHWC, target_NHWC, kept_NHFC):
      return fourier.frequency_distance(prediction_NHWC, target_NHWC, ~kept_NHFC, self.gamma)

    return over_batch(distance, prediction_NHWC, target_NHWC, kept_NHFC)

  def _backbone(self, params: Params, image_NHWC: jax.Array, drop_keys_N: jax.Array | None):
    return self.parts.backbone.apply(
      {'params': params['backbone']}, image_NHWC, sample_keys=drop_keys_N
    )

  def _logits(self, params: Params, feature: jax.Array) -> jax.Array:
    return self._projection.apply({'params': params['projection']}, feature)

  def _teacher_temperature(self, step: jax.Array) -> jax.Array:
    ramp_steps = round(self.teacher_temperature_epochs * self.parts.steps_per_epoch)
    ramp = schedules.linear_then_constant(
      self.teacher_temperature_start, self.teacher_temperature, ramp_steps
    )
    return ramp(step)


def _to_float(image: jax.Array) -> jax.Array:
  return image.astype(jnp.float32) / 255.0


def _fold(keys_N: jax.Array, purpose: int) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys_N)
