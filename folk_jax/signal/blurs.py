"""The blurs of `corruptions`, of one image each, and what they are made of: matrices along an axis, shifts.

Shape letters: H rows, W columns, C channels; N samples along an axis, P of a result; T taps; Z zooms.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def gaussian(image_HWC: jax.Array, sigma: float) -> jax.Array:
  """A Gaussian of 4 sigma to each side, the edge pixel repeated: scikit-image's `gaussian`.

  Args:
    image_HWC: float32.
    sigma: in pixels; 0 changes nothing.

  Returns:
    float32 [H, W, C], within the image's range but for rounding.
  """
  return along_both(image_HWC, *(gaussian_matrix(n, sigma) for n in image_HWC.shape[:2]))


def defocus(image_HWC: jax.Array, radius: float, alias_sigma: float) -> jax.Array:
  """Correlates with a disk whose rim is softened; borders reflected, the edge pixel not repeated.

  Args:
    image_HWC: float32.
    radius: of the disk, in pixels.
    alias_sigma: of the Gaussian over the disk, cut to 3 x 3 taps, or 5 x 5 for a radius above 8.

  Returns:
    float32 [H, W, C].
  """
  kernel = disk(radius, alias_sigma)
  reach = kernel.shape[0] // 2
  padded_HWC = jnp.pad(image_HWC, ((reach, reach), (reach, reach), (0, 0)), mode='reflect')
  planes_C1HW = jnp.moveaxis(padded_HWC, -1, 0)[:, None]
  blurred_C1HW = lax.conv(
    planes_C1HW, kernel[None, None], (1, 1), 'VALID', precision=lax.Precision.HIGHEST
  )
  return jnp.moveaxis(blurred_C1HW[:, 0], 0, -1)


@functools.cache
def disk(radius: float, alias_sigma: float) -> np.ndarray:
  """The kernel of `defocus`, float32, odd and square; without the zeros around it."""
  reach = max(8, int(radius))
  offset = np.arange(-reach, reach + 1)
  kernel = (offset[:, None] ** 2 + offset**2 <= radius**2).astype(np.float64)
  kernel /= kernel.sum()
  taps = 3 if radius <= 8 else 5
  softening = np.exp(-0.5 * np.square(np.arange(-(taps // 2), taps // 2 + 1) / alias_sigma))
  # The kernel's own borders are reflected too: beside a disk that fills them it gains a little.
  index = _reflected(np.arange(-(taps // 2), kernel.shape[0] + taps // 2), kernel.shape[0])
  for _ in range(2):
    rows = kernel[index]
    kernel = sum(
      weight * rows[t : t + kernel.shape[0]] for t, weight in enumerate(softening / softening.sum())
    ).T
  empty = next(edge for edge, row in enumerate(kernel) if row.any())
  kernel = kernel[empty : len(kernel) - empty, empty : len(kernel) - empty].astype(np.float32)
  kernel.setflags(write=False)
  return kernel


def motion(image_HWC: jax.Array, angle: jax.Array, radius: int, sigma: float) -> jax.Array:
  """A half Gaussian along a line, as ImageMagick's motion blur: the trail lies on one side.

  2 radius + 1 taps a pixel apart along the line, each at the nearest pixel; the edge is repeated.

  Args:
    image_HWC: float32.
    angle: of the line in degrees, clockwise from the right, float32 scalar.
    radius: in pixels.
    sigma: of the Gaussian, in pixels.

  Returns:
    float32 [H, W, C].
  """
  taps = 2 * radius + 1
  weight_T = np.exp(-0.5 * np.square(np.arange(taps) / sigma)).astype(np.float32)
  weight_T = jnp.asarray(weight_T / weight_T.sum())
  turn = jnp.deg2rad(angle)
  padded = jnp.pad(image_HWC, ((taps, taps), (taps, taps), (0, 0)), mode='edge')

  def add(tap: jax.Array, total_HWC: jax.Array) -> jax.Array:
    row, column = (
      taps + jnp.ceil(tap * step - 0.5).astype(jnp.int32) for step in (jnp.sin(turn), jnp.cos(turn))
    )
    shifted_HWC = lax.dynamic_slice(padded, (row, column, 0), image_HWC.shape)
    return total_HWC + weight_T[tap] * shifted_HWC

  return lax.fori_loop(1, taps, add, weight_T[0] * image_HWC)


def zoom(image_HWC: jax.Array, stop: float, step: float) -> jax.Array:
  """The mean of the image and of its enlargements by 1, 1 + step, ... below `stop` about the centre."""
  factors = np.arange(1, stop, step)
  rows_ZHH, columns_ZWW = (
    jnp.asarray(np.stack([zoom_matrix(n, float(factor)) for factor in factors]))
    for n in image_HWC.shape[:2]
  )

  def add(number: jax.Array, total_HWC: jax.Array) -> jax.Array:
    return total_HWC + along_both(image_HWC, rows_ZHH[number], columns_ZWW[number])

  return lax.fori_loop(0, len(factors), add, image_HWC) / (len(factors) + 1)


def glass(image_HWC: jax.Array, key: jax.Array, sigma: float, reach: int, rounds: int) -> jax.Array:
  """Blur, pixels out of place, blur: see `corruptions` for how it differs from the reference.

  Args:
    image_HWC: float32.
    key: typed PRNG key.
    sigma: of both Gaussians, in pixels.
    reach: a pixel comes from -reach to reach - 1 rows and columns away, within the image.
    rounds: how often it is done.

  Returns:
    float32 [H, W, C].
  """
  height, width, channels = image_HWC.shape
  source_N = jnp.arange(height * width)
  for number in range(rounds):
    draw_2HW = jax.random.randint(
      jax.random.fold_in(key, number), (2, height, width), -reach, reach
    )
    row_HW = jnp.clip(np.arange(height)[:, None] + draw_2HW[0], 0, height - 1)
    column_HW = jnp.clip(np.arange(width) + draw_2HW[1], 0, width - 1)
    source_N = source_N[(row_HW * width + column_HW).reshape(-1)]
  shuffled = gaussian(image_HWC, sigma).reshape(-1, channels)[source_N]
  return gaussian(shuffled.reshape(image_HWC.shape), sigma)


def along_both(image_HWC: jax.Array, rows_PH: jax.Array, columns_PW: jax.Array) -> jax.Array:
  """Multiplies by a matrix along each axis, at full precision."""
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  return product('qw,pwc->pqc', columns_PW, product('ph,hwc->pwc', rows_PH, image_HWC))


@functools.cache
def gaussian_matrix(
  length: int, sigma: float, truncate: float = 4.0, symmetric: bool = False
) -> np.ndarray:
  """A one-dimensional Gaussian filter as a matrix.

  Args:
    length: N.
    sigma: in samples; 0 gives the identity.
    truncate: how many sigmas it reaches.
    symmetric: beyond the border the signal runs back, its last sample repeated; else that sample is
      repeated for ever.

  Returns:
    float32 [N, N], read-only, rows summing to 1.
  """
  reach = int(truncate * sigma + 0.5)
  offset_T = np.arange(-reach, reach + 1)
  weight_T = np.exp(-0.5 * np.square(offset_T / sigma)) if reach else np.ones(1)
  place_NT = np.arange(length)[:, None] + offset_T
  if symmetric:
    place_NT = place_NT % (2 * length)
    place_NT = np.minimum(place_NT, 2 * length - 1 - place_NT)
  matrix_NN = np.zeros((length, length))
  row_NT = np.broadcast_to(np.arange(length)[:, None], place_NT.shape)
  np.add.at(matrix_NN, (row_NT, np.clip(place_NT, 0, length - 1)), weight_T / weight_T.sum())
  return _frozen(matrix_NN)


@functools.cache
def zoom_matrix(length: int, factor: float) -> np.ndarray:
  """Cuts out the middle and enlarges it to at least the old length, linearly, ends on ends.

  As SciPy's `zoom` of order 1 on ceil(N / factor) samples; surplus is cut off on both sides.

  Returns:
    float32 [N, N], read-only.
  """
  kept = math.ceil(length / factor)
  first = (length - kept) // 2
  enlarged = round(kept * factor)
  place_P = (enlarged - length) // 2 + np.arange(length)
  place_P = place_P * ((kept - 1) / max(enlarged - 1, 1))
  low_P = np.minimum(place_P.astype(int), max(kept - 2, 0))
  matrix_PN = np.zeros((length, length))
  for row_N, low, place in zip(matrix_PN, low_P, place_P, strict=True):
    row_N[first + low] += 1 - (place - low)
    row_N[min(first + low + 1, length - 1)] += place - low
  return _frozen(matrix_PN)


def _reflected(place: np.ndarray, length: int) -> np.ndarray:
  """Places beyond the border walk back, the border itself not stepped twice."""
  place = place % (2 * (length - 1))
  return np.minimum(place, 2 * (length - 1) - place)


def _frozen(matrix: np.ndarray) -> np.ndarray:
  matrix = matrix.astype(np.float32)
  matrix.setflags(write=False)
  return matrix
