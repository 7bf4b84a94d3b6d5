"""Laws that every corruption keeps, and the draws of the noises. References: test_corruption_references.py."""

import math

import jax
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import corruptions
from folk_jax.signal.corruptions import CORRUPTIONS

NAMES = sorted(CORRUPTIONS)
# The reference's own severities do not rise for these: glass trades its three parameters against each
# other, elastic its affine part against its field, and saturate takes colour away before it adds any.
UNORDERED = {'glass_blur', 'elastic_transform', 'saturate'}
DETERMINISTIC = {
  'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression',
  'gaussian_blur', 'saturate',
}  # fmt: skip

# Each severity is a program, and these take the longest to compile.
SLOW = {'fog', 'elastic_transform', 'snow', 'shot_noise', 'glass_blur', 'jpeg_compression'}

corrupt = jax.jit(corruptions.corrupt, static_argnums=(0, 3))


def photos(height, width, batch=3, seed=0):
  """Images with a spectrum that falls with frequency, as photographs have it; one pixel is black, one grey."""
  random = np.random.default_rng(seed)
  radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))[..., None]
  spectrum = np.fft.rfft2(random.normal(size=(batch, height, width, 3)), axes=(1, 2))
  image = np.fft.irfft2(spectrum / (radius + 0.03), s=(height, width), axes=(1, 2))
  image = np.clip(0.5 + 0.2 * image / image.std(), 0, 1).astype(np.float32)
  image[:, 3, 4], image[:, 5, 2] = 0, 0.5
  return image


def keys(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


IMAGE = photos(32, 24)


@pytest.mark.parametrize('name', NAMES)
def test_range_shape_and_severity(name):
  distance = []
  for severity in (1, 5) if name in SLOW else (1, 3, 5):
    image = np.asarray(corrupt(name, IMAGE, keys(3), severity))
    assert image.shape == IMAGE.shape and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1  # False for NaN, too.
    distance.append(np.sqrt(np.mean(np.square(image - IMAGE))))
  assert min(distance) > 0.01
  if name not in UNORDERED:
    assert np.all(np.diff(distance) > 0), distance


@pytest.mark.parametrize('name', NAMES)
def test_draws_depend_on_the_images_key_alone(name):
  order, image = np.asarray([2, 0, 1]), np.asarray(corrupt(name, IMAGE, keys(3), 5))
  moved = corrupt(name, IMAGE[order], keys(3)[order], 5)
  # The same program: nothing is left to rounding.
  np.testing.assert_array_equal(moved, image[order])
  others = np.abs(corrupt(name, IMAGE, keys(3, seed=1), 5) - image)
  if name in DETERMINISTIC:
    assert others.max() == 0
  else:
    assert np.all(others.max(axis=(1, 2, 3)) > 1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_both_lists_fit_their_function(name):
  corruption = CORRUPTIONS[name]
  for severities, side in ((corruption.large, 224), (corruption.small, 32)):
    assert len(set(severities)) == 5 == len(corruptions.SEVERITIES)
    image = jax.ShapeDtypeStruct((2, side, side + 3, 3), np.float32)
    for severity in corruptions.SEVERITIES:
      traced = jax.eval_shape(lambda x, s=severity: corruptions.corrupt(name, x, keys(2), s), image)
      assert traced.shape == image.shape and traced.dtype == image.dtype


@pytest.mark.parametrize(('side', 'factor'), [(64, 0.5), (65, 0.3)])
def test_the_shorter_side_chooses_the_list(side, factor):
  image = photos(80, side, batch=1)
  mean = image.mean(axis=(1, 2), keepdims=True)
  expected = mean + factor * (image - mean)
  np.testing.assert_allclose(corrupt('contrast', image, keys(1), 2), expected, atol=1e-6)


@pytest.mark.parametrize('photons', [3, 60, 100])
def test_shot_noise_is_poissons(photons):
  level = np.float32(0.5)
  fn = jax.jit(corruptions.shot_noise, static_argnums=2)
  flat = np.full((80, 80, 3), level, np.float32)
  count = np.asarray(fn(flat, jax.random.key(photons), photons), np.float64) * photons
  mean, draws = photons * level, count.size
  # Whole numbers, but for the division and back in float32.
  np.testing.assert_allclose(count, np.round(count), atol=1e-3)
  # Five standard errors; the variance of a variance is (2 mean^2 + mean) / n.
  assert abs(count.mean() - mean) < 5 * math.sqrt(mean / draws)
  assert abs(count.var() - mean) < 5 * math.sqrt((2 * mean**2 + mean) / draws)
  none = math.exp(-mean)
  assert abs((count < 0.5).mean() - none) < 5 * math.sqrt(none / draws) + 1 / draws
  assert np.asarray(fn(np.zeros_like(flat), jax.random.key(0), photons)).max() == 0


def test_gaussian_speckle_and_impulse_noise_have_their_moments():
  flat = np.full((128, 128, 3), 0.5, np.float32)
  draws = flat.size
  for fn, scale in ((corruptions.gaussian_noise, 1.0), (corruptions.speckle_noise, 0.5)):
    noise = np.asarray(fn(flat, jax.random.key(1), 0.2)) - flat
    sigma = 0.2 * scale
    # Five standard errors of a mean and of a deviation.
    assert abs(noise.mean()) < 5 * sigma / math.sqrt(draws)
    assert abs(noise.std() - sigma) < 5 * sigma / math.sqrt(2 * draws)
  salted = np.asarray(corruptions.impulse_noise(flat, jax.random.key(2), 0.3))
  for value, share in ((0, 0.15), (1, 0.15), (0.5, 0.7)):
    # Binomial, five deviations.
    assert abs((salted == value).mean() - share) < 5 * math.sqrt(share * (1 - share) / draws)
  channels = salted.reshape(-1, 3) == 0.5
  assert np.any(channels[:, 0] != channels[:, 1])


def test_mistakes_are_refused_in_words():
  with pytest.raises(
    UserError, match="unknown corruption 'gausian_noise'. Did you mean 'gaussian_n"
  ):
    corruptions.corrupt('gausian_noise', IMAGE, keys(3), 1)
  with pytest.raises(UserError, match="'frost'. It is left out: .* Known: gaussian_noise, shot"):
    corruptions.find('frost')
  for severity in (0, 6):
    with pytest.raises(UserError, match=f'severity of contrast is {severity}: choose 1'):
      corruptions.corrupt('contrast', IMAGE, keys(3), severity)
  with pytest.raises(UserError, match='images of 7 x 24 pixels: both sides must be at least 8'):
    corruptions.corrupt('contrast', IMAGE[:, :7], keys(3), 1)
