"""Pixelation, JPEG's loss and elastic distortion of `corruptions`, of one image each.

Shape letters: H rows, W columns, C channels; N samples along an axis, P of a result; h, w blocks of
8 x 8 coefficients [I, J].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from folk_jax.signal import blurs

# ITU-T T.81, tables K.1 and K.2: luminance and chrominance, at quality 50.
_LUMINANCE = np.array([
  [16, 11, 10, 16, 24, 40, 51, 61],
  [12, 12, 14, 19, 26, 58, 60, 55],
  [14, 13, 16, 24, 40, 57, 69, 56],
  [14, 17, 22, 29, 51, 87, 80, 62],
  [18, 22, 37, 56, 68, 109, 103, 77],
  [24, 35, 55, 64, 81, 104, 113, 92],
  [49, 64, 78, 87, 103, 121, 120, 101],
  [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
_CHROMINANCE = np.full((8, 8), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# JFIF: luma, and the differences of blue and red from it at half scale.
_TO_YCC = np.array([
  [0.299, 0.587, 0.114],
  [-0.168736, -0.331264, 0.5],
  [0.5, -0.418688, -0.081312],
])  # fmt: skip
_BLOCK = 8
# Chroma is halved along both axes, so that blocks of chroma span 16 pixels.
_UNIT = 2 * _BLOCK


def pixelate(image_HWC: jax.Array, share: float) -> jax.Array:
  """Down to int(share * N) pixels a side and up again, both by Pillow's box filter.

  Args:
    image_HWC: float32.
    share: of each side, above 0, at most 1.

  Returns:
    float32 [H, W, C].
  """
  matrices = []
  for length in image_HWC.shape[:2]:
    small = max(1, int(length * share))
    matrices.append(_box_matrix(small, length) @ _box_matrix(length, small))
  return blurs.along_both(image_HWC, *matrices)


def jpeg(image_HWC: jax.Array, quality: int) -> jax.Array:
  """What JPEG of a quality leaves of an image: everything of the codec that loses information.

  Chroma at half resolution (4:2:0; the mean of four pixels down, libjpeg's triangle filter up), the
  8 x 8 cosine transform, rounding to multiples of the scaled tables. Entropy coding loses nothing
  and is left out; sums are float32 where codecs have integers, and pixels aren't rounded to 8 bits.

  Args:
    image_HWC: float32 in [0, 1], three channels.
    quality: libjpeg's, 1 to 100.

  Returns:
    float32 [H, W, 3]; ringing goes beyond [0, 1].
  """
  height, width, _ = image_HWC.shape
  padding = ((0, -height % _UNIT), (0, -width % _UNIT), (0, 0))
  ycc_HWC = 255 * _recoloured(jnp.pad(image_HWC, padding, mode='edge'), _TO_YCC)
  rows, columns = ycc_HWC.shape[:2]
  luma = _quantised(ycc_HWC[..., :1] - 128, _LUMINANCE, quality) + 128
  chroma = blurs.along_both(ycc_HWC[..., 1:], _halving(rows), _halving(columns))
  chroma = _quantised(chroma, _CHROMINANCE, quality)
  chroma = blurs.along_both(chroma, _doubling(rows // 2), _doubling(columns // 2))
  ycc_HWC = jnp.concatenate([luma, chroma], axis=-1)[:height, :width]
  return _recoloured(ycc_HWC, np.linalg.inv(_TO_YCC)) / 255


def elastic(
  image_HWC: jax.Array, key: jax.Array, strength: float, sigma: float, corner: float
) -> jax.Array:
  """Moves three corners of a triangle at random, then each pixel by a smooth random field.

  Both resamplings are linear; borders are reflected, without the edge pixel in the first and with
  it in the second.

  Args:
    image_HWC: float32.
    key: typed PRNG key.
    strength: of the field, which is uniform noise in [-1, 1] a row and a column, blurred.
    sigma: of that blur, in pixels.
    corner: largest move of a corner along each axis, in pixels.

  Returns:
    float32 [H, W, C].
  """
  height, width, _ = image_HWC.shape
  corner_key, field_key = jax.random.split(key)
  y_HW, x_HW = np.mgrid[:height, :width].astype(np.float32)

  # 1. The affine map: content at `start` goes to `end`, so each pixel asks where it came from.
  half, centre = min(height, width) // 3, np.array([height // 2, width // 2])
  start_32 = (centre + half * np.array([[1, 1], [-1, 1], [-1, -1]])).astype(np.float32)
  end_32 = start_32 + jax.random.uniform(corner_key, (3, 2), minval=-corner, maxval=corner)
  came, went = start_32[1:] - start_32[0], end_32[1:] - end_32[0]
  determinant = went[0, 0] * went[1, 1] - went[0, 1] * went[1, 0]
  y, x = y_HW - end_32[0, 0], x_HW - end_32[0, 1]
  # Each pixel as a sum of the triangle's two moved sides.
  first = (y * went[1, 1] - x * went[1, 0]) / determinant
  second = (x * went[0, 0] - y * went[0, 1]) / determinant
  from_y, from_x = (
    start_32[0, axis] + first * came[0, axis] + second * came[1, axis] for axis in range(2)
  )
  image_HWC = _resampled(image_HWC, from_y, from_x, 'mirror')

  # 2. The field.
  noise_HW2 = jax.random.uniform(field_key, (height, width, 2), minval=-1.0, maxval=1.0)
  field_HW2 = strength * blurs.along_both(
    noise_HW2, *(blurs.gaussian_matrix(n, sigma, 3.0, True) for n in (height, width))
  )
  return _resampled(image_HWC, y_HW + field_HW2[..., 0], x_HW + field_HW2[..., 1], 'reflect')


def _resampled(image_HWC: jax.Array, y_HW: jax.Array, x_HW: jax.Array, mode: str) -> jax.Array:
  def plane(plane_HW: jax.Array) -> jax.Array:
    return map_coordinates(plane_HW, [y_HW, x_HW], order=1, mode=mode)

  return jax.vmap(plane, in_axes=-1, out_axes=-1)(image_HWC)


def _recoloured(image_HWC: jax.Array, matrix: np.ndarray) -> jax.Array:
  """Each pixel's channels times a 3 x 3 matrix."""
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  return product('dc,hwc->hwd', matrix.astype(np.float32), image_HWC)


def _quantised(plane_HWC: jax.Array, table: np.ndarray, quality: int) -> jax.Array:
  """Rounds the cosine coefficients of each 8 x 8 block to multiples of the table's."""
  percent = 5000 // quality if quality < 50 else 200 - 2 * quality
  table_IJ = np.clip((table * percent + 50) // 100, 1, 255)[..., None].astype(np.float32)
  height, width, channels = plane_HWC.shape
  cosine = _cosine_matrix()
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  blocks = plane_HWC.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK, channels)
  coefficients = product('ia,hawbc,jb->hwijc', cosine, blocks, cosine)
  coefficients = table_IJ * jnp.round(coefficients / table_IJ)
  blocks = product('ia,hwijc,jb->hawbc', cosine, coefficients, cosine)
  return blocks.reshape(plane_HWC.shape)


@functools.cache
def _cosine_matrix() -> np.ndarray:
  """The orthonormal type-II cosine transform of 8 samples, float32 [I, 8]."""
  index = np.arange(_BLOCK)
  cosine = np.cos(np.pi * index[:, None] * (2 * index + 1) / (2 * _BLOCK)) * np.sqrt(2 / _BLOCK)
  cosine[0] /= np.sqrt(2)
  return cosine.astype(np.float32)


@functools.cache
def _halving(length: int) -> np.ndarray:
  """Means of neighbours: float32 [N / 2, N]."""
  return np.repeat(np.eye(length // 2, dtype=np.float32), 2, axis=1) / 2


@functools.cache
def _doubling(length: int) -> np.ndarray:
  """Three quarters of the nearer sample and one of the next, the ends repeated: float32 [2 N, N]."""
  index_N = np.arange(length)
  matrix = np.zeros((2 * length, length), np.float32)
  for side in range(2):
    matrix[2 * index_N + side, index_N] += 0.75
    matrix[2 * index_N + side, np.clip(index_N + 2 * side - 1, 0, length - 1)] += 0.25
  return matrix


@functools.cache
def _box_matrix(length: int, target: int) -> np.ndarray:
  """Pillow's resize by its box filter: float32 [P, N]. Samples whose middle lies in the box count."""
  scale = length / target
  support = max(scale, 1) / 2
  matrix_PN = np.zeros((target, length))
  for place, row_N in enumerate(matrix_PN):
    centre = (place + 0.5) * scale
    low = max(0, int(centre - support + 0.5))
    high = min(length, int(centre + support + 0.5))
    offset = (np.arange(low, high) - centre + 0.5) / max(scale, 1)
    row_N[low:high] = (offset > -0.5) & (offset <= 0.5)
    row_N /= row_N.sum()
  return matrix_PN.astype(np.float32)
