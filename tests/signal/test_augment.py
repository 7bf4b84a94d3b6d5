"""Augmentation: laws, numbers worked by hand, and NumPy twins of every operation."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import augment
from folk_jax.signal.augment import Augmentation, Jitter

# The second view's recipe (arXiv 2104.14294), with the blur of the first.
EVERYTHING = Augmentation(
  brightness=0.4,
  contrast=0.4,
  saturation=0.2,
  hue=0.1,
  jitter_probability=0.8,
  grayscale_probability=0.2,
  blur_probability=0.5,
  solarise_probability=0.2,
)
LUMA = np.asarray([0.299, 0.587, 0.114])

augmented = jax.jit(augment.augment, static_argnums=2)
gaussian_blur = jax.jit(augment.gaussian_blur, static_argnums=2)
jitter = jax.jit(augment.jitter)


def random_image(batch, height, width, seed=0):
  random = np.random.default_rng(seed)
  return random.random((batch, height, width, 3), dtype=np.float32)


def keys(number, seed=0):
  return jax.random.split(jax.random.key(seed), number)


def channels_first(image):
  return jnp.moveaxis(image, -1, 1)


def channels_last(image):
  return np.moveaxis(np.asarray(image), 1, -1)


def twin(image_HWC, operation, amount):
  """One operation of the jitter on one image, by the book."""
  if operation == Jitter.HUE:

    def turn(pixel):
      hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
      return colorsys.hsv_to_rgb((hue + amount) % 1, saturation, value)

    return np.apply_along_axis(turn, -1, image_HWC)
  luma = (image_HWC @ LUMA)[..., None]
  grey = {Jitter.BRIGHTNESS: 0, Jitter.CONTRAST: luma.mean(), Jitter.SATURATION: luma}[operation]
  return np.clip(amount * image_HWC + (1 - amount) * grey, 0, 1)


def test_every_order_of_the_jitter_equals_its_operations_one_by_one():
  orders = list(itertools.permutations(range(4)))
  image = random_image(len(orders), 4, 5)
  # Strong amounts on both sides of neutral, so that clipping makes the orders differ.
  random = np.random.default_rng(1)
  amounts = {
    Jitter.BRIGHTNESS: random.uniform(0.3, 1.8, len(orders)),
    Jitter.CONTRAST: random.uniform(0.3, 1.8, len(orders)),
    Jitter.SATURATION: random.uniform(0.0, 2.0, len(orders)),
    Jitter.HUE: random.uniform(-0.5, 0.5, len(orders)),
  }
  ours = jitter(
    channels_first(image),
    jnp.asarray(orders),
    {operation: jnp.asarray(amount, jnp.float32) for operation, amount in amounts.items()},
  )
  for i, order in enumerate(orders):
    expected = image[i].astype(np.float64)
    for number in order:
      operation = list(amounts)[number]
      expected = twin(expected, operation, amounts[operation][i])
    # Hue divides by the chroma: a few float32 roundings, enlarged where colours are nearly grey.
    np.testing.assert_allclose(channels_last(ours)[i], expected, atol=1e-5)


def test_jitter_worked_by_hand():
  # Two pixels: luma 0.299 and 0.587, mean 0.443.
  image = jnp.asarray([[1.0, 0, 0], [0, 1, 0]]).reshape(1, 1, 2, 3)
  for operation, amount, expected in [
    (Jitter.BRIGHTNESS, 0.5, [[0.5, 0, 0], [0, 0.5, 0]]),
    (Jitter.CONTRAST, 0.5, [[0.7215, 0.2215, 0.2215], [0.2215, 0.7215, 0.2215]]),
    (Jitter.CONTRAST, 1.5, [[1, 0, 0], [0, 1, 0]]),
    (Jitter.SATURATION, 0.0, [[0.299] * 3, [0.587] * 3]),
    (Jitter.SATURATION, 0.5, [[0.6495, 0.1495, 0.1495], [0.2935, 0.7935, 0.2935]]),
    (Jitter.HUE, 1 / 3, [[0, 1, 0], [0, 0, 1]]),
    (Jitter.HUE, -1 / 6, [[1, 0, 1], [1, 1, 0]]),
  ]:
    result = jitter(
      channels_first(image), jnp.zeros((1, 1), jnp.int32), {operation: jnp.asarray([amount])}
    )
    np.testing.assert_allclose(channels_last(result)[0, 0], expected, atol=1e-6)


def test_hue_leaves_greys_alone():
  grey = jnp.broadcast_to(jnp.linspace(0, 1, 7)[:, None], (1, 3, 7, 1))
  np.testing.assert_array_equal(augment.shift_hue(grey, jnp.asarray([0.37])), grey)


def blur_twin(image_HWC, sigma, reach):
  offsets = np.arange(-reach, reach + 1)
  kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
  kernel /= kernel.sum()
  for axis in (0, 1):
    padding = [(0, 0)] * 3
    padding[axis] = (reach, reach)
    padded = np.pad(image_HWC, padding, mode='reflect')
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis)
    image_HWC = windows @ kernel
  return image_HWC


@pytest.mark.parametrize(('height', 'width'), [(9, 12), (3, 20), (1, 5)])
def test_blur_equals_its_twin(height, width):
  image = random_image(3, height, width)
  sigma = np.asarray([0.1, 1.0, 2.0])
  ours = gaussian_blur(channels_first(image), jnp.asarray(sigma, jnp.float32), 6)
  for i in range(3):
    expected = blur_twin(image[i].astype(np.float64), sigma[i], 6)
    np.testing.assert_allclose(channels_last(ours)[i], expected, atol=1e-6)


def test_blur_keeps_constants_and_the_mean_and_knows_sigma_zero():
  constant = jnp.full((1, 3, 8, 8), 0.7)
  np.testing.assert_allclose(gaussian_blur(constant, jnp.ones(1), 3), 0.7, atol=1e-6)
  image = channels_first(random_image(2, 32, 32))
  blurred = gaussian_blur(image, jnp.asarray([0.0, 2.0]), 6)
  np.testing.assert_array_equal(blurred[0], image[0])
  # Reflection gives the pixels near the border another weight; the rest of the mean is exact.
  np.testing.assert_allclose(blurred[1].mean(), image[1].mean(), atol=5e-3)
  assert blurred[1].std() < 0.25 * image[1].std()


def test_an_impulse_becomes_the_gaussian():
  impulse = jnp.zeros((1, 3, 15, 15)).at[:, :, 7, 7].set(1)
  row = np.asarray(gaussian_blur(impulse, jnp.ones(1), 3))[0, 0, 7]
  tail = np.exp(-np.asarray([0.5, 2.0, 4.5]))
  centre = 1 / (1 + 2 * tail.sum())  # 0.3990...
  np.testing.assert_allclose(row[7], centre**2, rtol=1e-5)
  np.testing.assert_allclose(row[8:11], tail * centre**2, rtol=1e-5)


def test_solarise_worked_by_hand():
  image = jnp.asarray([0.0, 0.25, 0.5, 0.75, 1.0, 0.49]).reshape(1, 1, 2, 3)
  settings = Augmentation(solarise_probability=1.0)
  result = augment.augment(image, keys(1), settings).ravel()
  np.testing.assert_allclose(result, [0, 0.25, 0.5, 0.25, 0, 0.49])


def test_grayscale_is_three_channels_of_luma():
  image = random_image(2, 4, 4)
  result = augment.augment(jnp.asarray(image), keys(2), Augmentation(grayscale_probability=1.0))
  np.testing.assert_allclose(result, np.repeat((image @ LUMA)[..., None], 3, -1), atol=1e-6)


@pytest.mark.parametrize('strength', [0.4, 1.5])
def test_the_whole_chain_stays_in_range(strength):
  settings = Augmentation(
    brightness=strength,
    contrast=strength,
    saturation=strength,
    hue=0.5,
    jitter_probability=1.0,
    grayscale_probability=0.2,
    blur_probability=0.5,
    solarise_probability=0.5,
  )
  image = random_image(64, 6, 7)
  image[:8] = image[:8] > 0.5
  result = augmented(image, keys(64), settings)
  assert result.shape == image.shape and result.dtype == jnp.float32
  # The blur's kernel sums to 1 up to rounding.
  assert -1e-6 <= result.min() and result.max() <= 1 + 1e-6


def test_an_image_depends_on_its_key_and_not_on_its_place():
  image, key = random_image(6, 8, 8), keys(6)
  order = np.asarray([3, 1, 5, 0, 4, 2])
  together = augmented(image, key, EVERYTHING)
  np.testing.assert_array_equal(augmented(image[order], key[order], EVERYTHING), together[order])
  # Another batch size is another program, which may sum in another order.
  np.testing.assert_allclose(augmented(image[2:3], key[2:3], EVERYTHING), together[2:3], atol=1e-6)
  assert not np.allclose(augmented(image, keys(6, seed=1), EVERYTHING), together)


@pytest.mark.parametrize(
  'settings', [Augmentation(), Augmentation(0.4, 0.4, 0.2, 0.1), Augmentation(jitter_probability=1)]
)
def test_probability_or_strength_zero_computes_nothing(settings):
  image = random_image(2, 4, 4)
  np.testing.assert_array_equal(augment.augment(jnp.asarray(image), keys(2), settings), image)
  jaxpr = jax.make_jaxpr(augment.augment, static_argnums=2)(image, keys(2), settings)
  assert {equation.primitive.name for equation in jaxpr.eqns} <= {'transpose'}


@pytest.mark.parametrize(
  ('settings', 'probability'),
  [
    (Augmentation(brightness=0.4, hue=0.1, jitter_probability=0.8), 0.8),
    (Augmentation(grayscale_probability=0.2), 0.2),
    (Augmentation(blur_probability=0.1, blur_sigma=(0.5, 1.0)), 0.1),
    (Augmentation(solarise_probability=0.2), 0.2),
  ],
)
def test_an_operation_happens_as_often_as_asked_and_else_leaves_every_bit(settings, probability):
  image = np.broadcast_to(random_image(1, 3, 3), (2000, 3, 3, 3))
  result = np.asarray(augmented(image, keys(2000), settings))
  untouched = (result == image).all(axis=(1, 2, 3))
  # Four standard deviations of 2000 draws: 4 * sqrt(p (1 - p) / 2000).
  spread = 4 * np.sqrt(probability * (1 - probability) / 2000)
  assert abs((~untouched).mean() - probability) < spread


def test_factors_are_uniform_around_one():
  image = jnp.full((4000, 1, 1, 3), 0.5)
  settings = Augmentation(brightness=0.4, jitter_probability=1.0)
  factor = np.asarray(augmented(image, keys(4000), settings))[:, 0, 0, 0] / 0.5
  assert 0.6 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.4 + 1e-6
  # Quartiles of a uniform draw; 4000 draws put them within 0.02 of their places.
  np.testing.assert_allclose(np.quantile(factor, [0.25, 0.5, 0.75]), [0.8, 1, 1.2], atol=0.02)


def test_switching_one_operation_off_leaves_the_draws_of_the_others():
  image = jnp.full((50, 2, 2, 3), 0.4)
  both = Augmentation(brightness=0.4, jitter_probability=0.5, solarise_probability=0.5)
  bright = augmented(image, keys(50), Augmentation(brightness=0.4, jitter_probability=0.5))
  inverted = augmented(bright, keys(50), Augmentation(solarise_probability=0.5))
  np.testing.assert_array_equal(augmented(image, keys(50), both), inverted)


@pytest.mark.parametrize(
  'fields',
  [
    {'hue': 0.6},
    {'brightness': -0.1},
    {'blur_probability': 1.2},
    {'blur_sigma': (2.0, 1.0)},
    {'blur_sigma': (0.0, 1.0)},
    {'solarise_threshold': 2.0},
  ],
)
def test_impossible_settings_are_refused(fields):
  with pytest.raises(UserError, match=next(iter(fields))):
    Augmentation(**fields)


def test_normalise_worked_by_hand():
  image = jnp.asarray([0.485, 0.456, 0.406, 0.714, 0.68, 0.631]).reshape(1, 1, 2, 3)
  np.testing.assert_allclose(augment.normalise(image)[0, 0], [[0] * 3, [1] * 3], atol=1e-6)
  twice = augment.normalise(image, mean=(0.0,) * 3, std=(0.5,) * 3)
  np.testing.assert_allclose(twice, 2 * image, rtol=1e-6)
