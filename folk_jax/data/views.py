"""Cuts an image into the views that training and evaluation use; uint8 in, uint8 out, NumPy only.

Shapes: V views, H height, W width, S output size. What else augments runs on the device, in `folk_jax.signal.augment`
(colour, blur, solarise), but for RandAugment, whose operations are Pillow's.

Two resamplers, for two purposes. Training crops use OpenCV: `INTER_AREA` where both sides shrink, because
OpenCV's cubic does not antialias, and `INTER_CUBIC` otherwise; it is faster than Pillow's bicubic and close to it.
Evaluation uses Pillow, bit for bit as timm does.
"""

import dataclasses
import math

import cv2
import numpy as np
from PIL import Image

from folk_jax.data import randaugment
from folk_jax.errors import UserError

INTERPOLATIONS = {
  'bicubic': (cv2.INTER_CUBIC, Image.Resampling.BICUBIC),
  'bilinear': (cv2.INTER_LINEAR, Image.Resampling.BILINEAR),
}

# Grain's threads and processes are the parallelism here: OpenCV's own pool on top of them
# oversubscribes the cores.
cv2.setNumThreads(0)


@dataclasses.dataclass(frozen=True)
class ViewSettings:
  """How one random view is cut on the host.

  Attributes:
    scale: range of the crop's area as a share of the image's area, in (0, 1].
    ratio: range of the crop's width over height, drawn log-uniformly.
    flip: probability of a horizontal flip.
    randaugment: what is done to the cut view (`data.randaugment`), such as 'rand-m9-mstd0.5-inc1'; '' for nothing.
  """

  scale: tuple[float, float] = (0.14, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.5
  randaugment: str = ''

  def __post_init__(self):
    # Recipes hold lists after a round trip through JSON.
    object.__setattr__(self, 'scale', tuple(self.scale))
    object.__setattr__(self, 'ratio', tuple(self.ratio))
    if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
      raise UserError(f'view scale is {self.scale}; give two numbers with 0 < low <= high <= 1')
    if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
      raise UserError(f'view ratio is {self.ratio}; give two numbers with 0 < low <= high')
    if not 0 <= self.flip <= 1:
      raise UserError(f'view flip is {self.flip}; give a probability in [0, 1]')
    if self.randaugment:
      randaugment.parse(self.randaugment)  # Refuses what it can't read.


def crop_box(
  height: int, width: int, view: ViewSettings, rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """Draws a crop as torchvision's RandomResizedCrop does: ten tries, then a centred fallback.

  Args:
    height: image height in pixels, at least 1.
    width: image width in pixels, at least 1.
    view: ranges of area and aspect ratio.
    rng: source of randomness; the number of draws depends on the image's size.

  Returns:
    (top, left, crop height, crop width) in pixels, inside the image and at least one pixel each.
  """
  area = height * width
  low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
  for _ in range(10):
    target = area * rng.uniform(*view.scale)
    ratio = math.exp(rng.uniform(low, high))
    crop_width = round(math.sqrt(target * ratio))
    crop_height = round(math.sqrt(target / ratio))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int(rng.integers(0, height - crop_height + 1))
      left = int(rng.integers(0, width - crop_width + 1))
      return top, left, crop_height, crop_width
  crop_height, crop_width = height, width
  if width / height < view.ratio[0]:
    crop_height = min(height, max(1, round(width / view.ratio[0])))
  elif width / height > view.ratio[1]:
    crop_width = min(width, max(1, round(height * view.ratio[1])))
  return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_view(
  image_HWC: np.ndarray,
  size: int,
  view: ViewSettings,
  interpolation: str,
  rng: np.random.Generator,
) -> np.ndarray:
  """Cuts one random view: crop, resize, perhaps flip, perhaps RandAugment.

  Args:
    image_HWC: uint8 [H, W, 3].
    size: side S of the square view in pixels.
    view: how.
    interpolation: 'bicubic' or 'bilinear'.
    rng: source of randomness.

  Returns:
    uint8 [S, S, 3].
  """
  top, left, height, width = crop_box(*image_HWC.shape[:2], view, rng)
  crop = image_HWC[top : top + height, left : left + width]
  enlarging, pillow = INTERPOLATIONS[interpolation]
  how = cv2.INTER_AREA if min(height, width) >= size else enlarging
  view_HWC = cv2.resize(crop, (size, size), interpolation=how)
  if rng.random() < view.flip:
    view_HWC = cv2.flip(view_HWC, 1)  # a reversed NumPy view costs 35 times this when it is copied
  if view.randaugment:
    policy = randaugment.parse(view.randaugment)
    view_HWC = randaugment.randaugment(view_HWC, policy, pillow, rng)
  return view_HWC


def centre_view(image_HWC: np.ndarray, size: int, resize: int, interpolation: str) -> np.ndarray:
  """Cuts the evaluation view: the short side resized to `resize`, then the centre, as timm and
  torchvision do.

  Args:
    image_HWC: uint8 [H, W, 3].
    size: side S of the square view in pixels.
    resize: length of the short side after resizing, at least `size`.
    interpolation: 'bicubic' or 'bilinear', both Pillow's, antialiased.

  Returns:
    uint8 [S, S, 3].
  """
  height, width = image_HWC.shape[:2]
  short = min(height, width)
  new_height, new_width = int(resize * height / short), int(resize * width / short)
  top, left = round((new_height - size) / 2), round((new_width - size) / 2)
  _, how = INTERPOLATIONS[interpolation]
  resized = Image.fromarray(image_HWC).resize((new_width, new_height), how)
  return np.asarray(resized.crop((left, top, left + size, top + size)))
