"""Masked frequency modelling (Xie et al., ICLR 2023, arXiv 2206.07706), and the restoration tasks it compares with.

A student sees a corrupted view and rebuilds the original; MFM's frequency distance judges it. MFM removes the low or
the high frequencies; super-resolution, deblurring and denoising are the paper's three restoration tasks (section 3.1),
judged over the whole spectrum. With `filter='com_rcom'` MFM is FOLK without its teacher: FOLK's ablation.

Shape letters: B images, N = B*V views in a row, H, W pixels, F = W//2+1 stored frequencies, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable
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
  encode,
  from_fields,
  statistics_state,
)
from folk_jax.objectives.reconstruction import Corruption, Reconstruction, filter_corruption
from folk_jax.objectives.views import CORRUPT, DROP_PATH, fold, view_keys
from folk_jax.signal import degrade
from folk_jax.signal.filters import Filter


@dataclasses.dataclass(frozen=True)
class _Restoration:
  """Corrupt, encode, rebuild: what the four methods share. A method says how it corrupts.

  Attributes:
    parts: backbone, views, normalisation.
    gamma: exponent of the frequency distance [C].
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit', 'resnet')
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone',)

  parts: Parts
  gamma: float

  def __post_init__(self):
    _ = self._reconstruction  # Checks its fields.

  def _corruption(self) -> Corruption:
    raise NotImplementedError

  def _reduction(self) -> str:
    return 'per_image'  # Where every coefficient is judged, 'pooled' is the same number.

  @functools.cached_property
  def _reconstruction(self) -> Reconstruction:
    return Reconstruction(self.parts, self._corruption(), self.gamma, self._reduction())

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh parameters {backbone, reconstruction}. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    keys = jax.random.split(rng)
    output, backbone, moments = self.parts.init_backbone(keys[0])
    params = {'backbone': backbone, 'reconstruction': self._reconstruction.init(keys[1], output)}
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
    """The frequency distance between the rebuilt and the original view. See `Objective.loss`."""
    del teacher, step  # A teacher may be kept to be judged; the loss needs none.
    keys_BV = view_keys(rng, batch['index'], batch['views'].shape[1])

    # 1. The view, and what is left of it (section 3.2).
    seen = self._reconstruction.views(batch, keys_BV)
    # 2. The encoder sees what is left.
    drop_keys_N = fold(keys_BV, DROP_PATH).reshape(-1)
    student, extra = encode(self.parts, 'student', params, extra, seen.corrupted_NHWC, drop_keys_N)
    # 3. A light head rebuilds the view; its spectrum is judged where something was taken (section 3.3).
    loss = self._reconstruction.loss(params, student, seen)
    metrics = {'loss': loss, 'loss_reconstruction': loss}
    return LossOutput(
      loss=loss, metrics=metrics | statistics.feature_statistics(student.pooled), extra=extra
    )

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Reconstruction of held-out images beside that of predicting the mean colour. See `Objective.evaluate`."""
    del teacher  # It has no reconstruction head.
    return self._reconstruction.held_out(params, extra, batch, rng)


@dataclasses.dataclass(frozen=True)
class Mfm(_Restoration):
  """MFM: low or high frequencies are removed, at random; the removed ones are rebuilt.

  Attributes:
    filter: a key of `signal.filters.FILTERS`: 'radial' [C]; 'com_rcom' and others are ablations.
    portions: for filters that select a share of the coefficients.
    com_probability: probability that the selected coefficients are kept; low-pass for 'radial': 0.5 for ViT, 0.3 for
      ResNet-50 [C].
    ranking: 'shared' or 'per_channel', for the filters that rank.
    radius: of the disk at 224 pixels, scaled with the image: 16 [C].
    clamp: whether filtered views are clamped to [0, 1]: yes [C].
    reduce: 'pooled' over the batch [C], or 'per_image'.
  """

  filter: str
  portions: tuple[float, ...]
  com_probability: float
  ranking: str
  radius: float
  clamp: bool
  reduce: str

  def _corruption(self) -> Corruption:
    return filter_corruption(
      from_fields(Filter, self, name=self.filter, backend=self.parts.spectral_backend)
    )

  def _reduction(self) -> str:
    return self.reduce


def _whole_spectrum(
  degraded: Callable[[jax.Array, jax.Array], jax.Array],
) -> Corruption:
  """A degradation as a corruption: all coefficients have to be rebuilt."""

  def corrupt(image_BHWC: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, height, width, _ = image_BHWC.shape
    masked_BHF1 = jnp.ones((batch, height, width // 2 + 1, 1), bool)
    return degraded(image_BHWC, fold(keys_B, CORRUPT)), masked_BHF1

  return corrupt


@dataclasses.dataclass(frozen=True)
class SuperResolution(_Restoration):
  """Rebuilds a view that was sampled down and up again.

  Attributes:
    factor: of the bicubic down-sampling: 8 [C].
  """

  factor: int

  def _corruption(self) -> Corruption:
    if not 1 < self.factor <= self.parts.image_size:
      raise UserError(
        f'config.objective.factor {self.factor} must be at least 2 and at most the image size, '
        f'{self.parts.image_size}.'
      )
    return _whole_spectrum(
      lambda image_BHWC, keys_B: degrade.super_resolve_input(image_BHWC, self.factor)
    )


@dataclasses.dataclass(frozen=True)
class Deblur(_Restoration):
  """Rebuilds a view that was blurred by an isotropic Gaussian.

  Attributes:
    sigma: of the Gaussian in pixels: 5 [C].
    kernel_sizes: odd sides of the kernel, one drawn per image: 7 to 21 [C].
  """

  sigma: float
  kernel_sizes: tuple[int, ...]

  def _corruption(self) -> Corruption:
    degrade.gaussian_kernels(self.kernel_sizes, self.sigma)  # Refuses what makes no kernel.
    return _whole_spectrum(
      lambda image_BHWC, keys_B: degrade.blur(image_BHWC, keys_B, self.kernel_sizes, self.sigma)
    )


@dataclasses.dataclass(frozen=True)
class Denoise(_Restoration):
  """Rebuilds a view with additive Gaussian noise.

  Attributes:
    sigma: of the noise, on images in [0, 1]: 75/255 [C].
  """

  sigma: float

  def _corruption(self) -> Corruption:
    if not self.sigma > 0:
      raise UserError(f'config.objective.sigma {self.sigma} must be positive.')
    return _whole_spectrum(
      lambda image_BHWC, keys_B: degrade.add_noise(image_BHWC, keys_B, self.sigma)
    )
