"""MFM's restoration corruptions of a batch on the device: low resolution, Gaussian blur, noise.

The three tasks that MFM (arXiv 2206.07706) sets beside masked frequencies, with the constants of its
official code: super-resolution by 8, deblurring of isotropic Gaussians of sigma 5 and 7 to 21 taps,
denoising at sigma 75 / 255. Resizing and blurring are linear and separable, so each is one
matrix along the rows and one along the columns, made in NumPy while tracing: matrix products at full
precision, and no gather over pixels. Every draw depends on the image's key alone, so that an image
comes out the same whatever batch it travels in.

Shapes: B images, H rows, W columns, C channels; S kernel sizes of at most T taps; P of N positions
along an axis.
"""

import enum
import functools
import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from folk_jax.errors import UserError

FACTOR = 8
BLUR_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
BLUR_SIGMA = 5.0
NOISE_SIGMA = 75 / 255

# The cubic's slope at 1, as PyTorch and OpenCV have it; Pillow and Keys' own choice is -0.5.
_CUBIC_SLOPE = -0.75


class _Draw(enum.IntEnum):
  """What a key is folded with for each draw, so that no corruption disturbs another's draws."""

  BLUR_SIZE = 0
  NOISE = 1
  GRAY = 2


def super_resolve_input(image_BHWC: jax.Array, factor: int = FACTOR) -> jax.Array:
  """The image at a low resolution, in its own size: bicubic down, clamp, bicubic up, clamp.

  Bicubic as `torch.nn.functional.interpolate` has it with align_corners False: slope -0.75, the
  edge pixel repeated beyond the border, no antialiasing. Sides that `factor` does not divide go to
  the floor of the quotient and back.

  Args:
    image_BHWC: float32 in [0, 1].
    factor: how many times smaller the sides get; 1 or more.

  Returns:
    float32 [B, H, W, C] in [0, 1].

  Raises:
    UserError: `factor` is below 1 or above a side of the image.
  """
  chex.assert_rank(image_BHWC, 4)
  chex.assert_type(image_BHWC, jnp.float32)
  height, width = image_BHWC.shape[1:3]
  if not 1 <= factor <= min(height, width):
    raise UserError(
      f'the super-resolution factor is {factor} for images of {height} x {width} pixels: '
      f'choose from 1 to {min(height, width)}'
    )
  small_height, small_width = height // factor, width // factor
  small_BHWC = _along_both(
    image_BHWC, bicubic_matrix(height, small_height), bicubic_matrix(width, small_width)
  )
  large_BHWC = _along_both(
    jnp.clip(small_BHWC, 0, 1),
    bicubic_matrix(small_height, height),
    bicubic_matrix(small_width, width),
  )
  return jnp.clip(large_BHWC, 0, 1)


def blur(
  image_BHWC: jax.Array,
  keys_B: jax.Array,
  sizes: Sequence[int] = BLUR_SIZES,
  sigma: float = BLUR_SIGMA,
) -> jax.Array:
  """Correlates each image with a Gaussian of its own size, drawn uniformly from the list.

  Borders are reflected without repeating the edge pixel (OpenCV's reflect-101), again and again
  where an image is smaller than the kernel. Not clamped: the kernel is positive and sums to 1, so
  that the image stays within its range but for rounding.

  Args:
    image_BHWC: float32, any range.
    keys_B: typed PRNG keys, one an image.
    sizes: numbers of taps to draw from, odd.
    sigma: standard deviation in pixels.

  Returns:
    float32 [B, H, W, C].

  Raises:
    UserError: no size, an even one or one below 1; a sigma that is not above 0.
  """
  chex.assert_rank(image_BHWC, 4)
  chex.assert_type(image_BHWC, jnp.float32)
  chex.assert_shape(keys_B, image_BHWC.shape[:1])
  kernels_ST = gaussian_kernels(tuple(sizes), float(sigma))
  number_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(kernels_ST)))(
    _fold(keys_B, _Draw.BLUR_SIZE)
  )
  rows, columns = (
    jnp.take(reflected_correlation(kernels_ST, side), number_B, axis=0, mode='clip')
    for side in image_BHWC.shape[1:3]
  )
  return _along_both(image_BHWC, rows, columns)


def add_noise(
  image_BHWC: jax.Array,
  keys_B: jax.Array,
  sigma: float = NOISE_SIGMA,
  gray_probability: float = 0.0,
) -> jax.Array:
  """Adds independent Gaussian noise to every value; not clamped.

  Args:
    image_BHWC: float32, any range.
    keys_B: typed PRNG keys, one an image.
    sigma: standard deviation, in the image's units.
    gray_probability: that an image's channels share one plane of noise, the one its first channel
      would have had. MFM's denoising has 0.

  Returns:
    float32 [B, H, W, C].

  Raises:
    UserError: `sigma` is below 0, or the probability outside [0, 1].
  """
  chex.assert_rank(image_BHWC, 4)
  chex.assert_type(image_BHWC, jnp.float32)
  chex.assert_shape(keys_B, image_BHWC.shape[:1])
  if not 0 <= sigma < math.inf:
    raise UserError(f'the sigma of the noise is {sigma}: choose it 0 or above, MFM has 75 / 255')
  if not 0 <= gray_probability <= 1:
    raise UserError(f'gray_probability of the noise is {gray_probability}: choose it from 0 to 1')

  def sample(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, image_BHWC.shape[1:], jnp.float32)

  noise_BHWC = jax.vmap(sample)(_fold(keys_B, _Draw.NOISE))
  if gray_probability > 0:
    gray_B = jax.vmap(lambda key: jax.random.bernoulli(key, float(gray_probability)))(
      _fold(keys_B, _Draw.GRAY)
    )
    noise_BHWC = jnp.where(gray_B[:, None, None, None], noise_BHWC[..., :1], noise_BHWC)
  return image_BHWC + np.float32(sigma) * noise_BHWC


def gaussian_kernels(sizes: Sequence[int], sigma: float) -> np.ndarray:
  """One-dimensional Gaussians cut to odd sizes; an isotropic kernel is the outer product with itself.

  Args:
    sizes: numbers of taps, odd.
    sigma: standard deviation in pixels.

  Returns:
    float64 [S, T], T the largest size: each row centred, zero beyond its size, and summing to 1.

  Raises:
    UserError: no size, an even one or one below 1; a sigma that is not above 0.
  """
  if not sizes or any(size < 1 or size % 2 == 0 for size in sizes):
    raise UserError(f'the sizes of the blur are {tuple(sizes)}: give odd numbers, for instance 7')
  if not 0 < sigma < math.inf:
    raise UserError(f'the sigma of the blur is {sigma}: choose it above 0, MFM has 5')
  reach = max(sizes) // 2
  offset_T = np.arange(-reach, reach + 1)
  inside_ST = np.abs(offset_T) <= np.asarray(sizes)[:, None] // 2
  kernels_ST = inside_ST * np.exp(-0.5 * np.square(offset_T / sigma))
  return kernels_ST / kernels_ST.sum(axis=1, keepdims=True)


def reflected_correlation(kernels_ST: np.ndarray, length: int) -> np.ndarray:
  """The matrices that correlate a signal with each kernel, its borders reflected.

  Args:
    kernels_ST: centred kernels of an odd number of taps.
    length: N, samples of the signal, 1 or more.

  Returns:
    float32 [S, N, N]: row p holds the weights of the signal's samples in output p.
  """
  chex.assert_rank(kernels_ST, 2)
  reach = kernels_ST.shape[1] // 2
  # Beyond the border a signal runs back, without its last sample: a triangle wave of this period.
  period = max(2 * (length - 1), 1)
  phase_PT = (np.arange(length)[:, None] + np.arange(-reach, reach + 1)) % period
  sample_PT = np.minimum(phase_PT, 2 * (length - 1) - phase_PT)
  return _scatter(
    sample_PT, np.broadcast_to(kernels_ST[:, None], (len(kernels_ST), *sample_PT.shape)), length
  )


@functools.cache
def bicubic_matrix(length: int, target: int) -> np.ndarray:
  """The matrix of a one-dimensional bicubic resize, see `super_resolve_input`.

  Args:
    length: N, samples of the signal.
    target: P, samples of the result; both 1 or more.

  Returns:
    float32 [P, N], read-only; each row sums to 1.
  """
  centre_P = (np.arange(target) + 0.5) * length / target - 0.5
  sample_PT = np.floor(centre_P).astype(int)[:, None] + np.arange(-1, 3)
  weights_PT = _cubic(centre_P[:, None] - sample_PT)
  matrix_PN = _scatter(np.clip(sample_PT, 0, length - 1), weights_PT[None], length)[0]
  matrix_PN.setflags(write=False)
  return matrix_PN


def _cubic(distance: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel (IEEE TASSP 29(6), 1981, equation 4), with its slope at 1 free."""
  a, d = _CUBIC_SLOPE, np.abs(distance)
  near = ((a + 2) * d - (a + 3)) * d * d + 1
  far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
  return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _scatter(sample_PT: np.ndarray, weights_SPT: np.ndarray, length: int) -> np.ndarray:
  """Matrices that give sample_PT[p, t] the weight weights_SPT[s, p, t] in output p; repeats add up."""
  one_hot_PTN = sample_PT[..., None] == np.arange(length)
  matrix_SPN = np.einsum('spt,ptn->spn', weights_SPT, one_hot_PTN)
  return matrix_SPN.astype(np.float32)


def _along_both(image_BHWC: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Multiplies by a matrix along each axis: one [P, N] for all images, or one [B, P, N] for each."""
  batch = 'b' if rows.ndim == 3 else ''
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  image_BHWC = product(f'{batch}ph,bhwc->bpwc', rows, image_BHWC)
  return product(f'{batch}pw,bhwc->bhpc', columns, image_BHWC)


def _fold(keys_B: jax.Array, draw: _Draw) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, int(draw)))(keys_B)
