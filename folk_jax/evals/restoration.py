"""How well a reconstruction head restores images: PSNR and SSIM, beside those of what it was given.

Shape letters: B images, V views, H, W pixels, F = W//2+1 stored frequencies, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError
from folk_jax.objectives.base import sample_keys
from folk_jax.objectives.views import to_float
from folk_jax.signal import degrade, fourier, quality
from folk_jax.signal.augment import normalise
from folk_jax.signal.filters import Filter
from folk_jax.signal.shard import over_batch

# (images [B, H, W, C] in [0, 1], keys [B]) -> (corrupted images, and which coefficients of the half-spectrum the head
# has to rebuild, bool [B, H, F, 1 or C], or None for all of them): `objectives.reconstruction.Corruption`.
Corruption = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]

# 8-bit images that differ at all, by one level in one of 10 million values, lie below 120 dB.
CEILING_DB = 120.0


@dataclasses.dataclass(frozen=True)
class Restoration:
  """Means over the valid images; PSNR in dB, SSIM at most 1.

  Attributes:
    psnr, ssim: of the restored images.
    input_psnr, input_ssim: of the corrupted images.
    count: images.
  """

  psnr: float
  ssim: float
  input_psnr: float
  input_ssim: float
  count: int

  @property
  def psnr_gain(self) -> float:
    """What the head adds, in dB."""
    return self.psnr - self.input_psnr

  @property
  def ssim_gain(self) -> float:
    return self.ssim - self.input_ssim


def of_images(corrupt: Callable[[jax.Array, jax.Array], jax.Array]) -> Corruption:
  """A function `(images, keys) -> images` as a `Corruption` that leaves everything to be rebuilt."""
  return _OfImages(corrupt)


@dataclasses.dataclass(frozen=True)
class _OfImages:
  """Equal for equal functions, so that the same corruption again is not compiled again."""

  corrupt: Callable[[jax.Array, jax.Array], jax.Array]

  def __call__(self, image_BHWC: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, None]:
    return self.corrupt(image_BHWC, keys_B), None


def restoration(
  predict: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  corrupt: Corruption,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  rng: jax.Array,
  put: Callable[[np.ndarray], jax.Array] | None = None,
) -> Restoration:
  """PSNR and SSIM of restored images, for one corruption.

  Where a corruption says which coefficients it took (the frequency filters), the head is trained on
  those alone and its others mean nothing: the restored image has the head's coefficients where they
  were taken and the corrupted image's elsewhere. Both images are clipped to [0, 1] before they are
  compared with the clean one (filtered images are signed). PSNR is averaged over images in dB, each
  at most `CEILING_DB`, so that an image that came through untouched leaves the mean finite.

  Args:
    predict: `(params, corrupted float32 [B, H, W, C], normalised) -> [B, H, W, C]`, normalised. The
      same function object again is not compiled again.
    params: its parameters, on the devices.
    batches: dicts with clean `views` uint8 [B, V, H, W, C], of which the first view is taken,
      `index` int [B] and `valid` bool [B]. Rows that are not valid count nothing.
    corrupt: see `Corruption`; hashable. For a function that returns images alone: `of_images`.
    mean: per channel, of the normalisation.
    std: per channel.
    rng: typed key; an image's corruption depends on it and on its `index` alone.
    put: moves a host array with a leading batch axis to the devices; by default `jnp.asarray`.

  Returns:
    `Restoration`.

  Raises:
    UserError: no image is valid, or they are too small for SSIM's window.
  """
  put, mean, std = put or jnp.asarray, tuple(mean), tuple(std)
  totals = None
  for batch in batches:
    view_BVHWC, index_B, valid_B = (put(batch[name]) for name in ('views', 'index', 'valid'))
    seen = _corrupted(corrupt, mean, std, view_BVHWC, index_B, rng)
    sums = _batch_sums(predict, mean, std, params, *seen, valid_B)
    totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
  totals = {} if totals is None else jax.device_get(totals)
  if not totals or not totals['count'] > 0:
    raise UserError('restoration needs at least one valid image, found none: check the split')
  count = float(totals.pop('count'))
  return Restoration(count=int(count), **{name: float(v) / count for name, v in totals.items()})


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _corrupted(corrupt, mean, std, view_BVHWC, index_B, rng):
  """Clean images, corrupted ones normalised, the mask. Apart from the model, which is then compiled once for all."""

  def prepare(view_BVHWC, keys_B):
    clean_BHWC = to_float(view_BVHWC[:, 0])
    corrupted_BHWC, masked_BHFC = corrupt(clean_BHWC, keys_B)
    return clean_BHWC, normalise(corrupted_BHWC, mean, std), masked_BHFC

  return over_batch(prepare, view_BVHWC, sample_keys(rng, index_B, 0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_sums(predict, mean, std, params, clean_BHWC, corrupted_BHWC, masked_BHFC, valid_B):
  """Sums over the valid rows of a batch, by the names of `Restoration`'s fields."""

  def measure(clean_BHWC, corrupted_BHWC, guess_BHWC, masked_BHFC, valid_B):
    if masked_BHFC is not None:
      guess_BHWC = _filled(corrupted_BHWC, guess_BHWC, masked_BHFC)
    found = {'count': jnp.ones_like(valid_B, jnp.float32)}
    for prefix, image_BHWC in (('', guess_BHWC), ('input_', corrupted_BHWC)):
      image_BHWC = jnp.clip(_denormalised(image_BHWC, mean, std), 0, 1)
      found[f'{prefix}psnr'] = quality.psnr(image_BHWC, clean_BHWC, CEILING_DB)
      found[f'{prefix}ssim'] = quality.ssim(image_BHWC, clean_BHWC)
    return found

  guess_BHWC = predict(params, corrupted_BHWC).astype(jnp.float32)
  by_image = over_batch(measure, clean_BHWC, corrupted_BHWC, guess_BHWC, masked_BHFC, valid_B)
  # A row of padding may hold anything, NaN too: it is not multiplied but left out.
  return {name: jnp.sum(jnp.where(valid_B, value_B, 0)) for name, value_B in by_image.items()}


def _filled(corrupted_BHWC: jax.Array, guess_BHWC: jax.Array, masked_BHFC: jax.Array) -> jax.Array:
  """The guess's coefficients where masked, the corrupted image's elsewhere."""
  guess_BHFC = fourier.half_spectrum(guess_BHWC)
  corrupted_BHFC = fourier.half_spectrum(corrupted_BHWC)
  filled_BHFC = jnp.where(masked_BHFC, guess_BHFC, corrupted_BHFC)
  return fourier.inverse(filled_BHFC, corrupted_BHWC.shape[2])


def _denormalised(
  image_BHWC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  return image_BHWC * np.asarray(std, np.float32) + np.asarray(mean, np.float32)


def tasks(side: int) -> dict[str, Corruption]:
  """What a head is asked to undo, for images of `side` pixels: at 32 milder, as in configs/restoration.py."""
  small = side <= 32
  sizes, sigma = ((3, 5), 1.0) if small else (degrade.BLUR_SIZES, degrade.BLUR_SIGMA)
  factor = 4 if small else degrade.FACTOR
  portions = (0.1,) if small else (0.01,)

  def of_filter(name: str) -> Corruption:
    chosen = Filter(name, portions, 0.5, 'shared', 16.0, clamp=False)

    def corrupt(image_BHWC, keys_B):
      filtered_BHWC, kept_BHFC = chosen(image_BHWC, keys_B)
      return filtered_BHWC, ~kept_BHFC

    return corrupt

  return {name: of_filter(name) for name in ('com', 'rcom', 'low_pass', 'high_pass')} | {
    'super_resolution': of_images(
      lambda image_BHWC, keys_B: degrade.super_resolve_input(image_BHWC, factor)
    ),
    'deblur': of_images(lambda image_BHWC, keys_B: degrade.blur(image_BHWC, keys_B, sizes, sigma)),
    'denoise': of_images(degrade.add_noise),
  }
