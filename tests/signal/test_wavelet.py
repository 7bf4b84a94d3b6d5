"""Wavelet transforms: laws, hand-worked numbers, a slow twin, PyWavelets' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import wavelet
from folk_jax.signal.wavelet import Bands, Decomposition

dwt = jax.jit(wavelet.dwt, static_argnums=(1, 2))
idwt = jax.jit(wavelet.idwt, static_argnums=(1, 2, 3))

NAMES = tuple(wavelet.WAVELETS)
# Polynomials below this degree have no details.
MOMENTS = {'haar': 1, 'db2': 2, 'db3': 3, 'db4': 4, 'sym4': 4}
# Height, width, levels: divisible, odd, not square, shorter than the filters, the most levels.
CASES = [(12, 4, 2), (7, 9, 3), (2, 3, 1)]


def random_image(height, width, batch=2, channels=3, seed=0):
  random = np.random.default_rng(seed)
  return random.random((batch, height, width, channels), dtype=np.float32)


def random_like(tree, seed=0):
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, dtype=np.float32), tree)


def assert_trees_close(actual, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def transpose(linear, primal):
  """What reverse-mode differentiation makes of a linear function, compiled."""
  pull = jax.linear_transpose(linear, primal)
  return jax.jit(lambda cotangent: pull(cotangent)[0])


def twin_analyse(signal_N, name):
  """Convolution of one row with a filter, every second value of it: a loop over the definition."""
  low = np.asarray(wavelet.WAVELETS[name])[::-1]
  high = np.asarray([(-1) ** (j + 1) * low[low.size - 1 - j] for j in range(low.size)])
  if signal_N.size % 2:
    signal_N = np.append(signal_N, signal_N[-1])
  bands = np.zeros((2, signal_N.size // 2))
  for band, taps in zip(bands, (low, high), strict=True):
    for k in range(band.size):
      for j, tap in enumerate(taps):
        band[k] += tap * signal_N[(taps.size // 2 + 2 * k - j) % signal_N.size]
  return bands


def twin_dwt(image_HW, name, levels):
  details = []
  for _ in range(levels):
    low_high = np.apply_along_axis(twin_analyse, 0, image_HW, name)
    bands = [np.apply_along_axis(twin_analyse, 1, part, name) for part in low_high]
    (image_HW, vertical), (horizontal, diagonal) = (np.moveaxis(part, 1, 0) for part in bands)
    details.append((horizontal, vertical, diagonal))
  return image_HW, details


def test_the_grid_holds_every_wavelet():
  assert set(MOMENTS) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_filters_are_orthonormal_and_vanish_on_polynomials(name):
  taps = np.asarray(wavelet.WAVELETS[name])
  # The constants are published with 12 to 16 digits; the powers below reach 7 ** 3.
  assert taps.sum() == pytest.approx(np.sqrt(2), abs=1e-11)
  for shift in range(taps.size // 2):
    product = taps[2 * shift :] @ taps[: taps.size - 2 * shift]
    assert product == pytest.approx(float(shift == 0), abs=1e-11)
  signs, places = (-1.0) ** np.arange(taps.size), np.arange(taps.size)
  for power in range(MOMENTS[name]):
    assert taps @ (signs * places**power) == pytest.approx(0, abs=1e-9)
  assert abs(taps @ (signs * places ** MOMENTS[name])) > 0.1


def test_db4_has_its_energy_earlier_than_sym4():
  # Both have the same magnitude response; Daubechies' filters are the ones of minimal phase.
  db4, sym4 = (np.asarray(wavelet.WAVELETS[name]) for name in ('db4', 'sym4'))
  assert np.all(np.cumsum(db4**2)[:-1] > np.cumsum(sym4**2)[:-1])


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('height', 'width', 'levels'), CASES)
def test_transform_is_the_twins_and_its_inverse_restores_the_image(name, height, width, levels):
  image = random_image(height, width)
  decomposition = dwt(image, name, levels)
  # Sums of some ten float32 products of numbers up to 2 ** levels.
  np.testing.assert_allclose(idwt(decomposition, name, height, width), image, atol=3e-6)
  shapes = wavelet.band_shapes(height, width, levels)
  assert [bands.horizontal.shape[1:3] for bands in decomposition.details] == list(shapes)
  approximation, details = twin_dwt(image[1, :, :, 2], name, levels)
  ours = jax.tree.map(lambda band: band[1, :, :, 2], decomposition)
  np.testing.assert_allclose(ours.approximation_BHWC, approximation, atol=5e-6)
  assert_trees_close([tuple(bands) for bands in ours.details], details, atol=5e-6)


@pytest.mark.parametrize('name', NAMES)
def test_energy_is_kept(name):
  image = random_image(12, 4)
  energy = sum(np.square(band).sum() for band in jax.tree.leaves(dwt(image, name, 2)))
  # A few hundred float32 squares.
  np.testing.assert_allclose(energy, np.square(image).sum(), rtol=1e-5)


@pytest.mark.parametrize('name', ['haar', 'db4'])
def test_gradients_of_an_orthonormal_transform_are_its_inverse(name):
  image = random_image(8, 12)
  decomposition = dwt(image, name, 1)
  transposed = transpose(lambda image: wavelet.dwt(image, name, 1), image)
  transposed_inverse = transpose(lambda d: wavelet.idwt(d, name, 8, 12), decomposition)
  coefficients = random_like(decomposition)
  # Sums of some hundred float32 products of numbers near 1.
  np.testing.assert_allclose(transposed(coefficients), idwt(coefficients, name, 8, 12), atol=5e-6)
  assert_trees_close(transposed_inverse(image), decomposition, atol=5e-6)


def test_gradient_through_transform_and_inverse_is_the_identity_for_odd_sizes_too():
  image = random_image(7, 9)
  back = transpose(lambda image: wavelet.idwt(wavelet.dwt(image, 'db2', 2), 'db2', 7, 9), image)
  np.testing.assert_allclose(back(image), image, atol=3e-6)


def test_transform_is_linear():
  first, second = random_image(7, 9), random_image(7, 9, seed=1)
  separate = jax.tree.map(lambda a, b: 2 * a - 3 * b, dwt(first, 'db2', 3), dwt(second, 'db2', 3))
  assert_trees_close(dwt(2 * first - 3 * second, 'db2', 3), separate, atol=2e-5)


@pytest.mark.parametrize('name', NAMES)
def test_constant_image_has_no_details(name):
  decomposition = dwt(np.full((2, 12, 4, 3), 0.75, np.float32), name, 2)
  np.testing.assert_allclose(decomposition.approximation_BHWC, 4 * 0.75, rtol=1e-6)
  for band in jax.tree.leaves(decomposition.details):
    np.testing.assert_allclose(band, 0, atol=2e-6)


def test_transposed_image_swaps_horizontal_and_vertical():
  image = random_image(7, 10)
  decomposition = dwt(image, 'db2', 2)
  swapped = dwt(np.swapaxes(image, 1, 2), 'db2', 2)
  back = jax.tree.map(lambda band: jnp.swapaxes(band, 1, 2), swapped)
  assert_trees_close(back.approximation_BHWC, decomposition.approximation_BHWC, atol=2e-6)
  for bands, theirs in zip(decomposition.details, back.details, strict=True):
    expected = Bands(theirs.vertical, theirs.horizontal, theirs.diagonal)
    assert_trees_close(bands, expected, atol=2e-6)


def test_periodic_shift_by_four_pixels_shifts_the_second_level_by_one():
  image = random_image(12, 4)
  decomposition = dwt(image, 'db4', 2)
  shifted = dwt(np.roll(image, 4, axis=1), 'db4', 2)
  np.testing.assert_array_equal(
    shifted.details[1].diagonal, np.roll(decomposition.details[1].diagonal, 1, axis=1)
  )


def test_one_haar_block_worked_by_hand():
  image = np.asarray([[1, 2], [3, 5]], np.float32).reshape(1, 2, 2, 1)
  approximation, (bands,) = dwt(image, 'haar', 1)
  values = [float(band[0, 0, 0, 0]) for band in (approximation, *bands)]
  # (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2.
  assert values == pytest.approx([5.5, -2.5, -1.5, 0.5], rel=1e-6)


@pytest.mark.parametrize('size', ['s32x32', 's64x64'])
@pytest.mark.parametrize('name', ['haar', 'db2'])
def test_matches_pywavelets(golden, size, name):
  arrays = golden('wavelet')
  np.testing.assert_allclose(wavelet.WAVELETS[name], arrays[f'{name}.rec_lo'], atol=1e-15)
  image, prefix = arrays[f'{size}.images'], f'{size}.{name}_per'
  # The golden file's own tolerances, for float32 against float64.
  close = functools.partial(np.testing.assert_allclose, atol=3e-6, rtol=1e-5)
  decomposition = dwt(image, name, 4)
  close(decomposition.approximation_BHWC, arrays[f'{prefix}.L4.cA4'])
  for level, bands in enumerate(decomposition.details, start=1):
    for band, letter in zip(bands, 'HVD', strict=True):
      close(band, arrays[f'{prefix}.L4.c{letter}{level}'])
  close(idwt(decomposition, name, *image.shape[1:3]), image)


def test_compiled_and_not_are_the_same():
  image = random_image(7, 6)
  plain = wavelet.dwt(image, 'haar', 2)
  assert_trees_close(dwt(image, 'haar', 2), plain, atol=2e-6)
  again = wavelet.idwt(plain, 'haar', 7, 6)
  np.testing.assert_allclose(idwt(plain, 'haar', 7, 6), again, atol=2e-6)


def test_coefficients_are_float32_whatever_the_images_float_type():
  image = jnp.asarray(random_image(4, 4), jnp.bfloat16)
  decomposition = dwt(image, 'haar', 1)
  assert {leaf.dtype for leaf in jax.tree.leaves(decomposition)} == {jnp.dtype('float32')}
  assert_trees_close(decomposition, dwt(image.astype(jnp.float32), 'haar', 1), atol=0)


@pytest.mark.parametrize(
  ('height', 'width', 'most'),
  [(1, 8, 0), (2, 2, 1), (3, 9, 2), (4, 4, 2), (5, 8, 3), (224, 224, 8), (16, 224, 4)],
)
def test_most_levels_leave_one_coefficient_on_the_shorter_side(height, width, most):
  assert wavelet.max_levels(height, width) == most
  if most:
    assert min(wavelet.band_shapes(height, width, most)[-1]) == 1


def test_band_shapes_are_halves_rounded_up():
  assert wavelet.band_shapes(224, 33, 3) == ((112, 17), (56, 9), (28, 5))


@pytest.mark.parametrize(
  ('shape', 'name', 'levels', 'complaint'),
  [
    ((8, 8), 'harr', 1, "'harr' is unknown: choose haar, db2, .*did you mean 'haar'"),
    ((8, 8), 'haar', 0, '0 levels for 8 x 8 pixels: choose from 1 to 3'),
    ((9, 5), 'haar', 4, '4 levels for 9 x 5 pixels: choose from 1 to 3'),
    ((1, 8), 'haar', 1, 'at least 2 x 2 pixels'),
  ],
)
def test_mistakes_are_refused_in_words(shape, name, levels, complaint):
  with pytest.raises(UserError, match=complaint):
    wavelet.dwt(jnp.zeros((1, *shape, 1)), name, levels)


def test_inverse_refuses_what_the_transform_would_not_give():
  decomposition = dwt(np.zeros((1, 8, 8, 1), np.float32), 'haar', 2)
  with pytest.raises(UserError, match='unknown'):
    wavelet.idwt(decomposition, 'db', 8, 8)
  with pytest.raises(UserError, match='choose from 1 to 1'):
    wavelet.idwt(decomposition, 'haar', 2, 8)
  with pytest.raises(AssertionError):
    wavelet.idwt(decomposition, 'haar', 8, 12)


def test_whole_numbers_are_refused():
  with pytest.raises(TypeError, match='uint8 by / 255'):
    wavelet.dwt(jnp.zeros((1, 8, 8, 1), jnp.uint8))


def test_haar_coefficients_of_a_patch_are_those_of_its_own_pixels():
  image = random_image(8, 12)
  whole = wavelet.patch_coefficients(dwt(image, 'haar', 2), 4)
  assert [level.shape for level in whole] == [(2, 2, 3, 2 * 2 * 3 * 3), (2, 2, 3, 4 * 3)]
  crops = image.reshape(2, 2, 4, 3, 4, 3).swapaxes(2, 3).reshape(-1, 4, 4, 3)
  alone = wavelet.patch_coefficients(dwt(crops, 'haar', 2), 4)
  for level, expected in zip(whole, alone, strict=True):
    np.testing.assert_array_equal(level.reshape(expected.shape), expected)


def test_order_of_a_patchs_coefficients():
  # Each value tells its level's band, row, column and channel by its decimal digits.
  def numbered(band, side):
    band, row, column, channel = np.ix_([band], range(side), range(side), range(2))
    return 1000 * band + 100 * row + 10 * column + channel

  details = tuple(Bands(*(numbered(band, side) for band in (1, 2, 3))) for side in (4, 2))
  finest, coarsest = wavelet.patch_coefficients(Decomposition(numbered(4, 2), details), 4)
  assert finest.shape == (1, 2, 2, 3 * 2 * 2 * 2) and coarsest.shape == (1, 2, 2, 4 * 2)
  # The patch of the second row, first column.
  rows = [
    [band + pixel + c for pixel in (200, 210, 300, 310) for c in (0, 1)]
    for band in (1000, 2000, 3000)
  ]
  np.testing.assert_array_equal(finest[0, 1, 0], np.concatenate(rows))
  expected = [1100, 1101, 2100, 2101, 3100, 3101, 4100, 4101]
  np.testing.assert_array_equal(coarsest[0, 1, 0], expected)


@pytest.mark.parametrize('levels', [1, 3])
def test_patches_go_back_to_the_decomposition(levels):
  decomposition = dwt(random_image(16, 8), 'db2', levels)
  coefficients = wavelet.patch_coefficients(decomposition, 8)
  assert sum(level[0].size for level in coefficients) == 16 * 8 * 3
  back = wavelet.from_patch_coefficients(coefficients, 8, channels=3)
  assert_trees_close(back, decomposition, atol=0)


def test_patches_that_do_not_fit_are_refused():
  decomposition = dwt(np.zeros((1, 8, 12, 1), np.float32), 'haar', 2)
  with pytest.raises(UserError, match='a patch of 6 pixels and 2 wavelet levels.* = 4'):
    wavelet.patch_coefficients(decomposition, 6)
  with pytest.raises(UserError, match='multiples of the patch, 8'):
    wavelet.patch_coefficients(decomposition, 8)
  with pytest.raises(UserError, match='a patch of 2 pixels and 2 wavelet levels'):
    wavelet.from_patch_coefficients((jnp.zeros((1, 1, 1, 3)),) * 2, 2, channels=1)
