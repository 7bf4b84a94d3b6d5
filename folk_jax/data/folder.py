"""Images in folders: class folders, or one folder of unlabelled images; any format that Pillow
reads.
"""

import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from folk_jax.data.decode import formats, read_file
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import TEST_SPLITS, MissingSplit, Source
from folk_jax.errors import UserError


def image_suffixes() -> frozenset[str]:
  """Returns the lower-case file name endings, with their dot, that Pillow can open here."""
  ours = frozenset(formats())
  return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in ours)


def split_folder(settings: DataSettings, split: str) -> str:
  """Finds the folder of a split under `settings.path`.

  Args:
    settings: `path`, `train_split` and `test_split` are used.
    split: 'train' or 'test'.

  Returns:
    path/<split> where it exists; for training also `path` itself, when it holds no split folders.

  Raises:
    UserError: no path, no such folder, or no folder for this split.
  """
  path = settings.path
  if not path:
    raise UserError(
      "data.path is empty; source 'folder' needs the folder of images (:data=folder,path=DIR)"
    )
  if not os.path.isdir(path):
    found = 'is a file' if os.path.exists(path) else 'does not exist'
    raise UserError(f"data.path '{path}' {found}; give a folder of images")
  wanted = settings.train_split if split == 'train' else settings.test_split
  for name in (wanted,) if wanted else TEST_SPLITS:
    if os.path.isdir(os.path.join(path, name)):
      return os.path.join(path, name)
  if split == 'train' and wanted == 'train':
    others = [name for name in TEST_SPLITS if os.path.isdir(os.path.join(path, name))]
    if not others:
      return path
    raise UserError(
      f"'{path}' holds '{others[0]}' but no 'train' folder; add one, or set data.train_split"
    )
  names = (
    f"'{wanted}'" if wanted else ', '.join(f"'{name}'" for name in TEST_SPLITS[:-1]) + " or 'test'"
  )
  raise MissingSplit(
    f"'{path}' holds no folder {names} for the {split} split; add one, or set data.{split}_split"
  )


class FolderSource(Source):
  """Every image file under a folder, in sorted order.

  Class folders (`path/train/<class>/...`, or `path/<class>/...`) give the labels, numbered in
  sorted order; a folder without class folders gives unlabelled images. The evaluation split numbers
  its classes as the training split does.

  The paths are kept as one block of bytes with offsets: a million Python strings would cost each
  worker 130 MB.
  """

  def __init__(self, settings: DataSettings, split: str):
    self._root = split_folder(settings, split)
    self.class_names = class_folders(self._root)
    listed = list(list_images(self._root, self.class_names))
    if split == 'test':
      self.class_names = self._training_classes(settings)
      listed = self._renumber(listed)
    if not listed:
      raise UserError(
        f"no images under '{self._root}'; expected files that Pillow reads (.jpg, .png, ...)"
      )
    if not any(label >= 0 for _, label in listed):
      self.class_names = ()
    encoded = [os.fsencode(path) for path, _ in listed]
    self._paths = b''.join(encoded)
    self._ends = np.cumsum([len(path) for path in encoded])
    self._labels = np.array([label for _, label in listed], np.int32)

  def _training_classes(self, settings: DataSettings) -> tuple[str, ...]:
    try:
      return class_folders(split_folder(settings, 'train')) or self.class_names
    except UserError:  # no training split: the evaluation split numbers its own
      return self.class_names

  def _renumber(self, listed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Numbers the classes as training does; their numbers there need not be the same here."""
    number = {name: label for label, name in enumerate(self.class_names)}
    renumbered = []
    for path, label in listed:
      name = path.split(os.sep, 1)[0]
      if label >= 0 and name not in number:
        raise UserError(
          f"class folder '{name}' of '{self._root}' is not among the training split's classes; "
          'remove it or add the class to the training split'
        )
      renumbered.append((path, number[name] if label >= 0 else -1))
    return renumbered

  def __len__(self) -> int:
    return len(self._labels)

  def name(self, index: int) -> str:
    start = self._ends[index - 1] if index else 0
    return os.path.join(self._root, os.fsdecode(self._paths[start : self._ends[index]]))

  def file(self, index: int) -> str:
    return self.name(index)

  def label(self, index: int) -> int:
    return int(self._labels[index])

  def labels(self, indices: np.ndarray) -> np.ndarray:
    return self._labels[indices]

  def read(self, index: int) -> tuple[bytes, int]:
    return read_file(self.name(index)), self.label(index)


def class_folders(root: str) -> tuple[str, ...]:
  """Returns the names of the folders directly under `root`, sorted, without hidden ones."""
  with os.scandir(root) as entries:
    return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith('.')))


def list_images(root: str, class_names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
  """Lists the image files under a folder.

  Args:
    root: the folder.
    class_names: its class folders in the order of their labels.

  Yields:
    (path relative to `root`, label) in sorted order: class by class, or unlabelled where the class
    folders hold no image. Files beside class folders that hold images have no class and are left
    out.
  """
  suffixes = image_suffixes()
  found = False
  for label, name in enumerate(class_names):
    for path in _walk(root, name, suffixes, frozenset()):
      found = True
      yield path, label
  if not found:
    with os.scandir(root) as entries:
      names = sorted(e.name for e in entries if e.is_file() and _is_image(e.name, suffixes))
    for name in names:
      yield name, -1


def _is_image(name: str, suffixes: frozenset[str]) -> bool:
  return not name.startswith('.') and os.path.splitext(name)[1].lower() in suffixes


def _walk(root: str, under: str, suffixes: frozenset[str], above: frozenset) -> Iterator[str]:
  """Yields the image files under root/under, sorted; a link back to a folder above is not
  followed.
  """
  folder = os.path.join(root, under)
  status = os.stat(folder)
  if (status.st_dev, status.st_ino) in above:
    return
  above |= {(status.st_dev, status.st_ino)}
  with os.scandir(folder) as entries:
    listed = sorted((e.name, e.is_dir()) for e in entries)
  for name, is_folder in listed:
    path = os.path.join(under, name)
    if is_folder and not name.startswith('.'):
      yield from _walk(root, path, suffixes, above)
    elif not is_folder and _is_image(name, suffixes):
      yield path
