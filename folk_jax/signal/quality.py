"""How near one image is to another: PSNR and SSIM, one number an image.

Shape letters: B images, H rows, W columns, C channels, P = N - 10 window positions along an axis of N pixels.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from folk_jax.errors import UserError

# Wang et al. 2004, section III-B and III-C: an 11 x 11 Gaussian window and the two constants.
WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(image_BHWC: jax.Array, clean_BHWC: jax.Array, ceiling: float = math.inf) -> jax.Array:
  """Peak signal-to-noise ratio, -10 log10 of the mean squared error over pixels and channels.

  Args:
    image_BHWC: float32 in [0, 1], so that the peak is 1.
    clean_BHWC: the same shape; the measure is symmetric.
    ceiling: the largest value returned, in dB. Equal images have infinitely many; a finite ceiling
      keeps a mean over images finite.

  Returns:
    float32 [B], in dB.
  """
  _check_pair(image_BHWC, clean_BHWC)
  error_B = jnp.mean(jnp.square(image_BHWC - clean_BHWC), axis=(1, 2, 3))
  return jnp.minimum(-10 * jnp.log10(error_B), ceiling)


def ssim(image_BHWC: jax.Array, clean_BHWC: jax.Array) -> jax.Array:
  """Mean structural similarity (Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, equation 13).

  Means, variances and covariance under an 11 x 11 Gaussian window of sigma 1.5, population
  statistics, K1 = 0.01, K2 = 0.03, a dynamic range of 1; averaged over the places where the window
  fits into the image, then over channels, each taken alone. That is scikit-image's
  `structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.

  Args:
    image_BHWC: float32 in [0, 1].
    clean_BHWC: the same shape; the measure is symmetric.

  Returns:
    float32 [B], at most 1, which equal images have.

  Raises:
    UserError: a side is shorter than the window.
  """
  _check_pair(image_BHWC, clean_BHWC)
  height, width = image_BHWC.shape[1:3]
  if min(height, width) < WINDOW:
    raise UserError(
      f'SSIM looks through a window of {WINDOW} x {WINDOW} pixels and the images have '
      f'{height} x {width}: use larger images, or PSNR alone'
    )
  # Variances as E[x^2] - E[x]^2 lose digits to the mean: each image's own, which they don't depend
  # on, is taken out first.
  offset_x, offset_y = (
    jnp.mean(each, axis=(1, 2), keepdims=True) for each in (image_BHWC, clean_BHWC)
  )
  x, y = image_BHWC - offset_x, clean_BHWC - offset_y
  mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
    _windowed(each) for each in (x, y, x * x, y * y, x * y)
  )
  variances = mean_xx - mean_x * mean_x + mean_yy - mean_y * mean_y
  covariance = mean_xy - mean_x * mean_y
  mean_x, mean_y = mean_x + offset_x, mean_y + offset_y
  c1, c2 = _K1**2, _K2**2
  likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
  likeness /= (mean_x * mean_x + mean_y * mean_y + c1) * (variances + c2)
  return jnp.mean(likeness, axis=(1, 2, 3))


def _windowed(image_BHWC: jax.Array) -> jax.Array:
  """The window's weighted mean wherever it fits: [B, H - 10, W - 10, C]."""
  rows_PH, columns_PW = (_window_matrix(side) for side in image_BHWC.shape[1:3])
  product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  return product('qw,bpwc->bpqc', columns_PW, product('ph,bhwc->bpwc', rows_PH, image_BHWC))


@functools.cache
def _window_matrix(length: int) -> np.ndarray:
  """Rows of the one-dimensional window at every place: float32 [P, N]."""
  offset = np.arange(WINDOW) - WINDOW // 2
  weights = np.exp(-0.5 * np.square(offset / _SIGMA))
  weights /= weights.sum()
  matrix_PN = np.zeros((length - WINDOW + 1, length), np.float32)
  for place, row_N in enumerate(matrix_PN):
    row_N[place : place + WINDOW] = weights
  matrix_PN.setflags(write=False)
  return matrix_PN


def _check_pair(image_BHWC: jax.Array, clean_BHWC: jax.Array) -> None:
  chex.assert_rank(image_BHWC, 4)
  chex.assert_equal_shape([image_BHWC, clean_BHWC])
  chex.assert_type([image_BHWC, clean_BHWC], jnp.float32)
