"""What each corruption computes, beside the libraries that the paper's code calls and slow twins of our own."""

import io
import math

import cv2
import jax
import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.filters
from PIL import Image

from folk_jax.signal import blurs, corruptions, digital, weather

# Compiled whole: one operation after the other takes longer.
plasma = jax.jit(weather.plasma, static_argnums=(1, 2))
fog = jax.jit(weather.fog, static_argnums=(2, 3))
snow = jax.jit(weather.snow, static_argnums=range(2, 9))
glass = jax.jit(blurs.glass, static_argnums=(2, 3, 4))
jpeg = jax.jit(digital.jpeg, static_argnums=1)
elastic = jax.jit(digital.elastic, static_argnums=(2, 3, 4))


def noise_image(height=24, width=20, seed=0):
  return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def smooth_image(height=48, width=40):
  y, x = np.mgrid[:height, :width][..., None]
  return (0.5 + 0.4 * np.sin(x / 6 + [0, 1, 2]) * np.cos(y / 7)).astype(np.float32)


@pytest.mark.parametrize('sigma', [0.05, 0.4, 1.0, 2.7, 6.0])
def test_gaussian_blur_is_scikit_images(sigma):
  image = noise_image()
  theirs = skimage.filters.gaussian(image.astype(float), sigma, channel_axis=-1)
  # Sums of up to 24 float32 products along two axes.
  np.testing.assert_allclose(blurs.gaussian(image, sigma), theirs, atol=1e-6)


@pytest.mark.parametrize('sigma', [0.0, 0.96, 6.4, 30.0])
def test_symmetric_gaussian_is_scipys(sigma):
  signal_N = noise_image()[0, :, 0].astype(float)
  theirs = (
    scipy.ndimage.gaussian_filter1d(signal_N, sigma, mode='reflect', truncate=3)
    if sigma
    else signal_N
  )
  matrix = blurs.gaussian_matrix(len(signal_N), sigma, 3.0, True)
  np.testing.assert_allclose(matrix @ signal_N, theirs, atol=1e-6)


@pytest.mark.parametrize(
  ('radius', 'alias'), [(0.3, 0.4), (1.5, 0.1), (3, 0.1), (8, 0.5), (10, 0.5)]
)
def test_defocus_is_opencvs(radius, alias):
  image = noise_image(40, 36)
  reach, taps = (8, 3) if radius <= 8 else (radius, 5)
  offset = np.arange(-reach, reach + 1)
  disk = np.float32(offset[:, None] ** 2 + offset**2 <= radius**2)
  kernel = cv2.GaussianBlur(disk / disk.sum(), (taps, taps), alias)
  theirs = np.stack([cv2.filter2D(np.float64(image[..., c]), -1, kernel) for c in range(3)], -1)
  # OpenCV's kernel is a float32 sum, ours a rounded float64 one; then 400 products of 1 / 400.
  np.testing.assert_allclose(blurs.defocus(image, radius, alias), theirs, atol=2e-6)


@pytest.mark.parametrize('factor', [1.0, 1.01, 1.13, 1.25, 1.5, 2.5, 4.0])
@pytest.mark.parametrize('length', [32, 45])
def test_zoom_matrix_is_scipys(length, factor):
  signal_N = noise_image(length, 8)[:, 0, 0].astype(float)
  kept = math.ceil(length / factor)
  first = (length - kept) // 2
  theirs = scipy.ndimage.zoom(signal_N[first : first + kept], factor, order=1)
  trim = (len(theirs) - length) // 2
  ours = blurs.zoom_matrix(length, factor) @ signal_N
  np.testing.assert_allclose(ours, theirs[trim : trim + length], atol=1e-6)


def test_zoom_blur_is_the_mean_of_its_zooms():
  image = noise_image(32, 32)
  zoomed = [
    blurs.zoom_matrix(32, factor) @ np.moveaxis(image, -1, 0) @ blurs.zoom_matrix(32, factor).T
    for factor in np.arange(1, 1.06, 0.01)
  ]
  assert len(zoomed) in (
    6,
    7,
  )  # Rounding decides whether 1.06 is below 1.06; the paper's code asks the same.
  expected = (np.moveaxis(image, -1, 0) + sum(zoomed)) / (len(zoomed) + 1)
  np.testing.assert_allclose(blurs.zoom(image, 1.06, 0.01), np.moveaxis(expected, 0, -1), atol=2e-6)


@pytest.mark.parametrize('angle', [-130.0, -90.0, -45.0, 0.0, 20.0])
def test_motion_blur_is_the_twins(angle):
  image, radius, sigma = noise_image(14, 11), 5, 2.0
  height, width, _ = image.shape
  weight_T = [math.exp(-t * t / (2 * sigma**2)) for t in range(2 * radius + 1)]
  expected = np.zeros_like(image, float)
  for t, weight in enumerate(weight_T):
    # ImageMagick: the tap's place along the line, rounded up from the half below.
    dy = math.ceil(t * math.sin(math.radians(angle)) - 0.5)
    dx = math.ceil(t * math.cos(math.radians(angle)) - 0.5)
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    expected += weight / sum(weight_T) * image[np.ix_(rows, columns)]
  ours = blurs.motion(image, np.float32(angle), radius, sigma)
  np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_glass_takes_pixels_from_the_neighbourhood():
  image = np.stack(np.broadcast_arrays(*np.mgrid[:20, :16], 0), -1).astype(np.float32)
  moved = np.asarray(glass(image, jax.random.key(0), 0.0, 2, 1)) - image
  assert set(np.unique(moved[4:-4, 4:-4, :2])) == {-2, -1, 0, 1}
  twice = np.asarray(glass(image, jax.random.key(0), 0.0, 2, 2)) - image
  assert twice.min() == -4 and twice.max() == 2


@pytest.mark.parametrize('amount', [0.05, 0.5])
def test_brightness_is_hsvs(amount):
  image = noise_image()
  image[0, 0], image[1, 1] = 0, 0.7
  hsv = skimage.color.rgb2hsv(image.astype(float))
  hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
  ours = corruptions.brightness(image, None, amount)
  np.testing.assert_allclose(ours, skimage.color.hsv2rgb(hsv), atol=1e-6)


@pytest.mark.parametrize(('factor', 'offset'), [(0.3, 0), (2, 0.1), (20, 0.2)])
def test_saturate_is_hsvs(factor, offset):
  image = noise_image()
  image[0, 0], image[1, 1] = 0, 0.7  # Black, and a grey that an offset tints.
  hsv = skimage.color.rgb2hsv(image.astype(float))
  hsv[..., 1] = np.clip(hsv[..., 1] * factor + offset, 0, 1)
  ours = corruptions.saturate(image, None, factor, offset)
  np.testing.assert_allclose(ours, skimage.color.hsv2rgb(hsv), atol=2e-6)


def test_contrast_worked_by_hand():
  image = np.zeros((2, 2, 3), np.float32)
  image[0, 0] = [0.8, 0.4, 1.0]  # Means 0.2, 0.1, 0.25.
  ours = corruptions.contrast(image, None, 0.5)
  np.testing.assert_allclose(ours[0, 0], [0.5, 0.25, 0.625], atol=1e-7)
  np.testing.assert_allclose(ours[1, 1], [0.1, 0.05, 0.125], atol=1e-7)


@pytest.mark.parametrize('share', [0.95, 0.75, 0.6, 0.3, 0.25])
def test_pixelate_is_pillows(share):
  image = noise_image(32, 45)
  small = int(45 * share), int(32 * share)
  theirs = np.stack(
    [
      np.asarray(
        Image.fromarray(image[..., c]).resize(small, Image.BOX).resize((45, 32), Image.BOX)
      )
      for c in range(3)
    ],
    -1,
  )
  np.testing.assert_allclose(digital.pixelate(image, share), theirs, atol=1e-6)


def root_mean_square(difference):
  return np.sqrt(np.mean(np.square(difference)))


def both_jpegs(image, quality):
  """The image, libjpeg's and ours, in levels of 255."""
  image = np.round(255 * image).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=quality)
  ours = 255 * np.clip(jpeg(image.astype(np.float32) / 255, quality), 0, 1)
  return image.astype(float), np.asarray(Image.open(file)).astype(float), np.asarray(ours)


@pytest.mark.parametrize(('height', 'width'), [(48, 64), (37, 50)])
def test_jpegs_luma_is_libjpegs(height, width):
  image, theirs, ours = both_jpegs(np.repeat(smooth_image(height, width)[..., :1], 3, -1), 80)
  # libjpeg rounds luma and pixels to levels, 0.29 each, and so the odd coefficient the other way.
  assert root_mean_square(ours - theirs) < 0.6 < 0.6 * root_mean_square(image - theirs)


@pytest.mark.parametrize(('height', 'width'), [(48, 64), (37, 50)])
@pytest.mark.parametrize('quality', [10, 40])
def test_jpeg_is_nearly_libjpegs(height, width, quality):
  image = smooth_image(height, width)
  image[10:20, 12:30] = [0.8, 0.2, 0.4]  # An edge, in chroma too.
  image, theirs, ours = both_jpegs(image, quality)
  # libjpeg also rounds chroma, twice: noise of 0.4 levels before multiples of 20 to 100 are taken,
  # which turns one coefficient in a hundred by that much. The codec's loss is well above it.
  assert root_mean_square(ours - theirs) < 0.4 * root_mean_square(image - theirs)


def test_jpeg_leaves_grey_and_pads_by_the_edge():
  # 128 has no coefficients at all; blocks of one value have only the first.
  np.testing.assert_allclose(
    jpeg(np.full((9, 17, 3), 128 / 255, np.float32), 10), 128 / 255, atol=1e-5
  )


def test_elastics_affine_part_is_opencvs():
  image, key, corner = smooth_image(), jax.random.key(3), 4.0
  height, width, _ = image.shape
  draw_32 = jax.random.uniform(jax.random.split(key)[0], (3, 2), minval=-corner, maxval=corner)
  half, centre = min(height, width) // 3, np.float32([width // 2, height // 2])
  start = np.float32([centre + half, [centre[0] + half, centre[1] - half], centre - half])
  move = cv2.getAffineTransform(start, start + np.asarray(draw_32)[:, ::-1])
  theirs = cv2.warpAffine(image, move, (width, height), borderMode=cv2.BORDER_REFLECT_101)
  ours = elastic(image, key, 0.0, 0.0, corner)
  # OpenCV takes places to the nearest 1/32 pixel along each axis; the steepest slope is 0.4 / 6.
  np.testing.assert_allclose(ours, theirs, atol=2 * 0.4 / 6 / 64 + 1e-4)
  assert np.abs(ours - image).max() > 0.1


def test_elastics_field_is_scipys():
  image, key = noise_image(32, 24), jax.random.key(4)
  noise = np.asarray(
    jax.random.uniform(jax.random.split(key)[1], (32, 24, 2), minval=-1.0, maxval=1.0), float
  )
  field = [
    40 * skimage.filters.gaussian(noise[..., axis], 3.0, mode='reflect', truncate=3)
    for axis in range(2)
  ]
  place = np.mgrid[:32, :24] + field
  theirs = [
    scipy.ndimage.map_coordinates(image[..., c].astype(float), place, order=1, mode='reflect')
    for c in range(3)
  ]
  # Places are float32 numbers up to 32: off by 2e-6, times slopes up to 1.
  ours = elastic(image, key, 40.0, 3.0, 0.0)
  np.testing.assert_allclose(ours, np.stack(theirs, -1), atol=1e-5)
  assert np.abs(field).max() > 2


def twin_plasma(draws, side, decay):
  """Diamond and square written pixel by pixel on a dictionary of places."""
  height, step, amplitude, first = {(0, 0): 0.0}, side, 100.0, 0
  while step > 1:
    half, count = step // 2, side // step
    noise = amplitude**2 * draws[first : first + 3 * count**2].reshape(3, count, count)
    first += 3 * count**2
    for kind, (dy, dx) in enumerate([(half, half), (0, half), (half, 0)]):
      around = [(half, half), (half, -half), (-half, half), (-half, -half)]
      around = around if kind == 0 else [(half, 0), (-half, 0), (0, half), (0, -half)]
      for i in range(count):
        for j in range(count):
          y, x = i * step + dy, j * step + dx
          near = [height[(y + v) % side, (x + u) % side] for v, u in around]
          height[y, x] = sum(near) / 4 + noise[kind, i, j]
    step, amplitude = half, amplitude / decay
  array = np.array([[height[y, x] for x in range(side)] for y in range(side)])
  return (array - array.min()) / (array.max() - array.min())


@pytest.mark.parametrize(('side', 'decay'), [(2, 2.0), (16, 1.4)])
def test_plasma_is_the_twins(side, decay):
  key = jax.random.key(side)
  draws = jax.random.uniform(key, (side * side - 1,), minval=-1.0, maxval=1.0)
  expected = twin_plasma(np.asarray(draws, float), side, decay)
  ours = plasma(key, side, decay)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_fog_worked_by_hand():
  image = np.full((2, 2, 3), 0.5, np.float32)
  fogged = np.asarray(fog(image, jax.random.key(0), 1.5, 2.0))
  # The clouds run from 0 to 1: (0.5 + 1.5 m) * 0.5 / 2.
  assert fogged.min() == pytest.approx(0.125) and fogged.max() == pytest.approx(0.5)


def test_snow_worked_by_hand():
  image = np.zeros((8, 9, 3), np.float32)
  image[...] = [0.5, 0.2, 0.1]
  grey = 1.5 * (0.299 * 0.5 + 0.587 * 0.2 + 0.114 * 0.1) + 0.5
  white = np.maximum(image, grey)
  # Without deviation the layer is flat: no flakes below the threshold, one great flake above it.
  for mean, flake in ((0.3, 0.0), (0.6, 0.6)):
    snowed = snow(image, jax.random.key(0), mean, 0.0, 1.5, 0.5, 3, 2.0, 0.8)
    np.testing.assert_allclose(snowed, 0.8 * image + 0.2 * white + 2 * flake, atol=1e-5)
