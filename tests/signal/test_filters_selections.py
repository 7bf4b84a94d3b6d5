"""What each filter selects: numbers worked by hand, NumPy twins, and frequencies of many draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.signal import bands, filters, fourier, wavelet
from folk_jax.signal.filters import Filter

DRAWS = 20000
PLAIN = Filter('com', (0.1,), 1.0, 'shared', radius=16.0, clamp=False)


def full_mask(half_BHF, width):
  half_BHF = np.asarray(half_BHF)
  rows = -np.arange(half_BHF.shape[1]) % half_BHF.shape[1]
  mirrored = half_BHF[:, rows][:, :, width - np.arange(half_BHF.shape[2], width)]
  return np.concatenate([half_BHF, mirrored], axis=2)


run = jax.jit(lambda settings, *batch: settings(*batch), static_argnums=0)
wavelet_filter = jax.jit(bands.wavelet_filter, static_argnames='ranking')
cover = jax.jit(lambda *arguments: bands.cover(PARTITION, *arguments, 10))
# Of the images that the twins take.
PARTITION = bands.gabor_bands(12, 10)


def selected(name, image_BHWC, count, draws=None, seed=0):
  """Full masks [B, H, W] of `count` coefficients."""
  height, width = image_BHWC.shape[1:3]
  # Half a coefficient less: the share is rounded up to `count`.
  portion = (count - 0.5) / (height * width)
  settings = dataclasses.replace(PLAIN, name=name, portions=(portion,))
  if draws:
    image_BHWC = jnp.broadcast_to(image_BHWC, (draws, *image_BHWC.shape[1:]))
  keys = jax.random.split(jax.random.key(seed), image_BHWC.shape[0])
  return full_mask(run(settings, image_BHWC, keys).kept_BHFC[..., 0], width)


def lots(height, width):
  """Representatives (row, column) of the self-conjugate coefficients, and of the pairs."""
  singles, pairs = [], []
  for y in range(height):
    for x in range(width):
      mirror = (-y % height, -x % width)
      if mirror == (y, x):
        singles.append((y, x))
      elif (y, x) < mirror:
        pairs.append((y, x))
  return singles, pairs


def assert_frequencies(masks_NHW, places, probabilities):
  """Each place's frequency lies within 4.5 standard deviations: one in 150,000 doesn't."""
  frequencies = np.asarray([masks_NHW[:, y, x].mean() for y, x in places])
  deviation = np.sqrt(probabilities * (1 - probabilities) / len(masks_NHW))
  np.testing.assert_array_less(np.abs(frequencies - probabilities), 4.5 * deviation + 1e-9)


def gratings(along_rows, along_columns, size=16):
  """A grating of 3 cycles along a row of pixels and one of 5 along a column, on grey."""
  x, y = np.meshgrid(np.arange(size), np.arange(size))
  image = (
    0.5
    + along_rows * np.cos(2 * np.pi * 3 * x / size)
    + along_columns * np.cos(2 * np.pi * 5 * y / size)
  )
  return np.float32(np.repeat(image[None, :, :, None], 3, axis=-1))


@pytest.mark.parametrize('swap', [False, True])
def test_informed_filters_select_the_stronger_grating(swap):
  strong, weak = ((0, 3), (5, 0))[:: -1 if swap else 1]
  image = gratings(*(0.4, 0.02)[:: -1 if swap else 1])
  partition = bands.gabor_bands(16, 16)
  # The mean's band comes first, then the strong grating's, of which 2 coefficients find room.
  counts = {'com': 3, 'gabor': int(partition.sizes_K[0]) + 2}
  for name, count in counts.items():
    (mask,) = selected(name, image, count)
    assert mask[0, 0] and mask[strong] and not mask[weak], name
    assert mask.sum() == count
  # By weight 51 to 2.6, twice 128 in the mean: the weak one is drawn first once in 130.
  masks = selected('magnitude_weighted', image, 1, draws=400)
  assert masks[(slice(None), *strong)].sum() > 4 * masks[(slice(None), *weak)].sum()


def test_wavelet_filter_worked_by_hand():
  # 16 coefficients of the mean, 4 * 0.5 each; 64 of the columns' 2 * 0.3; 64 of the rows' 2 * 0.1.
  y, x = np.mgrid[:16, :16]
  columns, rows = 0.3 * (-1.0) ** x, 0.1 * (-1.0) ** y
  image = np.float32(np.repeat((0.5 + columns + rows)[None, :, :, None], 3, axis=-1))
  for count, expected in ((16, 0.5 + 0 * rows), (80, 0.5 + columns)):
    k = jnp.asarray([count])
    for keep in (True, False):
      filtered = wavelet_filter(image, k, jnp.asarray([keep]), ranking='shared')
      wanted = expected if keep else 0.5 + columns + rows - expected
      np.testing.assert_allclose(filtered[0, :, :, 1], wanted, atol=1e-6)


def test_weighted_draws_follow_the_magnitudes():
  image = np.random.default_rng(0).random((1, 4, 5, 3), dtype=np.float32) - 0.45
  singles, pairs = lots(4, 5)
  magnitude = np.abs(np.fft.fft2(image, axes=(1, 2))).sum(axis=-1)[0]
  weights = np.asarray([magnitude[place] for place in singles + pairs])
  masks = selected('magnitude_weighted', image, 1, draws=DRAWS)
  np.testing.assert_array_equal(np.unique(masks.sum(axis=(1, 2))), [1, 2])
  assert_frequencies(masks, singles + pairs, weights / weights.sum())
  assert weights.max() > 3 * weights.min()


def test_uniform_draws_are_uniform():
  image = np.zeros((1, 6, 5, 1), np.float32)
  singles, pairs = lots(6, 5)
  masks = selected('random', image, 1, draws=DRAWS)
  assert_frequencies(masks, singles + pairs, np.full(16, 1 / 16))
  masks = selected('random', image, 9, draws=DRAWS)
  # Two draws of pairs differ by the deviation of their difference at most.
  frequencies = np.asarray([masks[:, y, x].mean() for y, x in pairs])
  assert np.ptp(frequencies) < 4.5 * np.sqrt(2 * 0.3 * 0.7 / DRAWS)
  assert 9 / 30 - 0.01 < frequencies.mean() < 10 / 30 + 0.01


def test_the_block_lies_anywhere_alike():
  singles, pairs = lots(6, 5)
  masks = selected('random_block', np.zeros((1, 6, 5, 1), np.float32), 1, draws=DRAWS)
  probabilities = np.asarray([1 / 30] * len(singles) + [2 / 30] * len(pairs))
  assert_frequencies(masks, singles + pairs, probabilities)


@pytest.mark.parametrize(('height', 'width', 'count'), [(16, 16, 50), (13, 18, 31)])
def test_the_block_is_square_and_mirrored(height, width, count):
  masks = selected('random_block', np.zeros((6, height, width, 1), np.float32), count)
  y, x = np.mgrid[:height, :width]
  for mask in masks:
    found = set()
    for top, left in zip(*np.nonzero(mask), strict=True):
      for rows in range(1, 9):
        for columns in range(rows - 1, rows + 2):
          block = ((y - top) % height < rows) & ((x - left) % width < columns)
          mirror = block[-np.arange(height)][:, -np.arange(width)]
          if np.array_equal(block | mirror, mask):
            found.add((rows, columns))
    assert found
  assert len({mask.tobytes() for mask in masks}) > 1


def test_the_band_is_a_stretch_of_radii_that_starts_anywhere():
  height, width, count = 6, 5, 7
  masks = selected('random_band', np.zeros((1, height, width, 1), np.float32), count, draws=DRAWS)
  rows, columns = (np.fft.fftfreq(size, 1 / size) for size in (height, width))
  squared = rows[:, None] ** 2 + columns**2
  for mask in np.unique(masks, axis=0):
    inside = (squared > squared[mask].min()) & (squared < squared[mask].max())
    assert mask[inside].all()
    assert count <= mask.sum() <= count + 2
  # Only the first of the 24 stretches of 7 among 30 ranks holds the lowest frequency.
  assert_frequencies(masks, [(0, 0)], np.asarray([1 / 24]))
  first = selected('random_band', np.zeros((1, height, width, 1), np.float32), 29, draws=50)
  assert first.sum(axis=(1, 2)).max() == 30


def test_radial_ranks_worked_by_hand():
  # 3 x 4: radii 0; 1 of (0, +-1); 1 of (+-1, 0); 2 of (+-1, +-1); 4 of (0, 2); 5 of (+-1, 2).
  first, end = filters._radial_ranks(3, 4)
  np.testing.assert_array_equal(first, [[0, 1, 9], [3, 5, 10], [3, 7, 10]])
  np.testing.assert_array_equal(end, [[1, 3, 10], [5, 7, 12], [5, 9, 12]])


@pytest.mark.parametrize(('height', 'width'), [(8, 8), (7, 9), (224, 224), (48, 64)])
def test_gabor_bands_part_the_spectrum(height, width):
  partition = bands.gabor_bands(height, width)
  band_HW = full_mask(partition.band_HF[None], width)[0]
  np.testing.assert_array_equal(band_HW, band_HW[-np.arange(height)][:, -np.arange(width)])
  sizes = np.bincount(band_HW.reshape(-1), minlength=1 + 6 * bands.octaves(height, width))
  np.testing.assert_array_equal(partition.sizes_K, sizes)
  assert band_HW[0, 0] == 0


def test_gabor_bands_worked_by_hand():
  # 64 pixels: octaves of 16-32, 8-16, 4-8 and 2-4 cycles an image; less is band 0.
  band_HF = bands.gabor_bands(64, 64).band_HF
  assert bands.octaves(64, 64) == 4
  places = {(0, 1): 0, (1, 1): 0, (0, 24): 1, (24, 0): 4, (0, 12): 7, (0, 6): 13, (0, 3): 19}
  # 24 cycles at 30 degrees are (12, 20.8); (row, column).
  places |= {(12, 21): 2, (21, 12): 3, (64 - 12, 21): 6, (64 - 21, 12): 5, (61, 0): 22}
  # Either side of the octaves' ends.
  places |= {(0, 15): 7, (0, 17): 1, (0, 9): 7, (0, 7): 13}
  assert {place: int(band_HF[place]) for place in places} == places


def test_gabor_bands_answer_as_their_kernels_do():
  """The largest response among the kernels in space: Gaussians times cosines, of peak response 1."""
  size, spread = 64, 8
  y, x = np.mgrid[: size * spread, : size * spread] - size * spread // 2
  half_peak = np.sqrt(2 * np.log(2))

  def response(frequency, angle, along, across):
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    envelope = np.exp(-2 * np.pi**2 * ((u * along) ** 2 + (v * across) ** 2))
    kernel = envelope * np.cos(2 * np.pi * frequency * u)
    folded = kernel.reshape(spread, size, spread, size).sum(axis=(0, 2))
    found = np.abs(np.fft.rfft2(folded))
    return found / found.max()

  responses = [response(0, 0, 1 / 32 / half_peak, 1 / 32 / half_peak)]
  for octave in range(4):
    centre = 0.375 / 2**octave
    for i in range(6):
      sigma = centre / 3 / half_peak, centre * np.tan(np.pi / 12) / half_peak
      responses.append(response(centre, np.pi * i / 6, *sigma))
  descending = np.sort(responses, axis=0)[::-1]
  # A kernel has two lobes and copies beyond the Nyquist frequency, the bank has one: a tenth apart
  # and away from the edge they agree.
  edge = np.maximum(np.abs(np.fft.fftfreq(size))[:, None], np.fft.rfftfreq(size)) < 0.4
  sure = edge & (descending[0] > 1.1 * descending[1])
  assert sure.sum() > 0.7 * edge.sum()
  expected = np.argmax(responses, axis=0)
  np.testing.assert_array_equal(bands.gabor_bands(size, size).band_HF[sure], expected[sure])


def assert_each_comes_first_alike(first_N, number):
  frequencies = np.bincount(first_N, minlength=number) / len(first_N)
  share = 1 / number
  # As in assert_frequencies.
  np.testing.assert_allclose(
    frequencies, share, atol=4.5 * np.sqrt(share * (1 - share) / len(first_N))
  )


def test_random_orders_of_bands_favour_none_for_its_size():
  masks = selected('gabor_random', np.zeros((1, 12, 10, 1), np.float32), 1, draws=4000)
  assert PARTITION.sizes_K.min() > 0 and np.ptp(PARTITION.sizes_K) > 10
  first_N = full_mask(PARTITION.band_HF[None], 10)[0].reshape(-1)[masks.reshape(4000, -1).argmax(1)]
  assert_each_comes_first_alike(first_N, PARTITION.sizes_K.size)

  image = np.random.default_rng(0).random((1, 16, 16, 1), dtype=np.float32)
  image = np.broadcast_to(image, (4000, *image.shape[1:]))
  keys = jax.random.split(jax.random.key(0), 4000)
  ones = np.ones(4000, np.int32)
  filtered = wavelet_filter(image, ones, ones == 1, ranking='shared', keys_B=keys)
  transform = wavelet.dwt(filtered, bands.WAVELET, bands.octaves(16, 16))
  # Bands of 16 and of 64, of which one holds the one coefficient.
  energy = [np.square(band).sum(axis=(1, 2, 3)) for band in jax.tree.leaves(transform)]
  assert_each_comes_first_alike(np.argmax(energy, axis=0), 7)


def test_bands_are_taken_in_the_order_of_their_scores():
  """Against a loop: whole bands while there is room, the strongest of the one that has too much."""
  random = np.random.default_rng(0)
  height, width, batch = 12, 10, 6
  image = random.random((batch, height, width, 2), dtype=np.float32)
  strength = fourier.ranking_magnitude(fourier.half_spectrum(image), width, 'per_channel')
  score = bands.means(PARTITION, strength, width)
  full, band_HW = full_mask(strength, width), full_mask(PARTITION.band_HF[None], width)[0]
  for band in range(PARTITION.sizes_K.size):
    np.testing.assert_allclose(score[:, band], full[:, band_HW == band].mean(axis=1), rtol=1e-5)
  k_B = np.asarray([1, 5, 13, 40, 77, 119], np.int32)
  covered = full_mask(cover(score, strength, jnp.asarray(k_B)), width)
  for image, k in enumerate(k_B):
    for channel in range(2):
      expected, room = np.zeros((height, width), bool), k
      for band in np.argsort(-score[image, :, channel], kind='stable'):
        values = np.where(band_HW == band, full[image, :, :, channel], -1)
        if room > 0:
          last = np.sort(values[band_HW == band])[::-1][: int(room)][-1]
          expected |= values >= last
          room -= (band_HW == band).sum()
      np.testing.assert_array_equal(covered[image, :, :, channel], expected)
