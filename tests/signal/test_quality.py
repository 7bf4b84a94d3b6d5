"""PSNR and SSIM: laws, numbers worked by hand, scikit-image's numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import metrics

from folk_jax.errors import UserError
from folk_jax.signal import quality

psnr = jax.jit(quality.psnr, static_argnums=2)
ssim = jax.jit(quality.ssim)


def pair(height, width, noise, seed=0, batch=3):
  """Smooth images and what noise makes of them; the second of each batch is nearly flat and bright."""
  random = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width][..., None] / 7.0
  phase = random.uniform(0, 6, (batch, 1, 1, 3))
  clean = 0.5 + 0.4 * np.sin(x + phase) * np.cos(y + 2 * phase)
  clean[1] = 0.9 + 0.01 * clean[1]
  image = clean + noise * random.normal(size=clean.shape)
  return (np.clip(each, 0, 1).astype(np.float32) for each in (image, clean))


@pytest.mark.parametrize(
  ('height', 'width', 'noise'), [(11, 11, 0.1), (11, 40, 0.02), (33, 26, 0.3), (64, 64, 0.005)]
)
def test_scikit_images_numbers(height, width, noise):
  image, clean = pair(height, width, noise)
  options = {'channel_axis': -1, 'data_range': 1.0}
  window = {'gaussian_weights': True, 'sigma': 1.5, 'use_sample_covariance': False}
  theirs = [
    metrics.structural_similarity(x.astype(float), y.astype(float), **options, **window)
    for x, y in zip(image, clean, strict=True)
  ]
  # Variances in float32 are good to 6e-8 of values near 0.1, beside a constant of 9e-4.
  np.testing.assert_allclose(ssim(image, clean), theirs, atol=1e-5)
  theirs = [
    metrics.peak_signal_noise_ratio(y.astype(float), x.astype(float), data_range=1.0)
    for x, y in zip(image, clean, strict=True)
  ]
  # The noise of 0.005 is a difference of numbers near 1, rounded to 6e-8: 1e-5 of it, in dB as much.
  np.testing.assert_allclose(psnr(image, clean), theirs, atol=1e-4)


def test_worked_by_hand():
  grey = np.full((1, 12, 15, 3), 0.5, np.float32)
  # A difference of 0.1 everywhere: a mean square of 0.01, 20 dB.
  np.testing.assert_allclose(psnr(grey + np.float32(0.1), grey), 20, atol=1e-4)
  # Half the values off by 0.2: 0.02.
  half = grey.copy()
  half[:, :6] += 0.2
  np.testing.assert_allclose(psnr(half, grey), -10 * math.log10(0.02), atol=1e-4)
  # Flat images have luminance alone: (2 * 0.5 * 0.6 + c1) / (0.25 + 0.36 + c1).
  expected = (0.6 + 1e-4) / (0.61 + 1e-4)
  np.testing.assert_allclose(ssim(grey + np.float32(0.1), grey), expected, atol=1e-6)


def test_an_image_is_like_itself():
  _, clean = pair(20, 16, 0.0)
  np.testing.assert_allclose(ssim(clean, clean), 1, atol=1e-6)
  assert np.all(np.isposinf(psnr(clean, clean)))
  np.testing.assert_array_equal(psnr(clean, clean, 90.0), 90)


def test_symmetric_and_falling_with_noise():
  measured = []
  for noise in (0.01, 0.05, 0.2):
    image, clean = pair(24, 24, noise)
    # The offset that SSIM takes out is the second image's: rounding alone may differ.
    np.testing.assert_allclose(ssim(clean, image), ssim(image, clean), atol=1e-5)
    np.testing.assert_array_equal(psnr(clean, image), psnr(image, clean))
    measured.append((psnr(image, clean), ssim(image, clean)))
  assert np.all(np.diff(np.asarray(measured), axis=0) < 0)


def test_images_do_not_affect_each_other():
  image, clean = pair(16, 16, 0.1)
  for measure in (psnr, ssim):
    whole = np.asarray(measure(image, clean))
    np.testing.assert_allclose(measure(image[1:2], clean[1:2])[0], whole[1], rtol=1e-6)


def test_images_smaller_than_the_window_are_refused_in_words():
  small = jnp.zeros((1, 10, 32, 3))
  with pytest.raises(UserError, match='11 x 11 pixels and the images have 10 x 32'):
    quality.ssim(small, small)
  with pytest.raises(AssertionError):
    quality.psnr(small, small[:, :5])
