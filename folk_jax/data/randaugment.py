"""RandAugment on the host (Cubuk et al., arXiv 1909.13719, section 3), in timm's variant whose operations grow with the
magnitude.

Fine-tuning recipes of ViTs name it by a string, 'rand-m9-mstd0.5-inc1': two operations of fifteen, drawn with
replacement, each applied with probability 1/2 at a magnitude around 9 of 10. Libraries that have it bring torch or
TensorFlow; the operations themselves are Pillow's. uint8 in, uint8 out.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from folk_jax.errors import UserError

# Outside a moved image: ImageNet's mean colour, whatever the data's own [D].
FILL = (124, 116, 104)
# The scale of magnitudes.
_FULL = 10.0

# (image, amount, resampler for pixels that move) to an image of the same size.
Operation = Callable[[Image.Image, float, Image.Resampling], Image.Image]


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
  """The output at (x, y) is the input at (a x + b y + c, d x + e y + f) for the matrix (a, b, c, d, e, f)."""

  def operation(image: Image.Image, amount: float, resample: Image.Resampling) -> Image.Image:
    method = Image.Transform.AFFINE
    row = matrix(amount, image)
    return image.transform(image.size, method, row, resample=resample, fillcolor=FILL)

  return operation


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
  return lambda image, factor, _: kind(image).enhance(factor)


def _posterize(image: Image.Image, bits: float, resample: Image.Resampling) -> Image.Image:
  """Keeps the highest bits; none at the full magnitude, where Pillow's own refuses (and timm's fails)."""
  step = 2 ** (8 - int(bits))
  return image.point([value // step * step for value in range(256)] * 3)


def _solarize_add(image: Image.Image, added: float, resample: Image.Resampling) -> Image.Image:
  """Adds to values below 128, up to 255."""
  table = [min(255, value + int(added)) if value < 128 else value for value in range(256)]
  return image.point(table * 3)


def _factor(share: float) -> float:
  """Of an enhancement: 1 is no change, 0.1 and 1.9 are the furthest."""
  return max(0.1, 1 + 0.9 * share)


@dataclasses.dataclass(frozen=True)
class _Entry:
  """An operation and how far it goes.

  Attributes:
    apply: the operation.
    amount: what it takes, from a share of the full magnitude in [0, 1], or [-1, 1] where it is signed.
    signed: whether the share's sign is drawn.
  """

  apply: Operation
  amount: Callable[[float], float] = lambda share: share
  signed: bool = False


OPERATIONS: dict[str, _Entry] = {
  'AutoContrast': _Entry(lambda image, *_: ImageOps.autocontrast(image)),
  'Equalize': _Entry(lambda image, *_: ImageOps.equalize(image)),
  'Invert': _Entry(lambda image, *_: ImageOps.invert(image)),
  'Rotate': _Entry(
    lambda image, degrees, how: image.rotate(degrees, resample=how, fillcolor=FILL),
    lambda share: 30 * share,
    signed=True,
  ),
  'Posterize': _Entry(_posterize, lambda share: 4 - int(4 * share)),
  'Solarize': _Entry(
    lambda image, limit, _: ImageOps.solarize(image, limit), lambda share: 256 - int(256 * share)
  ),
  'SolarizeAdd': _Entry(_solarize_add, lambda share: int(110 * share)),
  'Color': _Entry(_enhance(ImageEnhance.Color), _factor, signed=True),
  'Contrast': _Entry(_enhance(ImageEnhance.Contrast), _factor, signed=True),
  'Brightness': _Entry(_enhance(ImageEnhance.Brightness), _factor, signed=True),
  'Sharpness': _Entry(_enhance(ImageEnhance.Sharpness), _factor, signed=True),
  'ShearX': _Entry(
    _affine(lambda s, image: (1, s, 0, 0, 1, 0)), lambda share: 0.3 * share, signed=True
  ),
  'ShearY': _Entry(
    _affine(lambda s, image: (1, 0, 0, s, 1, 0)), lambda share: 0.3 * share, signed=True
  ),
  'TranslateX': _Entry(
    _affine(lambda s, image: (1, 0, s * image.width, 0, 1, 0)),
    lambda share: 0.45 * share,
    signed=True,
  ),
  'TranslateY': _Entry(
    _affine(lambda s, image: (1, 0, 0, 0, 1, s * image.height)),
    lambda share: 0.45 * share,
    signed=True,
  ),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """What the string says; `parse` makes one.

  Attributes:
    magnitude: mean of the magnitudes, on the scale of 0 to 10.
    deviation: their standard deviation.
    operations: how many are drawn for an image.
    probability: that a drawn operation is applied.
  """

  magnitude: float
  deviation: float = 0.0
  operations: int = 2
  probability: float = 0.5


_FIELDS = {'m': 'magnitude', 'mstd': 'deviation', 'n': 'operations', 'p': 'probability'}


@functools.cache
def parse(text: str) -> RandAugment:
  """Reads timm's notation: 'rand', then -m, -mstd, -n, -p and -inc1 in any order.

  Raises:
    UserError: no such policy, an unknown section, a value out of range, or operations that don't grow with the
      magnitude (without inc1), which aren't built here.
  """
  name, *sections = text.split('-')
  found = {}
  for section in sections:
    match = re.fullmatch(r'([a-z]+)(\d+(?:\.\d+)?)', section)
    if match is None or match[1] not in (*_FIELDS, 'inc') or match[1] in found:
      raise _refused(text, f'section {section!r}')
    found[match[1]] = float(match[2])
  if name != 'rand' or 'm' not in found or found.pop('inc', 0.0) != 1:
    raise _refused(text, "it starts with 'rand' and has m and inc1")
  values = RandAugment(**{_FIELDS[key]: value for key, value in found.items()})
  if values.magnitude > _FULL or values.probability > 1 or values.operations % 1:
    raise _refused(text, 'm is at most 10, p at most 1, n a whole number')
  return dataclasses.replace(values, operations=int(values.operations))


def _refused(text: str, why: str) -> UserError:
  return UserError(
    f"view randaugment is {text!r} ({why}); give timm's notation such as 'rand-m9-mstd0.5-inc1', or ''"
  )


def apply(name: str, image_HWC: np.ndarray, share: float, resample: Image.Resampling) -> np.ndarray:
  """One operation at a share of its full strength, in [-1, 1] where it has two directions, else in [0, 1]."""
  entry = OPERATIONS[name]
  image = entry.apply(Image.fromarray(image_HWC), entry.amount(share), resample)
  return np.asarray(image)


def randaugment(
  image_HWC: np.ndarray,
  policy: RandAugment,
  resample: Image.Resampling,
  rng: np.random.Generator,
) -> np.ndarray:
  """Applies the policy's operations to an image.

  Args:
    image_HWC: uint8 [H, W, 3].
    policy: from `parse`.
    resample: Pillow's, for operations that move pixels.
    rng: source of randomness; what is drawn doesn't depend on what is applied.

  Returns:
    uint8 [H, W, 3].
  """
  names = list(OPERATIONS)
  for chosen in rng.integers(0, len(names), policy.operations):
    happens, negative = rng.random(2) < (policy.probability, 0.5)
    magnitude = policy.magnitude + policy.deviation * rng.standard_normal()
    if happens:
      share = min(max(magnitude, 0.0), _FULL) / _FULL
      signed = OPERATIONS[names[chosen]].signed
      image_HWC = apply(
        names[chosen], image_HWC, -share if signed and negative else share, resample
      )
  return image_HWC
