"""Partitions of an image's coefficients into bands, and filters that take whole bands in turn.

Gabor bands, octave by orientation, of the half-spectrum; sub-bands of a wavelet transform. A band
filter takes bands in the order of a score until they cover k coefficients; of the last one it takes
the strongest coefficients, as many as there is room for, so that filters are compared at equal
portions.

Shapes: B images, H rows, W columns, F = W // 2 + 1 columns of the half-spectrum, C channels, M mask
channels (1 or C), K bands, N coefficients in a row.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from folk_jax.signal import fourier, wavelet

ORIENTATIONS = 6
WAVELET = 'haar'


class Partition(NamedTuple):
  """Which band each coefficient belongs to.

  Attributes:
    band_HF: int32, from 0 to K - 1; equal for the two of a conjugate pair.
    sizes_K: int32, each band's coefficients in the full spectrum. May be 0.
  """

  band_HF: np.ndarray
  sizes_K: np.ndarray


def octaves(height: int, width: int) -> int:
  """How many octaves a bank divides the spectrum into: floor(log2(min(H, W) / 4)), at least 1.

  What lies below the lowest is then less than 4 cycles an image, and a wavelet approximation has at
  least 4 x 4 coefficients: 5 octaves at 224 pixels, 3 at 32.
  """
  return max(1, (min(height, width) // 4).bit_length() - 1)


def gabor_bands(height: int, width: int) -> Partition:
  """Gives each coefficient to the Gabor filter that answers it most.

  Octave o = 0, 1, ... spans 2 ** -(o + 2) to 2 ** -(o + 1) cycles a pixel, in 6 orientations: its
  filter's transfer function is a Gaussian about 3/4 of the upper end, which is at half its peak at
  both ends of the octave and halfway to the next orientation. Band 0 is what remains around the
  lowest frequency: a Gaussian about it, at half its peak where the lowest octave begins.

  Returns:
    The partition of the half-spectrum into 1 + 6 * octaves bands; band 1 + 6 * o + i is octave o
    at i * 30 degrees from the horizontal frequency axis.
  """
  y_H1, x_F = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
  levels = octaves(height, width)
  # In units of log-attenuation where a Gaussian at half its peak is 1.
  attenuation = [(y_H1**2 + x_F**2) / (2.0 ** -(levels + 1)) ** 2]
  for octave in range(levels):
    centre = 0.75 * 2.0 ** -(octave + 1)
    across = centre * math.tan(math.pi / (2 * ORIENTATIONS))
    for i in range(ORIENTATIONS):
      angle = math.pi * i / ORIENTATIONS
      along_HF = np.abs(x_F * math.cos(angle) + y_H1 * math.sin(angle))
      beside_HF = x_F * math.sin(angle) - y_H1 * math.cos(angle)
      attenuation.append(((along_HF - centre) / (centre / 3)) ** 2 + (beside_HF / across) ** 2)
  # Rounded, so that filters that tie on paper tie, and the first of them has the coefficient.
  band_HF = np.argmin(np.round(attenuation, 9), axis=0).astype(np.int32)
  return _partition(symmetric(band_HF[..., None], width)[..., 0], len(attenuation), width)


def symmetric(array_HFM: np.ndarray, width: int) -> np.ndarray:
  """Makes the two of each conjugate pair equal, by a copy, in the columns that hold both.

  Args:
    array_HFM: any array, or with further axes in front; NumPy's or JAX's.
    width: W.
  """
  height = array_HFM.shape[-3]
  rows = np.arange(height)
  mirrored = array_HFM[..., np.minimum(rows, -rows % height), :, :]
  single_F1 = fourier.hermitian_weights(width)[:, None] == 1
  where = np.where if isinstance(array_HFM, np.ndarray) else jnp.where
  return where(single_F1, mirrored, array_HFM)


def waiting_times(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Independent exponential waiting times of rate 1, above 0: float32 [B, *shape].

  The short ones, which win a draw, are resolved to 32 bits.
  """
  bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys_B)
  share = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
  return -jnp.log1p(-jnp.minimum(share, 1 - 2.0**-24))


def means(partition: Partition, values_BHFM: jax.Array, width: int) -> jax.Array:
  """The mean of each band over the full spectrum; 0 for an empty band.

  Args:
    partition: of the half-spectrum.
    values_BHFM: float32 half-spectrum.
    width: W.

  Returns:
    float32 [B, K, M].
  """
  weights_F = fourier.hermitian_weights(width)
  weights_HF = weights_F / np.maximum(partition.sizes_K, 1)[partition.band_HF]
  batch, _, _, channels = values_BHFM.shape
  # A product with a matrix of zeros and ones: scattered sums run in no fixed order on a GPU.
  member_NK = jax.nn.one_hot(partition.band_HF.reshape(-1), partition.sizes_K.size)
  weighted_BHFM = values_BHFM * weights_HF[..., None].astype(np.float32)
  return jnp.einsum(
    'bnm,nk->bkm',
    weighted_BHFM.reshape(batch, -1, channels),
    member_NK,
    precision=lax.Precision.HIGHEST,
  )


def cover(
  partition: Partition, score_BKM: jax.Array, strength_BHFM: jax.Array, k_B: jax.Array, width: int
) -> jax.Array:
  """Takes bands from the highest score down until k coefficients are covered.

  Args:
    partition: of the half-spectrum.
    score_BKM: float32; of equal scores the lower band comes first.
    strength_BHFM: float32, not negative, conjugate-symmetric: ranks the coefficients of the last
      band, which is taken as far as there is room, with ties.
    k_B: int32, coefficients of the full spectrum.
    width: W.

  Returns:
    bool [B, H, F, M]: k or k + 1 coefficients, and those of the last band that tie.
  """
  chex.assert_rank((score_BKM, strength_BHFM), (3, 4))
  bands = np.arange(partition.sizes_K.size)
  # Who comes before whom, [.., other, band]: K is some thirty, and no sort is needed.
  other_BK1M, band_B1KM = score_BKM[:, :, None], score_BKM[:, None]
  earlier_KK = (bands[:, None] < bands)[..., None]
  before_BKKM = (other_BK1M > band_B1KM) | ((other_BK1M == band_B1KM) & earlier_KK)
  start_BKM = jnp.sum(jnp.where(before_BKKM, partition.sizes_K[:, None, None], 0), axis=1)
  end_BKM = start_BKM + partition.sizes_K[:, None]
  k_B11 = k_B[:, None, None]
  whole_BHFM = jnp.take(end_BKM <= k_B11, partition.band_HF, axis=1)
  part_BHFM = jnp.take((start_BKM < k_B11) & (end_BKM > k_B11), partition.band_HF, axis=1)
  rank_BHFM = jnp.where(whole_BHFM, jnp.inf, jnp.where(part_BHFM, strength_BHFM, 0))
  return whole_BHFM | (part_BHFM & fourier.top_mask(rank_BHFM, k_B, width))


def wavelet_filter(
  image_BHWC: jax.Array,
  k_B: jax.Array,
  keep_B: jax.Array,
  ranking: fourier.Ranking,
  keys_B: jax.Array | None = None,
) -> jax.Array:
  """Keeps or removes wavelet sub-bands (Haar, `octaves` levels) that cover k coefficients.

  In the order of their energy a coefficient, of the last one those of most energy; with keys, in
  random order, of the last one at random. Sides that 2 ** levels doesn't divide give some
  coefficients more than pixels.

  Args:
    image_BHWC: floating point.
    k_B: int32, from 1 to H * W.
    keep_B: bool; True keeps the covered sub-bands, False the others.
    ranking: 'shared', one selection for all channels, by the sum of their energies; or
      'per_channel', one for each.
    keys_B: typed PRNG keys: the selection doesn't look at the image.

  Returns:
    float32 [B, H, W, C].

  Raises:
    TypeError: the image does not hold floating-point numbers.
    UserError: a side of the image is one pixel.
  """
  height, width, channels = image_BHWC.shape[1:]
  transform = wavelet.dwt(image_BHWC, WAVELET, octaves(height, width))
  leaves, treedef = jax.tree.flatten(transform)
  lengths = [leaf.shape[1] * leaf.shape[2] for leaf in leaves]
  flat_BN1C = jnp.concatenate(
    [leaf.reshape(leaf.shape[0], -1, 1, channels) for leaf in leaves], axis=1
  )
  # Of an "image" of width 1, no coefficient stands for two.
  band_N1 = np.repeat(np.arange(len(leaves), dtype=np.int32), lengths)[:, None]
  partition = _partition(band_N1, len(leaves), 1)
  if keys_B is None:
    strength_BN1M = jnp.square(flat_BN1C)
    if ranking == 'shared':
      strength_BN1M = jnp.sum(strength_BN1M, axis=-1, keepdims=True)
    score_BKM = means(partition, strength_BN1M, 1)
  else:
    strength_keys_B, score_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
    mask_channels = 1 if ranking == 'shared' else channels
    strength_BN1M = waiting_times(strength_keys_B, (*band_N1.shape, mask_channels))
    score_BKM = waiting_times(score_keys_B, (len(leaves), mask_channels))
  covered_BN1M = cover(partition, score_BKM, strength_BN1M, k_B, 1)
  kept_BN1C = jnp.where(covered_BN1M == keep_B[:, None, None, None], flat_BN1C, 0)
  parts = jnp.split(kept_BN1C, np.cumsum(lengths)[:-1], axis=1)
  leaves = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
  return wavelet.idwt(jax.tree.unflatten(treedef, leaves), WAVELET, height, width)


def _partition(band_HF: np.ndarray, bands: int, width: int) -> Partition:
  weights_HF = np.broadcast_to(fourier.hermitian_weights(width), band_HF.shape)
  sizes_K = np.bincount(band_HF.reshape(-1), weights_HF.reshape(-1), bands).astype(np.int32)
  return Partition(band_HF, sizes_K)
