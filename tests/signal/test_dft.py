"""The transform as matrix products against NumPy's FFT, and that both back-ends filter alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import dft, fourier

# Sums of some hundred float32 products of images in [0, 1]: coefficients up to H * W.
SIZES = [(8, 8), (7, 5), (6, 9), (5, 8), (48, 64), (1, 4)]


def images(height, width, batch=3):
  return np.random.default_rng(0).random((batch, height, width, 3), np.float32)


@pytest.mark.parametrize('norm', ['backward', 'ortho'])
@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('backend', dft.BACKENDS)
def test_forward_and_backward_are_numpys(backend, height, width, norm):
  image = images(height, width)
  wanted = np.fft.rfft2(image.astype(np.float64), axes=(1, 2), norm=norm)
  found = jax.jit(dft.forward, static_argnums=(1, 2))(image, backend, norm)
  assert found.dtype == np.complex64 and found.shape == wanted.shape
  np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())
  back = jax.jit(dft.backward, static_argnums=(1, 2, 3))(
    jnp.asarray(wanted, jnp.complex64), width, backend, norm
  )
  np.testing.assert_allclose(back, image, atol=2e-6)


@pytest.mark.parametrize('height, width', [(6, 8), (6, 7)])
def test_what_no_real_image_has_is_left_out_as_by_irfft2(height, width):
  rng = np.random.default_rng(1)
  shape = 2, height, width // 2 + 1, 3
  spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
  wanted = np.fft.irfft2(spectrum, s=(height, width), axes=(1, 2))
  np.testing.assert_allclose(dft.backward(spectrum, width, 'matmul'), wanted, atol=1e-6)


def test_both_back_ends_filter_alike():
  image = images(32, 32, batch=8)
  k_B, com_B = np.full(8, 51, np.int32), np.arange(8) % 2 == 0
  by_fft, by_matmul = (
    fourier.filter_images(image, k_B, com_B, backend=backend) for backend in dft.BACKENDS
  )
  # Random images have no ties at the threshold: the same coefficients.
  np.testing.assert_array_equal(by_fft.kept_BHFC, by_matmul.kept_BHFC)
  np.testing.assert_allclose(by_fft.image_BHWC, by_matmul.image_BHWC, atol=2e-6)


def test_both_back_ends_have_one_distance_and_gradient():
  prediction, target = images(16, 12), images(16, 12)[::-1].copy()
  masked = np.random.default_rng(2).random((3, 16, 7, 1)) < 0.5

  def total(prediction, backend):
    return fourier.frequency_distance(prediction, target, masked, 1.0, backend)[0].sum()

  of_both = [
    jax.jit(jax.value_and_grad(functools.partial(total, backend=backend)))(prediction)
    for backend in dft.BACKENDS
  ]
  np.testing.assert_allclose(of_both[0][0], of_both[1][0], rtol=1e-6)
  # Unit phasors, summed over some hundred coefficients with a weight of 1 / sqrt(H W).
  np.testing.assert_allclose(of_both[0][1], of_both[1][1], atol=1e-5)


def test_products_run_in_full_precision():
  """A TPU would round the factors to bfloat16."""
  spectrum = np.ones((1, 8, 5, 3), np.complex64)
  forward = jax.jit(functools.partial(dft.forward, backend='matmul')).lower(images(8, 8)).as_text()
  backward = jax.jit(functools.partial(dft.backward, width=8, backend='matmul'))
  for text in (forward, backward.lower(spectrum).as_text()):
    assert text.count('dot_general') == text.count('precision = [HIGHEST, HIGHEST]') > 0
    assert 'fft' not in text.replace('matmul', '')


def test_an_unknown_back_end_is_refused():
  with pytest.raises(UserError, match="'fftw'.*Known: fft, matmul"):
    dft.forward(images(4, 4), 'fftw')
