"""Spectra, filters and frequency distance: laws, hand-worked numbers, twins, golden files."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import fourier

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
# Holds photographs, which this repository does not carry; compared too where the file is at hand.
PHOTOGRAPHS = GOLDEN.parents[2] / 'shared' / 'golden' / 'com_rcom_photos.npz'
FILTER_FILES = [GOLDEN / 'com_rcom_synth.npz'] + [PHOTOGRAPHS] * PHOTOGRAPHS.exists()

# Compiled once a shape: operation by operation takes several times as long.
half_spectrum = jax.jit(fourier.half_spectrum)
inverse = jax.jit(fourier.inverse, static_argnums=1)
ranking_magnitude = jax.jit(fourier.ranking_magnitude, static_argnums=(1, 2))
kth_largest = jax.jit(fourier.kth_largest, static_argnums=2)
top_mask = jax.jit(fourier.top_mask, static_argnums=2)
filter_images = jax.jit(fourier.filter_images, static_argnames=('ranking', 'clamp'))
frequency_distance = jax.jit(fourier.frequency_distance, static_argnums=3)

SIZES = [(8, 8), (7, 9), (6, 5), (5, 8), (1, 6), (6, 1), (1, 1), (2, 2)]


def random_image(height, width, batch=2, channels=3, seed=0):
  random = np.random.default_rng(seed)
  return random.random((batch, height, width, channels), dtype=np.float32)


def full_mask(half_BHFC, width):
  """The mask over the full spectrum that a mask over the half of it stands for."""
  half_BHFC = np.asarray(half_BHFC)
  rows = -np.arange(half_BHFC.shape[1]) % half_BHFC.shape[1]
  mirrored = half_BHFC[:, rows][:, :, width - np.arange(half_BHFC.shape[2], width)]
  return np.concatenate([half_BHFC, mirrored], axis=2)


def is_conjugate_symmetric(full_BHWC):
  rows, columns = (-np.arange(size) % size for size in full_BHWC.shape[1:3])
  return np.array_equal(full_BHWC, full_BHWC[:, rows][:, :, columns])


def com_and_rcom(image, k, ranking='shared', **kwargs):
  batch = image.shape[0]
  k_B = jnp.full(batch, k)
  return tuple(
    filter_images(image, k_B, jnp.full(batch, com), ranking=ranking, **kwargs)
    for com in (True, False)
  )


@pytest.mark.parametrize(
  ('width', 'weights'),
  [(1, [1]), (2, [1, 1]), (3, [1, 2]), (4, [1, 2, 1]), (5, [1, 2, 2]), (6, [1, 2, 2, 1])],
)
def test_hermitian_weights_count_the_full_spectrum(width, weights):
  np.testing.assert_array_equal(fourier.hermitian_weights(width), weights)
  assert fourier.hermitian_weights(width).sum() == width


@pytest.mark.parametrize(
  ('portion', 'height', 'width', 'count'),
  [
    (0.05, 80, 80, 320),  # floats give 320.00000000000006 or so, hence 321
    (0.01, 224, 224, 502),
    (0.005, 224, 224, 251),
    (0.005, 32, 33, 6),
    (0.07, 10, 10, 7),  # 7.000000000000001 in floats
    (0.5, 1, 1, 1),
    (np.float32(0.05), 80, 80, 320),
  ],
)
def test_coefficient_count_is_exact_in_decimals(portion, height, width, count):
  assert fourier.coefficient_count(portion, height, width) == count


@pytest.mark.parametrize('portion', [0, 1, -0.1, 1.5, math.nan])
def test_a_portion_outside_the_open_interval_is_refused(portion):
  with pytest.raises(UserError, match='above 0 and below 1'):
    fourier.coefficient_count(portion, 8, 8)


@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_inverse_restores_the_image(height, width):
  image = random_image(height, width)
  restored = inverse(half_spectrum(image), width)
  # A few float32 roundings of numbers below 1.
  np.testing.assert_allclose(restored, image, atol=1e-6)


@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_parseval_with_hermitian_weights(height, width):
  image = random_image(height, width)
  spectrum = np.asarray(half_spectrum(image))
  weights = fourier.hermitian_weights(width)[:, None]
  energy = (weights * np.abs(spectrum) ** 2).sum(axis=(1, 2, 3)) / (height * width)
  np.testing.assert_allclose(energy, (image**2).sum(axis=(1, 2, 3)), rtol=1e-5)


def test_spectrum_worked_by_hand():
  image = jnp.asarray([[1.0, 2.0], [3.0, 5.0]]).reshape(1, 2, 2, 1)
  spectrum = half_spectrum(image)[0, :, :, 0]
  np.testing.assert_array_equal(spectrum, [[11, -3], [-5, 1]])


def test_spectra_are_float32_whatever_the_images_float_type():
  image = jnp.asarray(random_image(4, 6), jnp.bfloat16)
  assert half_spectrum(image).dtype == jnp.complex64
  k, com = jnp.full(2, 3), jnp.asarray([True, False])
  filtered = filter_images(image, k, com)
  assert filtered.image_BHWC.dtype == jnp.float32
  np.testing.assert_array_equal(
    filtered.image_BHWC, filter_images(image.astype(jnp.float32), k, com).image_BHWC
  )
  total, count = frequency_distance(image, image, filtered.kept_BHFC)
  assert total.dtype == count.dtype == jnp.float32
  with pytest.raises(TypeError, match='uint8 by / 255'):
    half_spectrum(jnp.zeros((1, 4, 4, 3), jnp.uint8))


@pytest.mark.parametrize('ranking', ['shared', 'per_channel'])
@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_ranking_magnitude_is_symmetric_to_the_bit(height, width, ranking):
  image = random_image(height, width)
  magnitude = ranking_magnitude(half_spectrum(image), width, ranking)
  assert is_conjugate_symmetric(full_mask(magnitude, width))
  expected = np.abs(np.fft.fft2(image.astype(np.float64), axes=(1, 2)))
  if ranking == 'shared':
    expected = expected.sum(axis=-1, keepdims=True)
  # Roundings of the transform, relative to its largest coefficient.
  np.testing.assert_allclose(full_mask(magnitude, width), expected, atol=1e-6 * expected.max())


def test_an_unknown_ranking_is_refused():
  spectrum = half_spectrum(random_image(4, 4))
  with pytest.raises(UserError, match="'shared' or 'per_channel'"):
    ranking_magnitude(spectrum, 4, 'by_luma')


def test_kth_largest_worked_by_hand():
  # Full spectrum of width 4: columns 0, 1, 2, 1. Values with multiplicity: 9, 7, 7, 5, 5, 2, 1, 1.
  magnitude = jnp.asarray([[5.0, 7.0, 9.0], [5.0, 1.0, 2.0]]).reshape(1, 2, 3, 1)
  expected = [9, 7, 7, 5, 5, 2, 1, 1]
  k_B = jnp.arange(1, 9)
  kth = kth_largest(jnp.repeat(magnitude, 8, axis=0), k_B, 4)
  np.testing.assert_array_equal(kth[:, 0, 0, 0], expected)
  kept = full_mask(top_mask(jnp.repeat(magnitude, 8, axis=0), k_B, 4), 4)
  np.testing.assert_array_equal(kept.sum(axis=(1, 2, 3)), [1, 3, 3, 5, 5, 6, 8, 8])


@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_kth_largest_equals_a_sort(height, width):
  random = np.random.default_rng(1)
  columns = width // 2 + 1
  # Magnitudes over many binades, down to subnormals and zero, with ties.
  magnitude = np.exp2(random.uniform(-148, 127, (8, height, columns, 2))).astype(np.float32)
  magnitude[0] = 0
  magnitude[1] = np.round(random.random(magnitude[1].shape) * 3)
  k = random.integers(1, height * width + 1, 8)
  descending = np.sort(full_mask(magnitude, width).reshape(8, -1, 2), axis=1)[:, ::-1]
  kth = kth_largest(magnitude, jnp.asarray(k), width)
  np.testing.assert_array_equal(kth[:, 0, 0], descending[np.arange(8), k - 1])


@pytest.mark.parametrize('ranking', ['shared', 'per_channel'])
@pytest.mark.parametrize(('height', 'width'), SIZES)
def test_com_and_rcom_split_the_image(height, width, ranking):
  image = random_image(height, width)
  k = fourier.coefficient_count(0.1, height, width)
  com, rcom = com_and_rcom(image, k, ranking)
  np.testing.assert_allclose(com.image_BHWC + rcom.image_BHWC, image, atol=1e-6)
  np.testing.assert_array_equal(com.kept_BHFC, ~np.asarray(rcom.kept_BHFC))
  kept = full_mask(com.kept_BHFC, width)
  assert is_conjugate_symmetric(kept)
  # Random images have no ties but conjugate pairs.
  assert set(kept.sum(axis=(1, 2)).ravel()) <= {k, k + 1}
  again = inverse(jnp.where(com.kept_BHFC, half_spectrum(com.image_BHWC), 0), width)
  np.testing.assert_allclose(again, com.image_BHWC, atol=1e-6)


def test_filters_worked_by_hand():
  # Mean 2.75 with |F| = 11; the next is the row difference, |F| = 5: Com at k = 2 keeps both.
  image = jnp.asarray([[1.0, 2.0], [3.0, 5.0]]).reshape(1, 2, 2, 1)
  com, rcom = com_and_rcom(image, 2)
  np.testing.assert_allclose(com.image_BHWC[0, :, :, 0], [[1.5, 1.5], [4, 4]], atol=1e-6)
  np.testing.assert_allclose(rcom.image_BHWC[0, :, :, 0], [[-0.5, 0.5], [-1, 1]], atol=1e-6)
  _, clamped = com_and_rcom(image, 2, clamp=True)
  np.testing.assert_allclose(clamped.image_BHWC[0, :, :, 0], [[0, 0.5], [0, 1]], atol=1e-6)


def test_ties_are_kept_and_constant_images_survive():
  image = jnp.full((1, 6, 6, 3), 0.25)
  com, rcom = com_and_rcom(image, 5)
  assert com.kept_BHFC.all()  # every coefficient but DC is 0, and ties with the fifth
  np.testing.assert_allclose(com.image_BHWC, image, atol=1e-7)
  np.testing.assert_array_equal(rcom.image_BHWC, 0)


def test_each_image_has_its_own_filter_and_k():
  image = random_image(9, 8, batch=4)
  k, com = jnp.asarray([1, 5, 20, 33]), jnp.asarray([True, False, False, True])
  together = filter_images(image, k, com)
  for i in range(4):
    alone = filter_images(image[i : i + 1], k[i : i + 1], com[i : i + 1])
    np.testing.assert_array_equal(together.kept_BHFC[i], alone.kept_BHFC[0])
    np.testing.assert_allclose(together.image_BHWC[i : i + 1], alone.image_BHWC, atol=1e-6)


def test_drawn_filters_follow_portions_and_probability():
  keys = jax.random.split(jax.random.key(0), 4000)
  k, com = fourier.draw_filters(keys, (0.005, 0.01, 0.05), 0.3, 224, 224)
  assert k.dtype == jnp.int32 and com.dtype == bool
  values, counts = np.unique(k, return_counts=True)
  np.testing.assert_array_equal(values, [251, 502, 2509])
  # Four standard deviations of 4000 draws: 4 * sqrt(p (1 - p) / 4000) < 0.031.
  np.testing.assert_allclose(counts / 4000, 1 / 3, atol=0.031)
  assert abs(float(com.mean()) - 0.3) < 0.031
  # Independent of each other, and of the place in the batch.
  assert abs(float(com[k == 251].mean()) - 0.3) < 0.06
  reordered = fourier.draw_filters(keys[::-1], (0.005, 0.01, 0.05), 0.3, 224, 224)
  np.testing.assert_array_equal(reordered[0][::-1], k)
  np.testing.assert_array_equal(reordered[1][::-1], com)
  for probability in (0, 1):
    _, always = fourier.draw_filters(keys, (0.01,), probability, 8, 8)
    assert set(np.asarray(always)) == {bool(probability)}


@pytest.mark.parametrize(
  ('portions', 'probability', 'words'),
  [((), 0.5, 'at least one'), ((0.1, 2.0), 0.5, 'below 1'), ((0.1,), 1.1, 'from 0 to 1')],
)
def test_impossible_draws_are_refused(portions, probability, words):
  with pytest.raises(UserError, match=words):
    fourier.draw_filters(jax.random.split(jax.random.key(0), 2), portions, probability, 8, 8)


@pytest.mark.parametrize('ranking', ['shared', 'per_channel'])
@pytest.mark.parametrize('portion', ['0.005', '0.01', '0.05'])
@pytest.mark.parametrize('path', FILTER_FILES, ids=lambda path: path.stem)
def test_filters_match_the_golden_numbers(path, portion, ranking):
  golden = np.load(path)
  for size in sorted({name.split('.')[0] for name in golden.files}):
    image = golden[f'{size}.images']
    width = image.shape[2]
    case = f'{size}.tau{portion}'
    k = fourier.coefficient_count(float(portion), *image.shape[1:3])
    assert k == golden[f'{case}.k']
    filtered = dict(zip(('com', 'rcom'), com_and_rcom(image, k, ranking), strict=True))
    # Flagged: the gap to the next magnitude is below 1e-5 of it, so float32 may rank otherwise.
    sure = golden[f'{case}.{ranking}.flag'].reshape(len(image), -1) == 0
    for kind, result in filtered.items():
      mask = full_mask(result.kept_BHFC, width)
      expected = golden[f'{case}.{ranking}.{kind}_mask'].reshape(mask.shape).astype(bool)
      boundary = golden[f'{case}.{ranking}.boundary'].reshape(mask.shape).astype(bool)
      allowed = boundary & ~sure[:, None, None, :]
      np.testing.assert_array_equal(mask | allowed, expected | allowed)
      if kind == 'com':
        n_keep = golden[f'{case}.{ranking}.n_keep'].reshape(len(image), -1)
        np.testing.assert_array_equal(mask.sum(axis=(1, 2))[sure], n_keep[sure])
      for suffix, step in (('', 1), ('_sub8', 8)):
        name = f'{case}.{ranking}.{kind}{suffix}'
        if name in golden.files:
          expected = golden[name]
          ours = result.image_BHWC[: len(expected), ::step, ::step]
          same = sure[: len(expected)].all(axis=1)
          # The golden file's own tolerance for float32.
          np.testing.assert_allclose(ours[same], expected[same], atol=3e-6, rtol=1e-5)


def golden_loss(size):
  golden = np.load(GOLDEN / 'mfm_loss.npz')
  arrays = {name.split('.', 1)[1]: golden[name] for name in golden.files if name.startswith(size)}
  kept_BHW = np.fft.ifftshift(arrays['mask'], axes=(1, 2))
  width = kept_BHW.shape[2]
  return arrays, kept_BHW[:, :, : width // 2 + 1, None] == 0


def pooled_loss(prediction, target, masked, gamma):
  total, count = frequency_distance(prediction, target, masked, gamma)
  return total.sum() / count.sum()


@pytest.mark.parametrize('gamma', [1, 2])
@pytest.mark.parametrize('size', ['s32', 's33'])
def test_frequency_distance_matches_mfm(size, gamma):
  golden, masked = golden_loss(size)
  everything = np.ones_like(masked)
  prediction, target = golden['pred'], golden['target']
  total, count = frequency_distance(prediction, target, masked, gamma)
  # 1e-5 relative is the golden file's tolerance; its own float32 sums are no better.
  np.testing.assert_allclose(total / count, golden[f'per_sample_values_g{gamma}'], rtol=1e-5)
  np.testing.assert_allclose((total / count).mean(), golden[f'per_sample_g{gamma}'], rtol=1e-5)
  value_and_grad = jax.jit(jax.value_and_grad(pooled_loss), static_argnums=3)
  pooled, gradient = value_and_grad(prediction, target, masked, gamma)
  np.testing.assert_allclose(pooled, golden[f'pooled_g{gamma}'], rtol=1e-5)
  atol = {1: 2e-8, 2: 5e-8}[gamma]
  np.testing.assert_allclose(gradient, golden[f'grad_pooled_g{gamma}'], atol=atol, rtol=1e-3)
  full, gradient = value_and_grad(prediction, target, everything, gamma)
  np.testing.assert_allclose(full, golden[f'full_g{gamma}'], rtol=1e-5)
  if gamma == 1:
    np.testing.assert_allclose(gradient, golden['grad_full_g1'], atol=atol, rtol=1e-3)


def naive_distance(prediction, target, masked_BHWC, gamma):
  """The definition over the full complex spectrum, differentiated by jax."""
  difference = jnp.fft.fft2(prediction - target, axes=(1, 2), norm='ortho')
  power = jnp.square(difference.real) + jnp.square(difference.imag) + 1e-12
  return jnp.sum(jnp.where(masked_BHWC, power ** (gamma / 2), 0), axis=(1, 2, 3))


@pytest.mark.parametrize(
  ('height', 'width', 'channels', 'gamma'),
  [
    (8, 8, 1, 1),
    (8, 8, 3, 0.5),
    (7, 9, 1, 1.7),
    (7, 9, 3, 1),
    (6, 5, 1, 3),
    (1, 6, 3, 1),
    (6, 1, 1, 1),
  ],
)
def test_distance_and_gradients_equal_a_naive_twin(height, width, channels, gamma):
  prediction, target = (random_image(height, width, seed=seed) for seed in (1, 2))
  k = jnp.full(2, max(1, height * width // 4))
  ranking = 'shared' if channels == 1 else 'per_channel'
  masked = top_mask(ranking_magnitude(half_spectrum(target), width, ranking), k, width)
  weight_B = jnp.asarray([0.3, -2.0])

  def ours(prediction, target):
    return jnp.sum(weight_B * frequency_distance(prediction, target, masked, gamma)[0])

  def naive(prediction, target):
    return jnp.sum(weight_B * naive_distance(prediction, target, full_mask(masked, width), gamma))

  value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(prediction, target)
  twin = jax.jit(jax.value_and_grad(naive, argnums=(0, 1)))
  expected, expected_gradients = twin(prediction, target)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for gradient, expected in zip(gradients, expected_gradients, strict=True):
    # Two float32 transforms; relative to the largest entry, since small ones are differences.
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
  count = frequency_distance(prediction, target, masked, gamma)[1]
  np.testing.assert_array_equal(
    count, full_mask(masked, width).sum(axis=(1, 2, 3)) * (3 // channels)
  )


def test_gradient_equals_a_difference_quotient_in_float64():
  prediction, target = (random_image(7, 6, seed=seed).astype(np.float64) for seed in (1, 2))
  masked = np.ones((2, 7, 4, 1), bool)
  masked[:, :2, :2] = masked[:, -1, 0] = False

  def distance(prediction):
    difference = np.fft.fft2(prediction - target, axes=(1, 2), norm='ortho')
    return np.sum(full_mask(masked, 6) * np.sqrt(np.abs(difference) ** 2 + 1e-12))

  gradient = jax.grad(lambda x: frequency_distance(x, target.astype(np.float32), masked)[0].sum())(
    prediction.astype(np.float32)
  )
  direction = np.random.default_rng(3).normal(size=prediction.shape)
  quotient = (
    distance(prediction + 1e-5 * direction) - distance(prediction - 1e-5 * direction)
  ) / 2e-5
  np.testing.assert_allclose(np.sum(gradient * direction), quotient, rtol=1e-4)


def test_distance_of_equal_images_has_finite_gradients():
  image, masked = random_image(6, 6), np.ones((2, 6, 4, 1), bool)
  for gamma in (0.5, 1.0, 2.0):
    gradient = jax.grad(pooled_loss)(image, image, masked, gamma)
    np.testing.assert_array_equal(gradient, 0)


def test_an_empty_mask_gives_nothing():
  image = random_image(6, 6)
  result = frequency_distance(image, 0 * image, np.zeros((2, 6, 4, 1), bool))
  np.testing.assert_array_equal(result, np.zeros((2, 2)))


def test_a_gamma_that_is_not_positive_is_refused():
  image = random_image(4, 4)
  for gamma in (0, -1, math.nan):
    with pytest.raises(UserError, match='above 0'):
      frequency_distance(image, image, np.ones((2, 4, 3, 1), bool), gamma)


def test_backward_is_one_real_inverse_transform():
  image, masked = random_image(6, 6), np.ones((2, 6, 4, 1), bool)
  step = jax.value_and_grad(pooled_loss)
  compiled = jax.jit(step, static_argnums=3).lower(image, 0 * image, masked, 1.0).compile()
  assert sorted(re.findall(r'fft_type=(\w+)', compiled.as_text())) == ['IRFFT', 'RFFT']
