"""Images with segmentation masks: folders of pairs, and the pairs of equal cuts that training and evaluation use.

Shapes: H height, W width, S side of a training crop.

A mask holds a class in [0, K) a pixel, or the `ignore` id, which also stands where a view was padded: it says at once
what isn't labelled and what isn't image. Images are resampled by OpenCV, as in `views.py`; masks take the nearest
pixel by `INTER_NEAREST_EXACT`, which shares the image's pixel centres (`INTER_NEAREST` is up to a pixel off).
"""

import io
import os

import cv2
import numpy as np
from PIL import Image

from folk_jax.data.decode import BadImage, check_size, formats
from folk_jax.data.settings import DataSettings, MaskSettings
from folk_jax.data.sources import Source
from folk_jax.data.views import INTERPOLATIONS
from folk_jax.errors import UserError

# Of padding, as an image in [0, 255]: near ImageNet's mean, so close to 0 once it is normalised, which is what
# segmentation code pads with.
PADDING = 116
_TRIES = 10


def decode_mask(data: bytes, name: str, settings: MaskSettings) -> np.ndarray:
  """Decodes a mask file: 8 bits a pixel, one channel (a palette's indices count, its colours don't).

  Returns:
    uint8 [H, W].

  Raises:
    UserError: not such an image, or an id that is neither a class nor `ignore`; names the file.
  """
  try:
    with Image.open(io.BytesIO(data), formats=formats()) as image:
      check_size(image.height, image.width)
      mode = image.mode
      mask_HW = np.array(image)
  except Exception as error:  # Pillow's plug-ins raise anything.
    reason = str(error) if isinstance(error, BadImage) else type(error).__name__
    raise UserError(f"mask '{name}' cannot be read ({reason}); give a PNG of class ids") from None
  if mode not in ('L', 'P'):
    raise UserError(
      f"mask '{name}' has mode {mode}; expected 8-bit class ids in one channel (mode L or P)"
    )
  known = np.arange(256) < settings.classes
  known[settings.ignore] = True
  if not known[mask_HW].all():
    wrong = np.unique(mask_HW[~known[mask_HW]])
    raise UserError(
      f"mask '{name}' holds id {wrong[0]}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; expected "
      f'0..{settings.classes - 1} or data.masks.ignore {settings.ignore}'
    )
  return mask_HW


def set_pair(
  batch: dict[str, np.ndarray],
  row: int,
  image_HWC: np.ndarray,
  source: Source,
  settings: DataSettings,
  rng: np.random.Generator | None = None,
) -> None:
  """Sets `views` and `mask` of a batch's row to a random pair, or without `rng` to the whole one.

  Args:
    batch: its `index` at `row` is the sample's number in `source`.
    row: of the batch.
    image_HWC: the sample's image, uint8.
    source: gives the mask.
    settings: with `masks`.
    rng: source of randomness.

  Raises:
    UserError: a mask that isn't as large as its image, or can't be read.
  """
  index = int(batch['index'][row])
  mask_HW = source.mask(index)
  if image_HWC.shape[:2] != mask_HW.shape:
    raise UserError(
      f"image '{source.name(index)}' has {_size(image_HWC)} pixels and its mask {_size(mask_HW)}; give equal sizes"
    )
  how, _ = INTERPOLATIONS[settings.interpolation]
  if rng is None:
    pair = whole_pair(image_HWC, mask_HW, settings.masks, how)
  else:
    flip = settings.views[0].flip
    pair = random_pair(image_HWC, mask_HW, settings.image_size, settings.masks, flip, how, rng)
  batch['views'][row, 0], batch['mask'][row, 0] = pair


def _size(array: np.ndarray) -> str:
  return f'{array.shape[1]} x {array.shape[0]}'


def pair_names(root: str, images: list[str], masks: list[str]) -> list[tuple[str, str]]:
  """Pairs files by their names without ending, sorted.

  Args:
    root: the split's folder, for messages.
    images: names of files in root/images.
    masks: of files in root/masks.

  Returns:
    (image, mask) names.

  Raises:
    UserError: files without partner, or two of one name; names them, three at most.
  """
  tables = []
  for folder, names in (('images', images), ('masks', masks)):
    table: dict[str, str] = {}
    for name in sorted(names):
      stem = os.path.splitext(name)[0]
      if stem in table:
        raise UserError(
          f"'{os.path.join(root, folder)}' holds both {table[stem]} and {name}; keep one"
        )
      table[stem] = name
    tables.append(table)
  image_of, mask_of = tables
  for whole, part, what in ((image_of, mask_of, 'mask'), (mask_of, image_of, 'image')):
    if alone := sorted(whole.keys() - part.keys()):
      shown = ', '.join(whole[stem] for stem in alone[:3])
      more = f' and {len(alone) - 3} more' if len(alone) > 3 else ''
      raise UserError(
        f"'{root}' has no {what} for {shown}{more}; give images/NAME.jpg and masks/NAME.png"
      )
  return [(image_of[stem], mask_of[stem]) for stem in sorted(image_of)]


def _resized(
  image_HWC: np.ndarray, mask_HW: np.ndarray, height: int, width: int, enlarging: int
) -> tuple[np.ndarray, np.ndarray]:
  if mask_HW.shape == (height, width):
    return image_HWC, mask_HW
  how = cv2.INTER_AREA if height <= mask_HW.shape[0] else enlarging
  image_HWC = cv2.resize(image_HWC, (width, height), interpolation=how)
  return image_HWC, cv2.resize(mask_HW, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _base_scale(mask_HW: np.ndarray, settings: MaskSettings) -> float:
  return settings.short_side / min(mask_HW.shape) if settings.short_side else 1.0


def random_pair(
  image_HWC: np.ndarray,
  mask_HW: np.ndarray,
  size: int,
  settings: MaskSettings,
  flip: float,
  enlarging: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts a training pair: random scale, random crop, perhaps a flip; small images are padded right and below.

  Args:
    image_HWC: uint8 [H, W, 3].
    mask_HW: uint8 [H, W].
    size: S in pixels.
    settings: the scale and the rest.
    flip: probability of a horizontal flip.
    enlarging: OpenCV's interpolation where the image grows.
    rng: source of randomness; the number of draws depends on the pair.

  Returns:
    uint8 [S, S, 3] and uint8 [S, S], cut alike.
  """
  scale = _base_scale(mask_HW, settings) * rng.uniform(*settings.scale)
  height, width = (max(1, round(side * scale)) for side in mask_HW.shape)
  image_HWC, mask_HW = _resized(image_HWC, mask_HW, height, width, enlarging)
  for _ in range(_TRIES):
    top = int(rng.integers(0, max(height - size, 0) + 1))
    left = int(rng.integers(0, max(width - size, 0) + 1))
    crop_HW = mask_HW[top : top + size, left : left + size]
    if settings.category_max_ratio == 1:
      break
    count_K = np.bincount(crop_HW[crop_HW != settings.ignore])
    if (
      np.count_nonzero(count_K) > 1 and count_K.max() < settings.category_max_ratio * count_K.sum()
    ):
      break
  crop_HWC = image_HWC[top : top + size, left : left + size]
  view_SSC, mask_SS = padded(crop_HWC, crop_HW, size, size, settings.ignore)
  if rng.random() < flip:
    view_SSC, mask_SS = cv2.flip(view_SSC, 1), cv2.flip(mask_SS, 1)
  return view_SSC, mask_SS


def whole_pair(
  image_HWC: np.ndarray, mask_HW: np.ndarray, settings: MaskSettings, enlarging: int
) -> tuple[np.ndarray, np.ndarray]:
  """The pair for evaluation: brought to `short_side`, scaled down where the canvas is smaller, padded to the canvas.

  Args:
    image_HWC: uint8 [H, W, 3].
    mask_HW: uint8 [H, W].
    settings: canvas and short side.
    enlarging: OpenCV's interpolation where the image grows.

  Returns:
    uint8 [height, width, 3] and uint8 [height, width], `ignore` on padding.
  """
  scale = _base_scale(mask_HW, settings)
  canvas = settings.height, settings.width
  scale = min(scale, *(most / side for most, side in zip(canvas, mask_HW.shape, strict=True)))
  height, width = (
    min(most, max(1, round(side * scale))) for most, side in zip(canvas, mask_HW.shape, strict=True)
  )
  image_HWC, mask_HW = _resized(image_HWC, mask_HW, height, width, enlarging)
  return padded(image_HWC, mask_HW, *canvas, settings.ignore)


def padded(
  image_HWC: np.ndarray, mask_HW: np.ndarray, height: int, width: int, ignore: int
) -> tuple[np.ndarray, np.ndarray]:
  """A pair with `PADDING` and `ignore` to the right and below, up to [height, width]."""
  below, right = height - mask_HW.shape[0], width - mask_HW.shape[1]
  if below or right:
    image_HWC = np.pad(image_HWC, ((0, below), (0, right), (0, 0)), constant_values=PADDING)
    mask_HW = np.pad(mask_HW, ((0, below), (0, right)), constant_values=ignore)
  return image_HWC, mask_HW
