"""Labelled crops of ten photographs that ship inside scikit-image and scikit-learn: real pixels, no
download.

The class of a crop is the photograph it was cut from. The right-hand quarter of every photograph is
the test region and the rest the training region; a crop lies in one of them entirely, so that no
pixel is in both sets. Crops form a fixed grid at three sizes, the same number from every photograph
and size, and keep the photograph's own pixels.
"""

import functools
import importlib.util
import os

import numpy as np
from PIL import Image

from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.errors import UserError

# (class, package, file in the package). All in the wheels: scikit-image's other pictures need a
# download.
PHOTOGRAPHS = (
  ('astronaut', 'skimage', 'data/astronaut.png'),
  ('cat', 'skimage', 'data/chelsea.png'),
  ('coffee', 'skimage', 'data/coffee.png'),
  ('flower', 'sklearn', 'datasets/images/flower.jpg'),
  ('galaxies', 'skimage', 'data/hubble_deep_field.jpg'),
  ('motorcycle', 'skimage', 'data/motorcycle_left.png'),
  ('pagoda', 'sklearn', 'datasets/images/china.jpg'),
  ('retina', 'skimage', 'data/retina.jpg'),
  ('rocket', 'skimage', 'data/rocket.jpg'),
  ('tissue', 'skimage', 'data/ihc.png'),
)
_INSTALLED_AS = {'skimage': 'scikit-image', 'sklearn': 'scikit-learn'}

# Every photograph is brought to this short side, so that crops show the same share of each. The
# sides surround the 48 pixels that 32-pixel views are best cut from, and leave room to move in the
# 80 columns of a square photograph's test region.
_SHORT_SIDE = 320
_CROP_SIDES = (40, 52, 68)
_TEST_SHARE = 0.25
# Crops per photograph and size: rows x columns of the grid.
_GRID = {'train': (16, 12), 'test': (8, 3)}


def _find(package: str, file: str) -> str:
  spec = importlib.util.find_spec(package)
  for root in (spec.submodule_search_locations if spec else None) or ():
    path = os.path.join(root, file)
    if os.path.isfile(path):
      return path
  wheel = _INSTALLED_AS[package]
  raise UserError(
    f"data.source 'embedded' needs {file} of the {wheel} wheel; run: pip install --upgrade {wheel}"
  )


@functools.cache
def _photograph(number: int) -> np.ndarray:
  """Returns photograph `number`, uint8 [H, W, 3] with a short side of `_SHORT_SIDE`; read once a
  process.
  """
  _, package, file = PHOTOGRAPHS[number]
  with Image.open(_find(package, file)) as image:
    scale = _SHORT_SIDE / min(image.size)
    size = tuple(round(side * scale) for side in image.size)
    return np.asarray(image.convert('RGB').resize(size, Image.Resampling.BICUBIC))


def region(number: int, split: str) -> tuple[int, int]:
  """Returns the first and one past the last column of a split's region in photograph `number`, in
  pixels.
  """
  width = _photograph(number).shape[1]
  border = round(width * (1 - _TEST_SHARE))
  return (0, border) if split == 'train' else (border, width)


class EmbeddedSource(Source):
  """The crops of one split: 5,760 for training, 720 for testing, interleaved over the
  photographs.
  """

  class_names = tuple(name for name, _, _ in PHOTOGRAPHS)

  def __init__(self, settings: DataSettings, split: str):
    del settings  # nothing to choose
    self._split = split
    for _, package, file in PHOTOGRAPHS:
      _find(package, file)

  def __len__(self) -> int:
    rows, columns = _GRID[self._split]
    return len(PHOTOGRAPHS) * len(_CROP_SIDES) * rows * columns

  def box(self, index: int) -> tuple[int, int, int, int]:
    """Returns crop `index` as (photograph, top, left, side), in pixels of the resized
    photograph.
    """
    rows, columns = _GRID[self._split]
    cell, number = divmod(index, len(PHOTOGRAPHS))
    cell, size = divmod(cell, len(_CROP_SIDES))
    row, column = divmod(cell, columns)
    side = _CROP_SIDES[size]
    start, stop = region(number, self._split)
    top = round(row * (_photograph(number).shape[0] - side) / (rows - 1))
    left = start + round(column * (stop - start - side) / (columns - 1))
    return number, top, left, side

  def read(self, index: int) -> tuple[np.ndarray, int]:
    number, top, left, side = self.box(index)
    return _photograph(number)[top : top + side, left : left + side], number

  def label(self, index: int) -> int:
    return index % len(PHOTOGRAPHS)

  def labels(self, indices: np.ndarray) -> np.ndarray:
    return np.asarray(indices) % len(PHOTOGRAPHS)

  def mask(self, index: int) -> np.ndarray:
    number, _, _, side = self.box(index)
    return np.full((side, side), number, np.uint8)  # Every pixel is of its photograph.

  def name(self, index: int) -> str:
    number, top, left, side = self.box(index)
    return f'{self.class_names[number]}[{top}:{top + side}, {left}:{left + side}]'
