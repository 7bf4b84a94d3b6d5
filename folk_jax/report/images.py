"""Arrays to pictures that a page carries in itself.

Shape letters: H, W pixels, C channels.
"""

import base64
import io

import matplotlib
import numpy as np
from PIL import Image

# From this many pixels a side on, a photograph is a JPEG: smaller ones show every pixel.
_JPEG_FROM = 65
_JPEG_QUALITY = 85
# A mask's kept coefficients, lighter where the spectrum is stronger; removed ones are dark and grey.
_KEPT, _REMOVED = np.array([255.0, 210.0, 85.0]), np.array([105.0, 105.0, 105.0])


def data_uri(image_HWC: np.ndarray, lossless: bool = False) -> str:
  """A picture as `data:` address.

  Args:
    image_HWC: uint8 [H, W, 3].
    lossless: keeps every pixel as it is, whatever the size.
  """
  jpeg = min(image_HWC.shape[:2]) >= _JPEG_FROM and not lossless
  buffer = io.BytesIO()
  image = Image.fromarray(image_HWC)
  if jpeg:
    image.save(buffer, 'JPEG', quality=_JPEG_QUALITY)
  else:
    image.save(buffer, 'PNG', optimize=True)
  kind = 'jpeg' if jpeg else 'png'
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def to_uint8(image_HWC: np.ndarray) -> np.ndarray:
  """An image in [0, 1], cut where it leaves that range, as uint8."""
  return np.round(np.clip(image_HWC, 0, 1) * 255).astype(np.uint8)


def shown(filtered_HWC: np.ndarray, original_HWC: np.ndarray) -> np.ndarray:
  """A filtered image as one can see it: uint8.

  One without its mean is signed, half of it negative: it is shown on mid-grey. Others are cut to [0, 1].
  """
  signed = filtered_HWC.min() < 0 and abs(filtered_HWC.mean()) < 0.1 * abs(original_HWC.mean())
  return to_uint8(filtered_HWC + 0.5 * signed)


def log_magnitude(image_HWC: np.ndarray) -> np.ndarray:
  """log(1 + |F|), summed over channels before the logarithm, the lowest frequency in the middle: float64 [H, W]."""
  magnitude_HW = np.abs(np.fft.fft2(image_HWC.astype(np.float64), axes=(0, 1))).sum(-1)
  return np.log1p(np.fft.fftshift(magnitude_HW))


def spectrum(image_HWC: np.ndarray, like_HWC: np.ndarray | None = None) -> np.ndarray:
  """The shifted log-magnitude spectrum in colours, uint8 [H, W, 3]; on the scale of `like_HWC`'s where given."""
  scale_HW = log_magnitude(image_HWC if like_HWC is None else like_HWC)
  low, high = np.percentile(scale_HW, 1), scale_HW.max()
  share_HW = np.clip((log_magnitude(image_HWC) - low) / max(high - low, 1e-9), 0, 1)
  return colours(share_HW, 'magma')


def mask(kept_HWM: np.ndarray, image_HWC: np.ndarray) -> np.ndarray:
  """Which coefficients a filter keeps, on the shifted spectrum: uint8 [H, W, 3].

  Args:
    kept_HWM: bool, full and shifted (`spectra.full_mask`), M 1 or 3; with one mask a channel a coefficient is drawn in
      the colours of the channels that keep it.
    image_HWC: whose spectrum shows where nothing is kept.
  """
  share_HW = log_magnitude(image_HWC)
  share_HW1 = (share_HW / max(share_HW.max(), 1e-9))[..., None]
  kept = _KEPT if kept_HWM.shape[-1] == 1 else np.full(3, 255.0)
  colour_HW3 = np.where(kept_HWM, kept * (0.78 + 0.22 * share_HW1), _REMOVED * share_HW1**2)
  return colour_HW3.astype(np.uint8)


def colours(share_HW: np.ndarray, name: str) -> np.ndarray:
  """Values in [0, 1] through one of matplotlib's colour maps: uint8 [H, W, 3]."""
  return matplotlib.colormaps[name](np.asarray(share_HW), bytes=True)[..., :3]


def enlarged(image_HWC: np.ndarray, side: int) -> np.ndarray:
  """Each pixel as a square, to `side` pixels or the next smaller multiple: a map of patches beside its photograph."""
  times = max(1, side // image_HWC.shape[0])
  return image_HWC.repeat(times, axis=0).repeat(times, axis=1)
