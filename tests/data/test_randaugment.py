"""RandAugment: what each operation does by hand, timm's numbers, its notation, and streams that it leaves alone."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from folk_jax.data import randaugment
from folk_jax.data.randaugment import OPERATIONS, RandAugment, apply, parse
from folk_jax.data.views import ViewSettings, random_view
from folk_jax.errors import UserError

BICUBIC = Image.Resampling.BICUBIC
FIXED = ('AutoContrast', 'Equalize', 'Invert')
# timm's names of the same operations.
TIMM = {name: name for name in (*FIXED, 'Rotate', 'SolarizeAdd', 'ShearX', 'ShearY')}
TIMM |= {
  name: f'{name}Increasing'
  for name in ('Posterize', 'Solarize', 'Color', 'Contrast', 'Brightness', 'Sharpness')
}
TIMM |= {name: f'{name}Rel' for name in ('TranslateX', 'TranslateY')}


def photograph(height: int = 40, width: int = 56) -> np.ndarray:
  noise = np.random.default_rng(0).integers(30, 220, (5, 7, 3), np.uint8)
  return np.asarray(Image.fromarray(noise).resize((width, height), BICUBIC))


@pytest.mark.parametrize('name', [n for n in OPERATIONS if n not in (*FIXED, 'Posterize')])
def test_a_share_of_nothing_changes_nothing(name):
  np.testing.assert_array_equal(apply(name, photograph(), 0.0, BICUBIC), photograph())


def test_colours_by_hand():
  image_HWC = np.array([[[0, 100, 127], [128, 200, 255]]], np.uint8)
  for name, share, expected in (
    ('Invert', 0.0, [[255, 155, 128], [127, 55, 0]]),
    # 4 - int(4 * 0.5) = 2 bits: multiples of 64.
    ('Posterize', 0.5, [[0, 64, 64], [128, 192, 192]]),
    ('Posterize', 1.0, [[0, 0, 0], [0, 0, 0]]),
    # Inverted from 256 - int(256 * 0.5) = 128 on.
    ('Solarize', 0.5, [[0, 100, 127], [127, 55, 0]]),
    # int(110 * 0.3) = 33 more below 128.
    ('SolarizeAdd', 0.3, [[33, 133, 160], [128, 200, 255]]),
    # A factor of 1 - 0.9 * 0.5 = 0.55, and of 1.45 with a limit at 255.
    ('Brightness', -0.5, [[0, 55, 69], [70, 110, 140]]),
    ('Brightness', 0.5, [[0, 145, 184], [185, 255, 255]]),
  ):
    found = apply(name, image_HWC, share, BICUBIC)[0].astype(int)
    # Pillow rounds or truncates products; the tables are exact.
    slack = 1 if name == 'Brightness' else 0
    assert np.abs(found - expected).max() <= slack, (name, share, found)


def test_moves_by_hand():
  image_HWC = photograph(20, 20)
  for sign in (1, -1):
    # 0.45 * 20 = 9 pixels: a positive share takes pixels from the right, or from below.
    found_HWC = apply('TranslateX', image_HWC, sign, BICUBIC)
    kept, filled = (slice(0, 11), slice(11, 20)) if sign > 0 else (slice(9, 20), slice(0, 9))
    there = slice(9, 20) if sign > 0 else slice(0, 11)
    np.testing.assert_array_equal(found_HWC[:, kept], image_HWC[:, there])
    assert (found_HWC[:, filled] == randaugment.FILL).all()
    turned_HWC = apply('TranslateY', image_HWC.transpose(1, 0, 2), sign, BICUBIC)
    np.testing.assert_array_equal(turned_HWC, found_HWC.transpose(1, 0, 2))
  # The first row stays where it is in a shear of x, and the first column in a shear of y.
  np.testing.assert_array_equal(
    apply('ShearX', image_HWC, 1.0, BICUBIC).transpose(1, 0, 2),
    apply('ShearY', image_HWC.transpose(1, 0, 2), 1.0, BICUBIC),
  )
  # Three turns by 30 degrees of a disk of one colour in a field of another change its rim alone.
  y, x = np.indices((41, 41)) - 20
  disk_HWC = np.where((x**2 + y**2 < 150)[..., None], 200, np.array(randaugment.FILL))
  turned_HWC = apply('Rotate', disk_HWC.astype(np.uint8), 1.0, BICUBIC)
  far = np.abs(np.hypot(x, y) - 150**0.5) > 3
  assert np.abs(turned_HWC.astype(int) - disk_HWC)[far].max() <= 1


def test_grey_and_contrast_by_hand():
  image_HWC = photograph()
  grey_HW = np.asarray(ImageOps.grayscale(Image.fromarray(image_HWC)))
  # A factor of 0.1 leaves a tenth of the colour; of the contrast with the mean grey.
  for name, middle in (('Color', grey_HW[..., None]), ('Contrast', int(grey_HW.mean() + 0.5))):
    found_HWC = apply(name, image_HWC, -1.0, BICUBIC)
    expected_HWC = 0.9 * np.float64(middle) + 0.1 * image_HWC
    assert np.abs(found_HWC - expected_HWC).max() <= 1, name
  assert np.ptp(apply('AutoContrast', image_HWC, 0, BICUBIC)) == 255


@pytest.mark.parity
@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.parametrize(
  'magnitude', [0.0, 3.3, 9.0, 9.99]
)  # at 10 timm's Posterize fails in Pillow
def test_operations_are_timms(name, magnitude, monkeypatch):
  from timm.data import auto_augment

  image_HWC = photograph()
  for negative in (False, True) if OPERATIONS[name].signed else (False,):
    monkeypatch.setattr(auto_augment.random, 'random', lambda negative=negative: 1.0 * negative)
    hparams = {'img_mean': randaugment.FILL, 'interpolation': BICUBIC}
    operation = auto_augment.AugmentOp(TIMM[name], 1.0, magnitude, hparams)
    expected_HWC = np.asarray(operation(Image.fromarray(image_HWC)))
    share = magnitude / 10 * (-1 if negative else 1)
    np.testing.assert_array_equal(apply(name, image_HWC, share, BICUBIC), expected_HWC)


@pytest.mark.parity
def test_the_table_is_timms():
  from timm.data import auto_augment

  assert [TIMM[name] for name in OPERATIONS] == auto_augment._RAND_INCREASING_TRANSFORMS


def test_every_operation_is_drawn_as_often_and_half_of_them_applied(monkeypatch):
  calls = []

  def noted(name, image_HWC, share, resample):
    calls.append((name, share))
    return image_HWC

  monkeypatch.setattr(randaugment, 'apply', noted)
  rng, draws = np.random.default_rng(0), 3000
  for _ in range(draws):
    randaugment.randaugment(photograph(2, 2), parse('rand-m9-mstd0.5-inc1'), BICUBIC, rng)
  # 2 * 3000 / 2 = 3000 applied, deviation sqrt(6000 / 4) = 39; of each of 15 operations 200, deviation 14.
  assert abs(len(calls) - 3000) < 5 * 39
  counts = {name: sum(called == name for called, _ in calls) for name in OPERATIONS}
  assert all(abs(count - 200) < 5 * 14 for count in counts.values())
  share = np.array([abs(share) for _, share in calls])
  # 2.3 % of magnitudes around 9 with a deviation of 0.5 lie beyond 10 and are 10; that takes 0.004 off the mean.
  assert share.max() == 1 and abs(share.mean() - 0.9) < 0.01
  assert np.mean(share == 1) == pytest.approx(0.0228, abs=5 * 0.0028)
  signed = np.array([share for name, share in calls if OPERATIONS[name].signed])
  assert np.mean(signed < 0) == pytest.approx(0.5, abs=5 * 0.5 / len(signed) ** 0.5)
  assert all(share >= 0 for name, share in calls if not OPERATIONS[name].signed)


def test_notation():
  assert parse('rand-m9-mstd0.5-inc1') == RandAugment(9.0, 0.5, 2, 0.5)
  assert parse('rand-inc1-n3-p1-m7') == RandAugment(7.0, 0.0, 3, 1.0)


@pytest.mark.parametrize(
  'text',
  ['augmix-m3', 'rand', 'rand-m9', 'rand-m9-inc0', 'rand-m11-inc1', 'rand-m9-inc1-p1.5']
  + ['rand-m9-inc1-w0', 'rand-m9-inc1-n1.5', 'rand-m9-m8-inc1', 'rand-m-9-inc1'],
)
def test_what_it_cannot_read_is_refused(text):
  with pytest.raises(UserError, match="view randaugment is .*'rand-m9-mstd0.5-inc1'"):
    ViewSettings(randaugment=text)


def test_a_view_is_cut_first_and_the_draws_of_the_cut_are_the_same():
  image_HWC = photograph(100, 120)
  off, on = ViewSettings(), ViewSettings(randaugment='rand-m9-mstd0.5-inc1')
  changed = 0
  for seed in range(10):
    rng = np.random.default_rng(seed)
    plain_HWC = random_view(image_HWC, 32, off, 'bicubic', rng)
    expected_HWC = randaugment.randaugment(plain_HWC, parse(on.randaugment), BICUBIC, rng)
    found_HWC = random_view(image_HWC, 32, on, 'bicubic', np.random.default_rng(seed))
    np.testing.assert_array_equal(found_HWC, expected_HWC)
    changed += (found_HWC != plain_HWC).any()
  # Each view is left alone with probability 1/4; all ten in one of a million runs.
  assert changed


def test_off_leaves_the_stream_of_draws_alone():
  """The generator stands after a view where the crop and the flip left it, as it always did."""
  rng = np.random.default_rng(3)
  random_view(photograph(), 32, ViewSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0)), 'bicubic', rng)
  expected = np.random.default_rng(3)
  # One try at a square of the whole area of an oblong image fails, ten times over; then the flip.
  expected.uniform(size=20)
  expected.random()
  assert rng.random() == expected.random()
