"""Low resolution, blur and noise: laws, hand-worked numbers, slow twins, MFM's numbers, PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import degrade

super_resolve_input = jax.jit(degrade.super_resolve_input, static_argnums=1)
blur = jax.jit(degrade.blur, static_argnames=('sizes', 'sigma'))
add_noise = jax.jit(degrade.add_noise, static_argnames=('sigma', 'gray_probability'))

KEYED = {'blur': blur, 'noise': add_noise}


def random_image(height, width, batch=2, seed=0):
  random = np.random.default_rng(seed)
  return random.random((batch, height, width, 3), dtype=np.float32)


def keys(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


def reflected(index, length):
  """Walks back from the borders until it stands inside; the border itself is not stepped twice."""
  while not 0 <= index < length:
    index = -index if index < 0 else 2 * (length - 1) - index
    if length == 1:
      return 0
  return index


def twin_correlate(image_HWC, size, sigma):
  """A two-dimensional Gaussian kernel, value by value, over a reflected image."""
  reach, (height, width, _) = size // 2, image_HWC.shape
  total, weights = np.zeros(image_HWC.shape), 0.0
  for dy in range(-reach, reach + 1):
    for dx in range(-reach, reach + 1):
      weight = math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
      rows = [reflected(y + dy, height) for y in range(height)]
      columns = [reflected(x + dx, width) for x in range(width)]
      total += weight * image_HWC[np.ix_(rows, columns)]
      weights += weight
  return total / weights


def twin_bicubic(image_HWC, height, width):
  """Each output value as a sum over the 4 x 4 pixels around the place it is taken from."""

  def weight(d, a=-0.75):
    d = abs(d)
    if d < 1:
      return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

  rows, columns, channels = image_HWC.shape
  result = np.zeros((height, width, channels))
  for y in range(height):
    for x in range(width):
      from_y, from_x = (y + 0.5) * rows / height - 0.5, (x + 0.5) * columns / width - 0.5
      for j in range(math.floor(from_y) - 1, math.floor(from_y) + 3):
        for i in range(math.floor(from_x) - 1, math.floor(from_x) + 3):
          value = image_HWC[min(max(j, 0), rows - 1), min(max(i, 0), columns - 1)]
          result[y, x] += weight(from_y - j) * weight(from_x - i) * value
  return result


@pytest.mark.parametrize(('case', 'factor'), [('64x64_f8', 8), ('32x32_f4', 4)])
def test_super_resolution_matches_mfm(golden, case, factor):
  arrays = golden('degradations')
  low = super_resolve_input(arrays[f'sr.{case}.x'], factor)
  # The golden file's own tolerance, for float32 against float64.
  np.testing.assert_allclose(low, arrays[f'sr.{case}.up'], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize('case', ['iso7', 'iso21', 'iso9_small'])
def test_blur_matches_mfm(golden, case):
  arrays = golden('degradations')
  size, sigma = int(arrays[f'blur.{case}.params'][0]), float(arrays[f'blur.{case}.params'][1])
  kernel_T = degrade.gaussian_kernels((size,), sigma)[0]
  # The golden file's own tolerances: its sigma matrix, and OpenCV's sums, are float32.
  np.testing.assert_allclose(
    np.outer(kernel_T, kernel_T), arrays[f'blur.{case}.kernel'], atol=1e-6, rtol=1e-5
  )
  expected = arrays[f'blur.{case}.out']
  batch = len(expected)
  blurred = blur(arrays['blur.x'][:batch], keys(batch), sizes=(size,), sigma=sigma)
  np.testing.assert_allclose(blurred, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
  ('height', 'width', 'factor'), [(17, 23, 8), (9, 8, 3), (8, 8, 8), (5, 7, 2)]
)
def test_super_resolution_is_the_twins(height, width, factor):
  # Black and white alone, so that the clamps have something to cut.
  image = np.round(random_image(height, width, batch=1))
  small = twin_bicubic(image[0], height // factor, width // factor)
  large = twin_bicubic(np.clip(small, 0, 1), height, width)
  # Sums of eight float32 products of numbers near 1, twice.
  low = super_resolve_input(image, factor)
  np.testing.assert_allclose(low[0], np.clip(large, 0, 1), atol=2e-6)


@pytest.mark.parametrize(('height', 'width'), [(12, 9), (5, 3), (2, 7), (1, 4)])
def test_blur_reflects_the_borders_as_the_twin_does(height, width):
  image = random_image(height, width, batch=1)
  blurred = blur(image, keys(1), sizes=(11,), sigma=2.5)
  np.testing.assert_allclose(blurred[0], twin_correlate(image[0], 11, 2.5), atol=2e-6)


def test_bicubic_worked_by_hand():
  # Twice as many samples: places a quarter to the left and to the right of each.
  near, far = (1.25 * 0.25 - 2.25) * 0.0625 + 1, (1.25 * 0.75 - 2.25) * 0.5625 + 1
  beyond = -0.75 * (1.25 - 1) * (1.25 - 2) ** 2
  furthest = -0.75 * (1.75 - 1) * (1.75 - 2) ** 2
  assert near + far + beyond + furthest == 1
  matrix = degrade.bicubic_matrix(4, 8)
  np.testing.assert_array_equal(matrix[3], [beyond, near, far, furthest])
  np.testing.assert_array_equal(matrix[4], [furthest, far, near, beyond])
  # Two of the four lie beyond the border, where the first sample is repeated.
  np.testing.assert_array_equal(matrix[0], [furthest + far + near, beyond, 0, 0])


def test_overshoot_beside_an_edge_is_cut():
  step_N = np.repeat([0, 1], 12).astype(np.float32)
  small_P = degrade.bicubic_matrix(24, 8) @ step_N
  large_N = degrade.bicubic_matrix(8, 24) @ small_P
  assert large_N.min() < -0.01 and large_N.max() > 1.01
  low = super_resolve_input(np.tile(step_N[:, None, None], (1, 1, 24, 3)), 3)
  assert low.min() == 0 and low.max() == 1


def test_reflection_worked_by_hand():
  (matrix,) = degrade.reflected_correlation(np.asarray([[0.25, 0.5, 0.25]]), 3)
  np.testing.assert_array_equal(matrix, [[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0, 0.5, 0.5]])


def test_kernels_are_mfms_sizes_and_sum_to_one():
  kernels_ST = degrade.gaussian_kernels(degrade.BLUR_SIZES, degrade.BLUR_SIGMA)
  assert degrade.BLUR_SIZES == tuple(range(7, 22, 2))
  np.testing.assert_array_equal((kernels_ST > 0).sum(axis=1), degrade.BLUR_SIZES)
  np.testing.assert_allclose(kernels_ST.sum(axis=1), 1, atol=1e-15)
  np.testing.assert_array_equal(kernels_ST, kernels_ST[:, ::-1])
  ratio = kernels_ST[-1, 15] / kernels_ST[-1, 10]
  assert ratio == pytest.approx(math.exp(-0.5))  # five pixels are one sigma


def test_constant_images_stay_as_they_are():
  image = np.full((2, 24, 17, 3), 0.4, np.float32)
  np.testing.assert_allclose(super_resolve_input(image, 8), image, atol=1e-6)
  np.testing.assert_allclose(blur(image, keys(2)), image, atol=1e-6)


def test_factor_one_and_size_one_change_nothing():
  image = random_image(9, 6)
  np.testing.assert_array_equal(super_resolve_input(image, 1), image)
  np.testing.assert_array_equal(blur(image, keys(2), sizes=(1,)), image)


@pytest.mark.parametrize('axis', [1, 2])
def test_blur_and_low_resolution_commute_with_flips(axis):
  image = random_image(24, 16)
  flipped = np.flip(image, axis)
  blurred = blur(image, keys(2))
  np.testing.assert_allclose(blur(flipped, keys(2)), np.flip(blurred, axis), atol=1e-6)
  low = super_resolve_input(image, 8)
  np.testing.assert_allclose(super_resolve_input(flipped, 8), np.flip(low, axis), atol=2e-6)


def test_blur_is_linear_and_not_clamped():
  image = random_image(16, 24)
  # Values up to 4, and sums of 21 products along two axes.
  expected = 5 * blur(image, keys(2)) - 1
  np.testing.assert_allclose(blur(5 * image - 1, keys(2)), expected, atol=5e-6)
  assert expected.max() > 1


def test_every_size_of_the_list_is_drawn_equally_often():
  batch, sizes = 800, (1, 3, 5, 7)
  impulse = np.zeros((batch, 9, 9, 1), np.float32)
  impulse[:, 4, 4] = 1
  width_B = (np.asarray(blur(impulse, keys(batch), sizes=sizes))[:, 4, :, 0] > 0).sum(axis=1)
  counts = [int((width_B == size).sum()) for size in sizes]
  assert sum(counts) == batch
  # Binomial with mean 200 and deviation 12.2: five deviations.
  assert all(abs(count - 200) < 62 for count in counts), counts


@pytest.mark.parametrize('name', sorted(KEYED))
def test_draws_depend_on_the_images_key_alone(name):
  corrupt, image, order = KEYED[name], random_image(24, 16, batch=5), np.asarray([3, 0, 4, 2, 1])
  corrupted = np.asarray(corrupt(image, keys(5)))
  np.testing.assert_array_equal(corrupt(image[order], keys(5)[order]), corrupted[order])
  alone = corrupt(image[3:4], keys(5)[3:4])
  np.testing.assert_allclose(alone[0], corrupted[3], atol=1e-6)
  others = np.asarray(corrupt(image, keys(5, seed=1)))
  assert np.abs(others - corrupted).max() > 1e-2


def test_noise_has_mfms_deviation_and_no_clamp():
  image = random_image(64, 64, batch=4)
  noise = np.asarray(add_noise(image, keys(4))) - image
  # 49152 draws: five standard errors of the mean, sigma / sqrt(n), and of the deviation, that /
  # sqrt(2).
  sigma, error = 75 / 255, 75 / 255 / math.sqrt(noise.size)
  assert abs(noise.mean()) < 5 * error
  assert abs(noise.std() - sigma) < 5 * error / math.sqrt(2)
  # A Gaussian has 4.55 % of its draws beyond two deviations; binomial, five deviations.
  assert abs((np.abs(noise) > 2 * sigma).mean() - 0.0455) < 5 * math.sqrt(0.0434 / noise.size)
  assert (image + noise).min() < 0 and (image + noise).max() > 1
  channels_NC = noise.reshape(-1, 3)
  correlation = np.corrcoef(np.concatenate([channels_NC, noise[::-1].reshape(-1, 3)], 1).T)
  # Channels and images are independent: correlations of 16384 pairs, five deviations.
  assert np.abs(correlation - np.eye(6)).max() < 5 / math.sqrt(16384)


def test_noise_scales_with_sigma_and_ignores_the_image():
  zeros = np.zeros((2, 8, 8, 3), np.float32)
  unit = np.asarray(add_noise(zeros, keys(2), sigma=1.0))
  image = random_image(8, 8)
  np.testing.assert_allclose(add_noise(image, keys(2), sigma=0.3), image + 0.3 * unit, atol=1e-6)
  np.testing.assert_array_equal(add_noise(image, keys(2), sigma=0.0), image)


def test_gray_noise_is_the_first_channels_and_comes_as_often_as_asked():
  zeros = np.zeros((400, 2, 2, 3), np.float32)
  colour = np.asarray(add_noise(zeros, keys(400)))
  gray = np.asarray(add_noise(zeros, keys(400), gray_probability=1.0))
  # Two programs: the compiler may round the last bit of numbers near 1 another way.
  np.testing.assert_allclose(gray, np.broadcast_to(colour[..., :1], gray.shape), atol=1e-6)
  mixed = np.asarray(add_noise(zeros, keys(400), gray_probability=0.25))
  gray_B = np.all(mixed == mixed[..., :1], axis=(1, 2, 3))
  expected = np.where(gray_B[:, None, None, None], gray, colour)
  np.testing.assert_allclose(mixed, expected, atol=1e-6)
  # Binomial with mean 100 and deviation 8.7: five deviations.
  assert abs(gray_B.sum() - 100) < 44
  # Which images are gray says nothing of their noise: a correlation of 400 pairs, five deviations.
  assert abs(np.corrcoef(gray_B, colour[:, 0, 0, 0])[0, 1]) < 5 / math.sqrt(400)


def test_mistakes_are_refused_in_words():
  image = jnp.zeros((1, 6, 9, 3))
  with pytest.raises(UserError, match='factor is 8 for images of 6 x 9 pixels: choose from 1 to 6'):
    degrade.super_resolve_input(image)
  with pytest.raises(UserError, match='factor is 0'):
    degrade.super_resolve_input(image, 0)
  for sizes in ((), (7, 8), (-1,)):
    with pytest.raises(UserError, match='odd numbers'):
      degrade.blur(image, keys(1), sizes=sizes)
  for sigma in (0.0, -1.0, math.nan, math.inf):
    with pytest.raises(UserError, match='choose it above 0'):
      degrade.blur(image, keys(1), sigma=sigma)
  for sigma in (-0.1, math.nan):
    with pytest.raises(UserError, match='choose it 0 or above'):
      degrade.add_noise(image, keys(1), sigma=sigma)
  with pytest.raises(UserError, match='from 0 to 1'):
    degrade.add_noise(image, keys(1), gray_probability=1.5)


@pytest.mark.parity
@pytest.mark.parametrize(('height', 'width', 'factor'), [(224, 224, 8), (57, 83, 8), (32, 45, 4)])
def test_super_resolution_matches_torch(height, width, factor):
  import torch

  image = np.round(random_image(height, width))
  theirs = torch.from_numpy(np.moveaxis(image, -1, 1)).double()
  for size in ((height // factor, width // factor), (height, width)):
    theirs = torch.nn.functional.interpolate(
      theirs, size=size, mode='bicubic', align_corners=False
    ).clamp(0, 1)
  expected = np.moveaxis(theirs.numpy(), 1, -1)
  np.testing.assert_allclose(super_resolve_input(image, factor), expected, atol=2e-6)
