"""FOLK: frequency-guided masking with distillation (Monsefi et al., ICLR 2025, arXiv 2409.10362).

Two views u, v of an image are filtered by their own spectra (Com keeps the strongest frequencies, RCom removes them).
The student sees only the filtered views u~, v~; it rebuilds the removed frequencies of each, and from u~ predicts what
its EMA teacher says of the unfiltered v, and from v~ of u. Where the paper is silent, docs/fidelity.md says what we
chose; each choice is a field here.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, C channels, T patches, K prototypes.
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
from folk_jax.objectives.distillation import Distillation
from folk_jax.objectives.reconstruction import Reconstruction, filter_corruption
from folk_jax.objectives.views import DROP_PATH, fold, view_keys
from folk_jax.signal.filters import Filter


@dataclasses.dataclass(frozen=True)
class Folk:
  """FOLK's objective. Fields are those of `config.objective`; [P], [C], [D] as in docs/fidelity.md.

  Attributes:
    parts: backbone, heads, views, normalisation.
    filter: which frequencies are selected and kept or removed, a key of `signal.filters.FILTERS`: 'com_rcom' [P].
    portions: shares of the H*W coefficients, in (0, 1); one is drawn per view and image [P].
    com_probability: probability that the selected ones are kept (Com), in [0, 1]; removed (RCom) otherwise [D].
    ranking: 'shared' (one mask, ranked by the sum over channels) or 'per_channel' [D].
    radius: of the radial filters, at 224 pixels; the others don't use it.
    clamp: whether filtered views are clamped to [0, 1]; [D].
    gamma: exponent of the frequency distance [D].
    reduce: 'per_image' or 'pooled' [D].
    reconstruction_weight, distillation_weight, patch_weight: weights of the losses; 0 leaves the part out [D].
    student_temperature, teacher_temperature, teacher_temperature_start, teacher_temperature_epochs, centre_momentum:
      DINO's [C].
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit', 'resnet')

  parts: Parts
  filter: str
  portions: tuple[float, ...]
  com_probability: float
  ranking: str
  radius: float
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
    distillation, _ = self._distillation, self._reconstruction  # Each checks its own fields.
    weights = (self.reconstruction_weight, self.distillation_weight, self.patch_weight)
    if min(weights) < 0 or not any(weights):
      raise UserError(
        f'the weights of the losses {weights} must not be negative, and one must be positive.'
      )
    if self._distils:
      switches = 'config.objective.distillation_weight and patch_weight'
      distillation.check_run(switches, views=2 if self.distillation_weight else 1)

  @property
  def _distils(self) -> bool:
    return self.distillation_weight > 0 or self.patch_weight > 0

  @property
  def teacher_parts(self) -> tuple[str, ...]:
    """The teacher mirrors the backbone and, where something is distilled, the projection head."""
    return ('backbone', 'projection') if self._distils else ('backbone',)

  @functools.cached_property
  def _distillation(self) -> Distillation:
    return from_fields(Distillation, self)

  @functools.cached_property
  def _reconstruction(self) -> Reconstruction:
    corrupt = filter_corruption(
      from_fields(Filter, self, name=self.filter, backend=self.parts.spectral_backend)
    )
    return from_fields(Reconstruction, self, corrupt=corrupt)

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh student parameters {backbone, projection, reconstruction} and the centres, zero. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    keys = jax.random.split(rng, 3)
    output, backbone, statistics = self.parts.init_backbone(keys[0])
    params = {'backbone': backbone}
    extra = statistics_state(self.parts, statistics, runs_teacher=self._distils)
    if self._distils:
      params['projection'], extra['centre'] = self._distillation.init(keys[1], output)
      if self.patch_weight:
        extra['patch_centre'] = jnp.zeros_like(extra['centre'])
    if self.reconstruction_weight:
      params['reconstruction'] = self._reconstruction.init(keys[2], output)
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
    keys_BV = view_keys(rng, batch['index'], views)

    # 1. Views u, v and their filtered versions u~, v~.
    seen = self._reconstruction.views(batch, keys_BV)

    # 2. The student sees u~ and v~ only.
    drop_keys_N = fold(keys_BV, DROP_PATH).reshape(-1)
    rebuilds, patchwise = self.reconstruction_weight > 0, self.patch_weight > 0
    student, extra = encode(
      self.parts,
      'student',
      params,
      extra,
      seen.corrupted_NHWC,
      drop_keys_N,
      patches=rebuilds or patchwise,
    )
    total, metrics = jnp.zeros(()), {}
    judged = student

    # 3. It rebuilds the removed frequencies of its own view.
    if self.reconstruction_weight:
      metrics['loss_reconstruction'] = self._reconstruction.loss(params, student, seen)
      total += self.reconstruction_weight * metrics['loss_reconstruction']

    # 4. It predicts what the teacher says of the other view, unfiltered (DINO, arXiv 2104.14294, eq. 3).
    distillation = self._distillation
    if self._distils:
      judged, extra = encode(
        self.parts, 'teacher', teacher, extra, seen.clean_NHWC, patches=patchwise
      )
    if self.distillation_weight:
      student_BVK = distillation.logits(params, student.pooled).reshape(batch_size, views, -1)
      teacher_BVK = distillation.logits(teacher, judged.pooled).reshape(batch_size, views, -1)
      metrics['loss_distillation'], alive, extra['centre'] = distillation.class_loss(
        student_BVK, teacher_BVK, extra['centre'], step
      )
      metrics |= alive
      total += self.distillation_weight * metrics['loss_distillation']

    # 5. Option: and of the same view's patches (iBOT, arXiv 2111.07832, eq. 2; the filter is the mask).
    if self.patch_weight:
      tokens = [
        output.patches.reshape(batch_size * views, -1, output.patches.shape[-1])
        for output in (student, judged)
      ]
      metrics['loss_patch'], extra['patch_centre'] = distillation.patch_loss(
        params, teacher, tokens, views, extra['patch_centre'], step
      )
      total += self.patch_weight * metrics['loss_patch']

    # Of the teacher where there is one: the student's features differ by the filter before they differ by the image.
    metrics |= statistics.feature_statistics(judged.pooled)
    return LossOutput(loss=total, metrics=metrics | {'loss': total}, extra=extra)

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Reconstruction of held-out images beside that of predicting the mean colour. See `Objective.evaluate`."""
    del teacher  # It has no reconstruction head.
    if not self.reconstruction_weight:
      return count_valid(batch)
    return self._reconstruction.held_out(params, extra, batch, rng)
