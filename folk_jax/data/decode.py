"""Turns the bytes of an image file into RGB pixels, whatever the file holds, or says why it cannot.

JPEG takes a fast path through simplejpeg (libjpeg-turbo; the same pixels as Pillow, in two thirds
of the time); everything else, and every JPEG that the fast path refuses, goes through Pillow.

What "sane RGB" means here: orientation from EXIF is applied; grey is repeated over the channels;
16-bit values are scaled to 8 bits, not clipped; transparent pixels are laid on white, since their
own colour is arbitrary; CMYK and palettes are converted by Pillow; of an animation the first frame
counts.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# Pillow's own threshold for a decompression bomb: 268 MB decoded. Larger files count as bad.
MAX_PIXELS = 89_478_485

_JPEG_START = b'\xff\xd8\xff'
# The EXIF segment comes first or right after JFIF's, so that its mark stands near the start.
_EXIF_WITHIN = 4096
_ORIENTATION_TAG = 0x0112


class BadImage(ValueError):
  """The bytes hold no image that can be decoded; the message says why in a few words."""


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
    _check_size(height, width)
    if data.find(b'Exif\x00\x00', 0, _EXIF_WITHIN) >= 0:
      with Image.open(io.BytesIO(data)) as header:
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
    with Image.open(io.BytesIO(data)) as image:
      _check_size(image.height, image.width)
      image.load()
      return _to_rgb(ImageOps.exif_transpose(image))
  except BadImage:
    raise
  except Image.UnidentifiedImageError:
    raise BadImage('not an image') from None
  except MemoryError:
    raise
  except (
    Exception
  ) as error:  # Pillow's plug-ins raise anything: OSError, SyntaxError, struct.error, ...
    raise BadImage(f'{type(error).__name__}: {error}'.splitlines()[0]) from error


def _check_size(height: int, width: int) -> None:
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
  values_HW = np.nan_to_num(values_HW.astype(np.float64), posinf=0.0, neginf=0.0)
  low, high = values_HW.min(), values_HW.max()
  wide = high > 255
  if low < 0 or high > 65535:
    values_HW = (values_HW - low) * (255 / max(high - low, 1e-12))
  elif wide:
    values_HW = values_HW / 257
  return np.round(values_HW).astype(np.uint8)
