"""Turns the bytes of an image file into RGB pixels, whatever the file holds, or says why it cannot.

JPEG takes a fast path through simplejpeg (libjpeg-turbo; the same pixels as Pillow, in two thirds
of the time); everything else, and every JPEG that the fast path refuses, goes through Pillow.

What "sane RGB" means here: orientation from EXIF is applied; grey is repeated over the channels;
16-bit values are scaled to 8 bits, not clipped; transparent pixels are laid on white, since their
own colour is arbitrary; CMYK and palettes are converted by Pillow; of an animation the first frame
counts.
"""

import functools
import io
import os
import stat

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# Pillow's own threshold for a decompression bomb: 268 MB decoded. Larger files count as bad.
MAX_PIXELS = 89_478_485
# No file of so many pixels takes more, uncompressed and of 8 bytes a pixel.
MAX_BYTES = 1 << 30
# Formats that Pillow hands to other programs or has only the names of: an image file is data, not a program.
_NOT_OURS = frozenset({'EPS', 'WMF', 'BUFR', 'GRIB', 'HDF5', 'MPEG'})
# Rows of a wide image that are scaled at a time, in 64-bit numbers.
_ROWS_AT_A_TIME = 256

_JPEG_START = b'\xff\xd8\xff'
# The EXIF segment comes first or right after JFIF's, so that its mark stands near the start.
_EXIF_WITHIN = 4096
_ORIENTATION_TAG = 0x0112


class BadImage(ValueError):
  """The bytes hold no image that can be decoded; the message says why in a few words."""


@functools.cache
def formats() -> tuple[str, ...]:
  """Pillow's names of the formats that are decoded."""
  Image.init()
  return tuple(kind for kind in Image.ID if kind not in _NOT_OURS)


def read_file(path: str) -> bytes:
  """Reads an image file.

  Raises:
    OSError: it cannot be read, is not a regular file (a pipe or a device may never end), or holds over `MAX_BYTES`.
  """
  # Opening a pipe would wait for a writer.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, 'O_CLOEXEC', 0))
  with open(descriptor, 'rb') as file:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
      raise OSError('not a regular file')
    if status.st_size > MAX_BYTES:
      raise OSError(f'{status.st_size} bytes; at most {MAX_BYTES}')
    return file.read()


def decode(data: bytes | np.ndarray) -> np.ndarray:
  """Decodes an image file.

  Args:
    data: the file's bytes; or pixels, uint8 [H, W, 3], which are passed through.

  Returns:
    uint8 [H, W, 3] RGB, contiguous, H and W at least 1.

  Raises:
    BadImage: empty, truncated, corrupt, not an image, or more than `MAX_PIXELS` pixels.
  """
  if isinstance(data, np.ndarray):
    return data
  if not data:
    raise BadImage('empty file')
  image = _decode_jpeg(data) if data.startswith(_JPEG_START) else None
  return _decode_any(data) if image is None else image


def _decode_jpeg(data: bytes) -> np.ndarray | None:
  """Decodes a common JPEG; None sends the rest to Pillow: CMYK, rotated, damaged."""
  try:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    check_size(height, width)
    if data.find(b'Exif\x00\x00', 0, _EXIF_WITHIN) >= 0:
      with Image.open(io.BytesIO(data), formats=('JPEG', 'MPO')) as header:
        if header.getexif().get(_ORIENTATION_TAG, 1) != 1:
          return None
    # Strict: a truncated file is an error, not a picture with a grey half.
    return simplejpeg.decode_jpeg(data, 'RGB', strict=True)
  except BadImage:
    raise
  except Exception:  # Pillow decides, and words the reason.
    return None


def _decode_any(data: bytes) -> np.ndarray:
  try:
    with Image.open(io.BytesIO(data), formats=formats()) as image:
      check_size(image.height, image.width)
      image.load()
      check_size(image.height, image.width)  # An icon's own header may say another size.
      return _to_rgb(ImageOps.exif_transpose(image))
  except BadImage:
    raise
  except Image.UnidentifiedImageError:
    raise BadImage('not an image') from None
  except Exception as error:
    # Pillow's plug-ins raise anything: OSError, SyntaxError, struct.error, MemoryError for a header that asks for it.
    raise BadImage(f'{type(error).__name__}: {error}'.splitlines()[0]) from error


def check_size(height: int, width: int) -> None:
  """Raises `BadImage` for no pixels, or more than `MAX_PIXELS`."""
  if height < 1 or width < 1 or height * width > MAX_PIXELS:
    raise BadImage(f'{width} x {height} pixels; at most {MAX_PIXELS} in all')


def _to_rgb(image: Image.Image) -> np.ndarray:
  if image.mode[0] in 'IF':  # I, I;16, I;16B, F: wider than 8 bits, which Pillow would clip
    grey_HW = _to_8_bits(np.asarray(image))
    return np.repeat(grey_HW[:, :, None], 3, axis=2)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    canvas = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(canvas, image)
  return np.ascontiguousarray(np.asarray(image.convert('RGB')))


def _to_8_bits(values_HW: np.ndarray) -> np.ndarray:
  """Scales wide integers or floats to uint8 by the smallest usual range that holds them, else by
  their own.
  """
  tops = range(0, len(values_HW), _ROWS_AT_A_TIME)
  low = min(_finite(values_HW, top).min() for top in tops)
  high = max(_finite(values_HW, top).max() for top in tops)
  found_HW = np.empty(values_HW.shape, np.uint8)
  for top in tops:
    wide_HW = _finite(values_HW, top)
    if low < 0 or high > 65535:
      wide_HW = (wide_HW - low) * (255 / max(high - low, 1e-12))
    elif high > 255:
      wide_HW = wide_HW / 257
    found_HW[top : top + _ROWS_AT_A_TIME] = np.round(wide_HW)
  return found_HW


def _finite(values_HW: np.ndarray, top: int) -> np.ndarray:
  """Some rows in 64-bit numbers, 0 for what is no number."""
  rows_HW = values_HW[top : top + _ROWS_AT_A_TIME].astype(np.float64)
  return np.nan_to_num(rows_HW, copy=False, posinf=0.0, neginf=0.0)
