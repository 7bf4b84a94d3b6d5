"""Restoration: heads whose result is known, filters whose kept coefficients stay, padding that never counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.evals import restoration as restore
from folk_jax.objectives.base import sample_keys
from folk_jax.objectives.reconstruction import filter_corruption
from folk_jax.signal import degrade, fourier, quality
from folk_jax.signal.filters import Filter

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
RNG = jax.random.key(2)


def smooth(count=7, side=16):
  y, x = (each[..., None] for each in np.mgrid[:side, :side])
  phase = np.random.default_rng(0).uniform(0, 6, (count, 1, 1, 3))
  image = 0.5 + 0.3 * np.sin(x / 3 + phase) * np.cos(y / 4 - phase)
  return np.round(255 * image).astype(np.uint8)


IMAGE = smooth()


def batches(image=IMAGE, size=4, valid=None):
  valid = np.ones(len(image), bool) if valid is None else valid
  for first in range(0, len(image), size):
    rows = slice(first, first + size)
    missing = size - len(image[rows])
    yield {
      'views': np.pad(image[rows, None], [(0, missing)] + [(0, 0)] * 4),
      'index': np.pad(np.arange(first, first + len(image[rows])), (0, missing)),
      'valid': np.pad(valid[rows], (0, missing)),
    }


def shift(image_BHWC, keys_B):
  del keys_B
  return image_BHWC + 0.1


def half_back(params, image_BHWC):
  """Takes half of the shift back, in normalised units."""
  return image_BHWC - params / jnp.asarray(STD)


def unchanged(params, image_BHWC):
  del params
  return image_BHWC


def run(predict, params, corrupt, source=None, **kwargs):
  source = batches() if source is None else source
  return restore.restoration(
    predict, params, source, corrupt, mean=MEAN, std=STD, rng=RNG, **kwargs
  )


def test_worked_by_hand():
  assert IMAGE.max() < 0.9 * 255  # Nothing is clipped.
  found = run(half_back, jnp.float32(0.05), restore.of_images(shift))
  # Off by 0.1 and by 0.05: 20 dB and 20 log10(20) dB.
  assert found.input_psnr == pytest.approx(20, abs=1e-3)
  assert found.psnr == pytest.approx(26.0206, abs=1e-3)
  assert found.psnr_gain == pytest.approx(6.0206, abs=2e-3)
  assert found.count == 7 and 0 < found.ssim_gain == found.ssim - found.input_ssim
  clean = np.float32(IMAGE) / 255
  expected = quality.ssim(clean + np.float32(0.1), clean)
  # Normalising and back is two roundings.
  assert found.input_ssim == pytest.approx(float(expected.mean()), abs=1e-5)


def test_what_came_through_untouched_has_the_ceiling():
  found = run(unchanged, None, restore.of_images(lambda image, keys: image))
  assert found.psnr == found.input_psnr == restore.CEILING_DB
  assert found.ssim == pytest.approx(1, abs=1e-6)


def test_out_of_range_is_clipped_before_it_is_judged():
  white = np.full((2, 16, 16, 3), 255, np.uint8)
  found = run(unchanged, None, restore.of_images(shift), batches(white, 4))
  assert found.input_psnr == restore.CEILING_DB


def test_padding_and_batches_do_not_matter():
  noise = restore.of_images(degrade.add_noise)
  expected = run(unchanged, None, noise)
  valid = np.arange(9) < 7
  padded = np.concatenate(
    [IMAGE, np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)]
  )
  for source in (batches(padded, 4, valid), batches(size=7)):
    found = run(unchanged, None, noise, source)
    assert found.count == expected.count == 7
    # The same images in sums of another order.
    assert found.psnr == pytest.approx(expected.psnr, rel=1e-5)
    assert found.ssim == pytest.approx(expected.ssim, rel=1e-5)


def test_rows_that_predict_nonsense_in_padding_do_not_count():
  def broken(params, image_BHWC):
    return jnp.where(jnp.arange(4)[:, None, None, None] == params, jnp.nan, image_BHWC)

  # The second batch of four holds three images; its last row is padding.
  valid = np.ones(8, bool)
  valid[[3, 7]] = False
  found = run(broken, 3, restore.of_images(shift), batches(smooth(8), 4, valid))
  assert found.count == 6 and found.psnr == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize('name', ['com', 'rcom'])
def test_a_filters_kept_coefficients_are_the_inputs(name):
  corrupt = filter_corruption(Filter(name, (0.05,), 0.5, 'shared', radius=16.0, clamp=False))
  image = np.float32(IMAGE[:4]) / 255
  filtered, masked = jax.jit(corrupt)(image, sample_keys(RNG, jnp.arange(4), 0))
  true, given = ((each - np.float32(MEAN)) / np.float32(STD) for each in (image, filtered))

  def constant(params, image_BHWC):
    del image_BHWC
    return params

  def psnr(guess):
    return run(constant, guess, corrupt, batches(IMAGE[:4]))

  # A head that says nothing new leaves the input, one that is right brings back all that was taken, up
  # to float32 FFTs of 16 x 16 values ...
  assert psnr(given).psnr == pytest.approx(psnr(given).input_psnr, abs=1e-3)
  assert psnr(true).psnr > 100 > 40 > psnr(true).input_psnr
  # ... and what it says of coefficients that were there, on which no loss has trained it, is not heard.
  junk = fourier.half_spectrum(np.random.default_rng(3).normal(size=image.shape).astype(np.float32))
  kept_junk = fourier.inverse(jnp.where(masked, 0, junk), 16)
  assert np.abs(kept_junk).max() > 0.1
  assert psnr(true + kept_junk).psnr > 100
  # Where they were taken, it is.
  assert psnr(true + fourier.inverse(jnp.where(masked, junk, 0), 16)).psnr < 40


def test_mistakes_are_refused_in_words():
  with pytest.raises(UserError, match='at least one valid image'):
    run(unchanged, None, restore.of_images(shift), [])
  with pytest.raises(UserError, match='at least one valid image'):
    run(unchanged, None, restore.of_images(shift), batches(valid=np.zeros(7, bool)))
  with pytest.raises(UserError, match='8 x 8: use larger images'):
    run(unchanged, None, restore.of_images(shift), batches(smooth(4, 8)))


@pytest.mark.parametrize('side', [32, 64])
def test_tasks_change_every_image_and_say_what_is_to_be_rebuilt(side):
  tasks = restore.tasks(side)
  assert list(tasks)[:4] == ['com', 'rcom', 'low_pass', 'high_pass']
  assert set(list(tasks)[4:]) == {'super_resolution', 'deblur', 'denoise'}
  image_BHWC = np.float32(smooth(2, side)) / 255
  keys_B = jax.random.split(RNG, 2)
  for name, corrupt in tasks.items():
    changed_BHWC, rebuilt_BHFC = corrupt(image_BHWC, keys_B)
    assert changed_BHWC.shape == image_BHWC.shape, name
    assert np.abs(changed_BHWC - image_BHWC).max(axis=(1, 2, 3)).min() > 1e-3, name
    assert (rebuilt_BHFC is None) == (name in ('super_resolution', 'deblur', 'denoise'))
  # Com keeps a tenth of the coefficients at 32 pixels, and a hundredth above; the rest is to be rebuilt.
  share = 0.1 if side == 32 else 0.01
  rebuilt_BHFC = tasks['com'](image_BHWC, keys_B)[1]
  # Of the half-spectrum, whose inner columns stand for two coefficients each.
  weights_F = np.full(side // 2 + 1, 2.0)
  weights_F[[0, -1]] = 1
  found = np.sum(np.asarray(rebuilt_BHFC)[..., 0] * weights_F, axis=(1, 2)) / side**2
  np.testing.assert_allclose(found, 1 - share, atol=2.5 / side**2)
