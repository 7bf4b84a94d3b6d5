"""Every kind of file that a data set holds decodes to sane RGB, or is called bad; files written by
Pillow.
"""

import io

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import decode as decode_lib
from folk_jax.data.decode import BadImage, decode

# A gradient in each channel, so that swapped axes or channels show.
_ROWS, _COLUMNS = np.mgrid[0:24, 0:36]
RGB_HWC = np.stack([_ROWS * 10, _COLUMNS * 7, 255 - _ROWS * 5], axis=-1).astype(np.uint8)
# JPEG at quality 95 without chroma subsampling stays within a few levels of a smooth gradient.
JPEG_ERROR = 6


def encoded(image: Image.Image, kind: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def jpeg(image: Image.Image, **options) -> bytes:
  return encoded(image, 'JPEG', quality=95, subsampling=0, **options)


def assert_close(found_HWC, wanted_HWC, error=0):
  assert found_HWC.dtype == np.uint8
  assert found_HWC.flags.c_contiguous
  assert found_HWC.shape == wanted_HWC.shape
  assert np.abs(found_HWC.astype(int) - wanted_HWC).max() <= error


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'PPM', 'TGA'])
def test_lossless_formats_are_exact(kind):
  assert_close(decode(encoded(Image.fromarray(RGB_HWC), kind)), RGB_HWC)


def test_jpeg_is_what_pillow_decodes():
  data = encoded(Image.fromarray(RGB_HWC), 'JPEG', quality=80)
  assert_close(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_grey_is_repeated(kind):
  grey_HW = RGB_HWC[:, :, 0]
  found_HWC = decode(encoded(Image.fromarray(grey_HW), kind))
  assert_close(found_HWC, np.repeat(grey_HW[:, :, None], 3, axis=2), JPEG_ERROR)
  assert np.ptp(found_HWC, axis=2).max() == 0


def test_one_bit_is_black_and_white():
  bits_HW = (_ROWS + _COLUMNS) % 3 == 0
  found_HWC = decode(encoded(Image.fromarray(bits_HW), 'PNG'))
  assert_close(found_HWC, np.repeat(255 * bits_HW[:, :, None], 3, axis=2))


def test_16_bits_are_scaled_not_clipped():
  wide_HW = (_ROWS * 36 + _COLUMNS).astype(np.uint16) * 75  # up to 64725
  wanted_HW = np.round(wide_HW / 257)
  for kind in ('PNG', 'TIFF'):
    found_HWC = decode(encoded(Image.fromarray(wide_HW), kind))
    assert_close(found_HWC, np.repeat(wanted_HW[:, :, None], 3, axis=2))


@pytest.mark.parametrize(
  ('values', 'wanted'),
  [
    ([0, 100, 255], [0, 100, 255]),  # fits 8 bits: kept
    ([0, 257, 65535], [0, 1, 255]),  # fits 16 bits: scaled by 257
    ([-10, 0, 10], [0, 128, 255]),  # neither: by its own range
  ],
)
def test_32_bits_are_scaled_by_the_range_that_holds_them(values, wanted):
  found_HWC = decode(encoded(Image.fromarray(np.array([values], np.int32)), 'TIFF'))
  assert found_HWC[0, :, 1].tolist() == wanted


def test_floats_with_nan_decode():
  found_HWC = decode(encoded(Image.fromarray(np.array([[np.nan, 7.0]], np.float32)), 'TIFF'))
  assert found_HWC[0, :, 0].tolist() == [0, 7]


def test_transparent_pixels_are_white():
  alpha_HW = np.where(_COLUMNS < 18, 255, 0).astype(np.uint8)
  rgba = Image.fromarray(np.dstack([RGB_HWC, alpha_HW]))
  wanted_HWC = np.where(alpha_HW[:, :, None] == 255, RGB_HWC, 255)
  assert_close(decode(encoded(rgba, 'PNG')), wanted_HWC)


def test_transparent_palette_entry_is_white():
  image = Image.fromarray((_COLUMNS >= 18).astype(np.uint8), 'L').convert('P')
  image.putpalette([10, 20, 30, 200, 100, 50])
  found_HWC = decode(encoded(image, 'PNG', transparency=0))
  assert found_HWC[0, 0].tolist() == [255, 255, 255]
  assert found_HWC[0, 35].tolist() == [200, 100, 50]


def test_palette_and_first_frame_of_an_animation():
  frames = [Image.new('RGB', (5, 4), colour) for colour in ('#c80000', '#0000c8')]
  data = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  assert_close(decode(data), np.tile(np.array([200, 0, 0]), (4, 5, 1)), error=8)


def test_cmyk_jpeg():
  colour = Image.new('RGB', (16, 16), (200, 40, 90))
  found_HWC = decode(jpeg(colour.convert('CMYK')))
  assert_close(found_HWC, np.asarray(colour), JPEG_ERROR)


# The EXIF orientation and the NumPy operation that undoes it.
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize('orientation', UPRIGHT)
def test_exif_orientation_is_applied(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  found_HWC = decode(jpeg(Image.fromarray(RGB_HWC), exif=exif))
  assert_close(found_HWC, UPRIGHT[orientation](RGB_HWC), JPEG_ERROR)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'GIF'])
def test_one_pixel(kind):
  assert decode(encoded(Image.new('RGB', (1, 1), 'white'), kind)).tolist() == [[[255] * 3]]


def test_pixels_pass_through():
  assert decode(RGB_HWC) is RGB_HWC


GOOD_JPEG = jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
GOOD_PNG = encoded(Image.fromarray(RGB_HWC), 'PNG')


@pytest.mark.parametrize(
  'data',
  {
    'empty': b'',
    'text': b'this is not an image\n' * 50,
    'truncated jpeg': GOOD_JPEG[: len(GOOD_JPEG) // 2],
    'jpeg header only': GOOD_JPEG[:20],
    'jpeg without its middle': GOOD_JPEG[:400] + b'\xff\xd8' * 20,
    'truncated png': GOOD_PNG[: len(GOOD_PNG) // 2],
    'corrupt png': GOOD_PNG[:60] + b'\x00' * 40 + GOOD_PNG[100:],
    'html': b'<html><body>404</body></html>',
  }.items(),
  ids=lambda item: item[0],
)
def test_bad_files_are_called_bad_in_one_line(data):
  with pytest.raises(BadImage) as caught:
    decode(data[1])
  assert str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_decompression_bomb(kind, monkeypatch):
  monkeypatch.setattr(decode_lib, 'MAX_PIXELS', 10_000)
  assert decode(encoded(Image.new('RGB', (100, 100)), kind)).shape == (100, 100, 3)
  with pytest.raises(BadImage, match='101 x 100 pixels'):
    decode(encoded(Image.new('RGB', (101, 100)), kind))
