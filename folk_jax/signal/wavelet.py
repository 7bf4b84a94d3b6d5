"""Multi-level orthonormal wavelet transforms of images, and their coefficients patch by patch.

Each level splits an image into four bands of half its sides, by a low- and a high-pass filter along
rows and columns (Mallat, IEEE PAMI 11(7), 1989): the approximation, which the next level splits
again, and three bands of details. Images are taken as periodic, so that there are as many
coefficients as pixels and the transform is orthonormal: PyWavelets' conventions for its mode
'periodization'. A side of odd length is made even by repeating its last row or column; the inverse
cuts it off again.

All of it is slices, sums and reshapes in float32: no gather, no matrix product whose precision
would depend on the device, nothing that mixes images.

Shapes: B images, H rows, W columns, C channels; h x w patches, N coefficients of one patch.
"""

import difflib
import math
import types
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from folk_jax.errors import UserError

_ROWS, _COLUMNS = 1, 2
_HALF, _ROOT3 = math.sqrt(0.5), math.sqrt(3.0)

# Scaling filters, published constants (Daubechies, Ten Lectures on Wavelets, 1992, tables 6.1 and
# 6.3; PyWavelets' rec_lo): each sums to the square root of 2, and is orthonormal to its shifts by 2.
WAVELETS: Mapping[str, tuple[float, ...]] = types.MappingProxyType(
  {
    'haar': (_HALF, _HALF),
    'db2': tuple(_HALF * tap / 4 for tap in (1 + _ROOT3, 3 + _ROOT3, 3 - _ROOT3, 1 - _ROOT3)),
    'db3': (
      0.33267055295008263,
      0.8068915093110924,
      0.4598775021184914,
      -0.13501102001025458,
      -0.08544127388202666,
      0.03522629188570953,
    ),
    'db4': (
      0.23037781330885523,
      0.7148465705525415,
      0.6308807679295904,
      -0.02798376941698385,
      -0.18703481171888114,
      0.030841381835986965,
      0.032883011666982945,
      -0.010597401784997278,
    ),
    'sym4': (
      0.0322231006040427,
      -0.012603967262037833,
      -0.09921954357684722,
      0.29785779560527736,
      0.8037387518059161,
      0.49761866763201545,
      -0.02963552764599851,
      -0.07576571478927333,
    ),
  }
)


class Bands(NamedTuple):
  """The details of one level, each float32 [B, h_l, w_l, C]; the names are PyWavelets' cH, cV, cD.

  Attributes:
    horizontal: high-pass along a column of pixels (over the row index), low-pass along a row:
      answers to horizontal edges.
    vertical: low-pass over the row index, high-pass over the column index.
    diagonal: high-pass over both.
  """

  horizontal: jax.Array
  vertical: jax.Array
  diagonal: jax.Array


class Decomposition(NamedTuple):
  """A multi-level transform: the coarsest approximation, and the details, finest level first."""

  approximation_BHWC: jax.Array
  details: tuple[Bands, ...]


def max_levels(height: int, width: int) -> int:
  """The number of levels after which the shorter side is a single coefficient.

  Args:
    height: H, 1 or more.
    width: W, 1 or more.

  Returns:
    ceil(log2(min(H, W))); 0 where a side is a single pixel.
  """
  return (min(height, width) - 1).bit_length()


def band_shapes(height: int, width: int, levels: int) -> tuple[tuple[int, int], ...]:
  """Rows and columns of each level's bands, finest first; halves, rounded up.

  Raises:
    UserError: `levels` is below 1 or above `max_levels`.
  """
  most = max_levels(height, width)
  if not 1 <= levels <= most:
    cure = f'choose from 1 to {most}' if most else 'give at least 2 x 2 pixels'
    raise UserError(f'a wavelet transform of {levels} levels for {height} x {width} pixels: {cure}')
  return tuple((-(-height >> level), -(-width >> level)) for level in range(1, levels + 1))


def dwt(image_BHWC: jax.Array, wavelet: str = 'haar', levels: int = 1) -> Decomposition:
  """The periodised orthonormal wavelet transform of each channel.

  Where 2 ** levels divides both sides, the coefficients are as many as the pixels and hold the
  same energy. The approximation of a constant image is 2 ** levels times its value.

  Args:
    image_BHWC: floating point, any range; cast to float32.
    wavelet: a name of WAVELETS.
    levels: how often the approximation is split.

  Returns:
    Decomposition of float32 arrays, sized as `band_shapes` says.

  Raises:
    TypeError: the image does not hold floating-point numbers.
    UserError: an unknown wavelet, or too few or too many levels.
  """
  image_BHWC = _float32(image_BHWC)
  low, high = _filters(wavelet)
  details = []
  for _ in band_shapes(*image_BHWC.shape[1:3], levels):
    low_BhWC, high_BhWC = _analyse(image_BHWC, low, high, _ROWS)
    image_BHWC, vertical_BHWC = _analyse(low_BhWC, low, high, _COLUMNS)
    horizontal_BHWC, diagonal_BHWC = _analyse(high_BhWC, low, high, _COLUMNS)
    details.append(Bands(horizontal_BHWC, vertical_BHWC, diagonal_BHWC))
  return Decomposition(image_BHWC, tuple(details))


def idwt(decomposition: Decomposition, wavelet: str, height: int, width: int) -> jax.Array:
  """The inverse of `dwt`.

  Args:
    decomposition: floating point; cast to float32.
    wavelet: the name that `dwt` was given.
    height: H; the bands alone do not tell an odd height from the even one after it.
    width: W.

  Returns:
    float32 [B, H, W, C].

  Raises:
    UserError: an unknown wavelet, or more levels than the size takes.
  """
  low, high = _filters(wavelet)
  sizes = [(height, width), *band_shapes(height, width, len(decomposition.details))]
  chex.assert_rank(decomposition.approximation_BHWC, 4)
  batch, _, _, channels = decomposition.approximation_BHWC.shape
  image_BHWC = decomposition.approximation_BHWC
  for level in range(len(decomposition.details), 0, -1):
    bands = [_float32(band_BHWC) for band_BHWC in (image_BHWC, *decomposition.details[level - 1])]
    chex.assert_shape(bands, (batch, *sizes[level], channels))
    approximation, horizontal, vertical, diagonal = bands
    rows, columns = sizes[level - 1]
    low_BhWC = _synthesise(approximation, vertical, low, high, _COLUMNS, columns)
    high_BhWC = _synthesise(horizontal, diagonal, low, high, _COLUMNS, columns)
    image_BHWC = _synthesise(low_BhWC, high_BhWC, low, high, _ROWS, rows)
  return image_BHWC


def patch_coefficients(decomposition: Decomposition, patch: int) -> tuple[jax.Array, ...]:
  """The coefficients that lie at each patch's place, level by level.

  With p = patch / 2 ** l, patch (i, j) owns rows i * p to (i + 1) * p - 1 and columns j * p to
  (j + 1) * p - 1 of each band of level l: for Haar exactly the coefficients of its own pixels, for
  longer wavelets those centred near it.

  Args:
    decomposition: of an image whose sides are multiples of `patch`.
    patch: side of a patch in pixels, a multiple of 2 ** levels.

  Returns:
    For each level, finest first, [B, h, w, N]. N runs over (band, row, column, channel), the last
    fastest; the bands are horizontal, vertical, diagonal, and at the coarsest level, as the last
    p * p * C of N, the approximation. N = 3 * p * p * C, at the coarsest level 4 * p * p * C.

  Raises:
    UserError: the patch is no multiple of 2 ** levels, or the image not made of whole patches.
  """
  sides = _patch_sides(patch, len(decomposition.details))
  coarsest = len(sides) - 1
  coefficients = []
  for level, (side, bands) in enumerate(zip(sides, decomposition.details, strict=True)):
    if level == coarsest:
      bands = (*bands, decomposition.approximation_BHWC)
    coefficients.append(jnp.concatenate([_to_patches(band, side, patch) for band in bands], -1))
  return tuple(coefficients)


def from_patch_coefficients(
  coefficients: tuple[jax.Array, ...], patch: int, channels: int
) -> Decomposition:
  """The inverse of `patch_coefficients`.

  Args:
    coefficients: one [B, h, w, N] a level, finest first.
    patch: side of a patch in pixels, a multiple of 2 ** levels.
    channels: C.

  Returns:
    Decomposition, of the coefficients' dtype.

  Raises:
    UserError: the patch is no multiple of 2 ** levels.
  """
  sides = _patch_sides(patch, len(coefficients))
  coarsest = len(sides) - 1
  details = []
  for level, (side, values_BhwN) in enumerate(zip(sides, coefficients, strict=True)):
    count = 4 if level == coarsest else 3
    chex.assert_shape(values_BhwN, (None, None, None, count * side * side * channels))
    bands = [_from_patches(band, side) for band in jnp.split(values_BhwN, count, axis=-1)]
    details.append(Bands(*bands[:3]))
  return Decomposition(bands[3], tuple(details))


def _filters(wavelet: str) -> tuple[np.ndarray, np.ndarray]:
  """Low- and high-pass filter; the high-pass is the mirrored low-pass with alternating signs."""
  if wavelet not in WAVELETS:
    near = difflib.get_close_matches(str(wavelet), WAVELETS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ''
    raise UserError(f"wavelet '{wavelet}' is unknown: choose {', '.join(WAVELETS)}{hint}")
  low = np.asarray(WAVELETS[wavelet])
  high = low[::-1] * (-1.0) ** np.arange(low.size)
  return low.astype(np.float32), high.astype(np.float32)


def _analyse(
  signal: jax.Array, low: np.ndarray, high: np.ndarray, axis: int
) -> tuple[jax.Array, jax.Array]:
  """Filters along one axis and keeps every second value: c[k] = sum_m f[m] x[2 k + m - start]."""
  size = signal.shape[axis]
  half, start = -(-size // 2), low.size // 2 - 1
  if size % 2:
    signal = _pad(signal, axis, 0, 1, 'edge')
  signal = _pad(signal, axis, start, start, 'wrap')
  taps = [
    lax.slice_in_dim(signal, m, m + 2 * half - 1, stride=2, axis=axis) for m in range(low.size)
  ]
  return _weighted(taps, low), _weighted(taps, high)


def _synthesise(
  low_band: jax.Array, high_band: jax.Array, low: np.ndarray, high: np.ndarray, axis: int, size: int
) -> jax.Array:
  """The transpose of `_analyse`: every coefficient adds its filter to the signal, cut to `size`."""
  half, start = low_band.shape[axis], low.size // 2 - 1
  # Tap m of coefficient k falls on sample 2 k + m - start: for even samples and odd ones alone,
  # that is a filter over the coefficients.
  reach = low.size // 2
  bands = [_pad(band, axis, reach, reach, 'wrap') for band in (low_band, high_band)]
  phases = []
  for phase in (0, 1):
    taps = [m for m in range(low.size) if (m - start - phase) % 2 == 0]
    shifted = [
      lax.slice_in_dim(band, first, first + half, axis=axis)
      for band in bands
      for first in (reach - (m - start - phase) // 2 for m in taps)
    ]
    phases.append(_weighted(shifted, np.concatenate([low[taps], high[taps]])))
  shape = list(low_band.shape)
  shape[axis] = 2 * half
  return lax.slice_in_dim(jnp.stack(phases, axis + 1).reshape(shape), 0, size, axis=axis)


def _weighted(arrays: list[jax.Array], weights: np.ndarray) -> jax.Array:
  return sum(weight * array for weight, array in zip(weights, arrays, strict=True))


def _pad(array: jax.Array, axis: int, before: int, after: int, mode: str) -> jax.Array:
  padding = [(0, 0)] * array.ndim
  padding[axis] = (before, after)
  return jnp.pad(array, padding, mode=mode)


def _patch_sides(patch: int, levels: int) -> list[int]:
  """The side of a patch at each level, finest first."""
  if levels < 1 or patch < 1 or patch % 2**levels:
    raise UserError(
      f'a patch of {patch} pixels and {levels} wavelet levels: '
      f'choose a patch that is a multiple of 2 ** levels = {2**levels}, or fewer levels'
    )
  return [patch >> level for level in range(1, levels + 1)]


def _to_patches(band_BHWC: jax.Array, side: int, patch: int) -> jax.Array:
  chex.assert_rank(band_BHWC, 4)
  batch, height, width, channels = band_BHWC.shape
  if height % side or width % side:
    raise UserError(
      f'a band of {height} x {width} coefficients is not made of {side} x {side} blocks: '
      f'transform an image whose sides are multiples of the patch, {patch}'
    )
  rows, columns = height // side, width // side
  blocks = band_BHWC.reshape(batch, rows, side, columns, side, channels)
  return jnp.swapaxes(blocks, 2, 3).reshape(batch, rows, columns, side * side * channels)


def _from_patches(values_BhwN: jax.Array, side: int) -> jax.Array:
  batch, rows, columns, _ = values_BhwN.shape
  blocks = values_BhwN.reshape(batch, rows, columns, side, side, -1)
  return jnp.swapaxes(blocks, 2, 3).reshape(batch, rows * side, columns * side, -1)


def _float32(image_BHWC: jax.Array) -> jax.Array:
  chex.assert_rank(image_BHWC, 4)
  if not jnp.issubdtype(image_BHWC.dtype, jnp.floating):
    raise TypeError(
      f'the image holds {image_BHWC.dtype}, expected floating point: convert it, uint8 by / 255'
    )
  return image_BHWC.astype(jnp.float32)
