"""Crops: torchvision's areas and ratios, the fallback by hand, and timm's evaluation view."""

import cv2
import numpy as np
import pytest
from PIL import Image

from folk_jax.data.views import ViewSettings, centre_view, crop_box, random_view
from folk_jax.errors import UserError


def photograph(height: int, width: int) -> np.ndarray:
  """A smooth random picture, uint8 [height, width, 3]: white noise would be all aliasing."""
  noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
  image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image)


def boxes(height, width, view, count=2000):
  rng = np.random.default_rng(1)
  return np.array([crop_box(height, width, view, rng) for _ in range(count)])


def test_boxes_stay_inside_and_within_the_ranges():
  view = ViewSettings(scale=(0.2, 0.6), ratio=(0.5, 2.0))
  top, left, height, width = boxes(300, 400, view).T
  assert min(top.min(), left.min()) >= 0
  assert (top + height).max() <= 300
  assert (left + width).max() <= 400
  # Sides are rounded to whole pixels, which moves an area of 24,000 or more by under 1 %.
  share = height * width / (300 * 400)
  assert 0.198 <= share.min() < 0.21
  assert 0.59 < share.max() <= 0.606
  assert 0.49 <= (width / height).min() < 0.55
  assert 1.8 < (width / height).max() <= 2.02


def test_area_is_uniform_and_ratio_log_uniform():
  _, _, height, width = boxes(1000, 1000, ViewSettings(scale=(0.1, 0.5)), count=4000).T
  # Standard errors at 4,000 draws: 0.4 * sqrt(1/12/4000) = 0.002 and 0.575 * sqrt(1/12/4000) =
  # 0.003.
  assert np.mean(height * width / 1e6) == pytest.approx(0.3, abs=0.008)
  assert np.mean(np.log(width / height)) == pytest.approx(0.0, abs=0.012)


@pytest.mark.parametrize(
  ('height', 'width', 'wanted'),
  [
    (1, 1, (0, 0, 1, 1)),
    (100, 10, (43, 0, 13, 10)),  # too tall: all of the width, 10 / (3/4) = 13.3 rows, centred
    (10, 100, (0, 43, 10, 13)),  # too wide: all of the height, 10 * 4/3 = 13.3 columns, centred
    (1, 50, (0, 24, 1, 1)),
  ],
)
def test_fallback_by_hand(height, width, wanted):
  # The whole area at a ratio near 1 fits no such image, so that all ten tries fail.
  assert crop_box(height, width, ViewSettings(scale=(1.0, 1.0)), np.random.default_rng(0)) == wanted


@pytest.mark.parametrize('shape', [(1, 1), (1, 40), (40, 1), (3, 2), (500, 375)])
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
def test_every_shape_gives_a_view(shape, interpolation):
  image_HWC = np.full((*shape, 3), 77, np.uint8)
  rng = np.random.default_rng(0)
  for _ in range(5):
    view_HWC = random_view(image_HWC, 32, ViewSettings(), interpolation, rng)
    assert view_HWC.shape == (32, 32, 3)
    assert (view_HWC == 77).all()
  assert (centre_view(image_HWC, 32, 36, interpolation) == 77).all()


def test_whole_image_at_its_own_size_is_unchanged_and_flip_mirrors_it():
  image_HWC = photograph(48, 48)
  for flip, wanted_HWC in ((0.0, image_HWC), (1.0, image_HWC[:, ::-1])):
    view = ViewSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip)
    found_HWC = random_view(image_HWC, 48, view, 'bicubic', np.random.default_rng(0))
    np.testing.assert_array_equal(found_HWC, wanted_HWC)


def test_shrinking_antialiases():
  # Stripes of one pixel: without antialiasing an eighth of the size keeps pure black or white.
  stripes_HWC = np.zeros((256, 256, 3), np.uint8)
  stripes_HWC[:, ::2] = 255
  whole = ViewSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
  for interpolation in ('bicubic', 'bilinear'):
    view_HWC = random_view(stripes_HWC, 32, whole, interpolation, np.random.default_rng(0))
    assert np.abs(view_HWC.astype(int) - 128).max() <= 1


@pytest.mark.parametrize('size', [32, 96, 160])
def test_crops_are_nearer_pillow_bicubic_than_its_bilinear_is(size):
  image_HWC = photograph(128, 128)
  image_HWC = cv2.add(image_HWC, cv2.randn(np.empty_like(image_HWC), (0, 0, 0), (12, 12, 12)))
  whole = ViewSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
  found_HWC = random_view(image_HWC, size, whole, 'bicubic', np.random.default_rng(0))
  pillow = Image.fromarray(image_HWC)
  bicubic_HWC, bilinear_HWC = (
    np.asarray(pillow.resize((size, size), how), np.float64)
    for how in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
  )
  assert np.mean((found_HWC - bicubic_HWC) ** 2) < np.mean((bilinear_HWC - bicubic_HWC) ** 2)


@pytest.mark.parametrize('shape', [(60, 80), (81, 47), (32, 32), (20, 33)])
def test_centre_view_by_hand(shape):
  image_HWC = photograph(*shape)
  height, width = (int(36 * side / min(shape)) for side in shape)
  resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC)
  top, left = round((height - 32) / 2), round((width - 32) / 2)
  wanted_HWC = np.asarray(resized)[top : top + 32, left : left + 32]
  np.testing.assert_array_equal(centre_view(image_HWC, 32, 36, 'bicubic'), wanted_HWC)


@pytest.mark.parity
@pytest.mark.parametrize('shape', [(60, 80), (81, 47), (375, 500), (33, 20)])
def test_centre_view_is_timms(shape):
  from timm.data import create_transform

  transform = create_transform(
    32, is_training=False, interpolation='bicubic', crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1)
  )
  image_HWC = photograph(*shape)
  wanted_CHW = transform(Image.fromarray(image_HWC)).numpy()
  found_HWC = centre_view(image_HWC, 32, 36, 'bicubic')
  np.testing.assert_array_equal(found_HWC, np.round(255 * wanted_CHW.transpose(1, 2, 0)))


@pytest.mark.parametrize(
  'fields',
  [{'scale': (0.0, 1.0)}, {'scale': (0.5, 0.2)}, {'scale': (0.5, 1.5)}, {'ratio': (0, 1)}]
  + [{'flip': 1.1}, {'ratio': (1.0,)}],
)
def test_impossible_settings_are_refused(fields):
  with pytest.raises(UserError, match=f'view {next(iter(fields))} is'):
    ViewSettings(**fields)
