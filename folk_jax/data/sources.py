"""Sources of labelled images: what every source offers, and the table that finds one by name.

A source is a numbered list of encoded images. It opens its files only when they are asked for, so
that it can be pickled to worker processes, and each source's own libraries are imported only when
that source is used.
"""

import difflib
import importlib
from collections.abc import Callable
from concurrent import futures

import numpy as np

from folk_jax.data.labels import draw_labelled
from folk_jax.data.settings import DataSettings
from folk_jax.errors import UserError

SPLITS = ('train', 'validation', 'test')
# The order in which an evaluation split is looked for: ImageNet's 'test' has no labels, its
# 'validation' has.
TEST_SPLITS = ('validation', 'val', 'test')
# Threads that read labels of sources where each costs a read.
_LABEL_READERS = 16


class MissingSplit(UserError):
  """The data are there, and the split isn't."""


class Source:
  """A numbered list of images; subclasses give `__len__`, `read` and `name`, and may give
  `class_names`.
  """

  class_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    raise NotImplementedError

  def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
    """Returns sample `index`, 0 <= index < len: the file's bytes (or uint8 [H, W, 3] pixels), and
    its label or -1.
    """
    raise NotImplementedError

  def name(self, index: int) -> str:
    """Returns what a message calls sample `index`: a path, or the data set's name and the
    number.
    """
    raise NotImplementedError

  def place(self, index: int) -> str:
    """Returns what can be said of where sample `index` stands without reading it: such as hangs its reader."""
    return self.name(index)

  def file(self, index: int) -> str:
    """Returns the file that holds sample `index`, its own or a shard; '' where that can't be told without reading."""
    return ''

  def fetch(self, index: int) -> bytes | np.ndarray:
    """Returns the image of sample `index`, encoded (bytes) or as uint8 [H, W, 3] pixels."""
    return self.read(index)[0]

  def label(self, index: int) -> int:
    """Returns the class number of sample `index`, -1 where it is unknown."""
    return self.read(index)[1]

  def labels(self, indices: np.ndarray) -> np.ndarray:
    """Returns the class numbers of several samples, integers [n], -1 where unknown."""
    with futures.ThreadPoolExecutor(_LABEL_READERS) as readers:
      return np.array([*readers.map(self.label, np.asarray(indices).tolist())], np.int32)

  def mask(self, index: int) -> np.ndarray:
    """Returns the class ids of sample `index`'s pixels, uint8 [H, W], where `settings.masks` is set."""
    raise NotImplementedError


class Subset(Source):
  """Some samples of a source, in an order of their own.

  Attributes:
    indices: int [N], their numbers in the source.
  """

  def __init__(self, source: Source, indices: np.ndarray):
    self._source = source
    self._indices = np.asarray(indices, np.int64)
    self.class_names = source.class_names

  def __len__(self) -> int:
    return len(self._indices)

  def read(self, index: int) -> tuple[bytes | np.ndarray, int]:
    return self._source.read(int(self._indices[index]))

  def label(self, index: int) -> int:
    return self._source.label(int(self._indices[index]))

  def labels(self, indices: np.ndarray) -> np.ndarray:
    return self._source.labels(self._indices[indices])

  def mask(self, index: int) -> np.ndarray:
    return self._source.mask(int(self._indices[index]))

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))

  def place(self, index: int) -> str:
    return self._source.place(int(self._indices[index]))

  def file(self, index: int) -> str:
    return self._source.file(int(self._indices[index]))


def evenly_spread(source: Source, limit: int) -> Subset:
  """`limit` samples at most, evenly spread over the source, so that a sorted one keeps all its classes."""
  return Subset(source, _spread(min(limit, len(source)), len(source)))


def _spread(count: int, size: int) -> np.ndarray:
  """`count` of the numbers below `size`, rising: one at random, always the same, in each of as many equal stretches.

  In sorted data every class keeps its share; equal steps would do as much, and in data whose classes alternate would
  take all from one.
  """
  place = np.random.default_rng(0).random(count)
  return np.floor((np.arange(count) + place) * (size / count)).astype(np.int64).clip(0, size - 1)


# Name -> 'module:class'; imported on use, since a folder run needs neither TFDS nor scikit-image.
SOURCES = {
  'embedded': 'folk_jax.data.embedded:EmbeddedSource',
  'folder': 'folk_jax.data.folder:FolderSource',
  'mask_folder': 'folk_jax.data.mask_folder:MaskFolderSource',
  'tfds': 'folk_jax.data.tfds_source:TfdsSource',
  'array_record': 'folk_jax.data.records:ArrayRecordSource',
  'synthetic': 'folk_jax.data.synthetic:SyntheticSource',
}


def make_source(settings: DataSettings, split: str) -> Source:
  """Opens one split of the data set that the settings name.

  Args:
    settings: which source, where, and how much of it.
    split: 'train' or 'test'; the settings say which split of the data set that is. Or 'validation': what the settings
      hold out of the training split, to choose by instead of by test images.

  Of the training split first the validation part is held out, then `limit` is taken of the rest, then the labelled
  images are drawn. The other splits keep all their labels.

  Returns:
    A source with at least one sample.

  Raises:
    UserError: an unknown source or split, a missing or empty folder, a data set that is not
      prepared, or fewer labels than are asked for.
  """
  if split not in SPLITS:
    raise UserError(f"unknown split '{split}'; known: {', '.join(SPLITS)}")
  if settings.source not in SOURCES:
    near = difflib.get_close_matches(settings.source, SOURCES, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ''
    raise UserError(f"unknown data.source '{settings.source}'; known: {', '.join(SOURCES)}{hint}")
  module, name = SOURCES[settings.source].split(':')
  build: Callable[[DataSettings, str], Source] = getattr(importlib.import_module(module), name)
  source = build(settings, 'test' if split == 'test' else 'train')
  if not len(source):
    raise UserError(f"data source '{settings.source}' has no samples in its {split} split")
  if split != 'test' and (settings.validation or split == 'validation'):
    source = held_out(source, settings.validation, split)
  if settings.limit:
    source = evenly_spread(source, settings.limit)
  return labelled_part(source, settings) if split == 'train' else source


def labelled_part(source: Source, settings: DataSettings) -> Source:
  """The samples that `images_a_class` or `label_share` draws; all where neither is set."""
  if not (settings.images_a_class or settings.label_share):
    return source
  drawn = draw_labelled(
    source.labels,
    source.name,
    source.class_names,
    len(source),
    images_a_class=settings.images_a_class,
    share=settings.label_share,
    seed=settings.label_seed,
  )
  return Subset(source, drawn)


def held_out(source: Source, share: float, split: str) -> Subset:
  """The validation part of a training split, evenly spread over it, or the rest."""
  count = round(share * len(source))
  if not 0 < count < len(source):
    raise UserError(
      f'data.validation={share:g} of {len(source)} training images leaves {count} to validate on; '
      'give a share that leaves some of both'
    )
  chosen = _spread(count, len(source))
  rest = np.setdiff1d(np.arange(len(source)), chosen)
  return Subset(source, chosen if split == 'validation' else rest)
