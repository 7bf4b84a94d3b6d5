"""Folders of images and masks: `<split>/images/*.jpg` beside `<split>/masks/*.png`."""

import os

import numpy as np

from folk_jax.data import masks
from folk_jax.data.decode import read_file
from folk_jax.data.folder import image_suffixes, split_folder
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.errors import UserError


class MaskFolderSource(Source):
  """Pairs of an image and a mask, by name, in sorted order; they have no label.

  `path/classes.txt`, where it is there, names the classes, one a line in the order of their ids.
  """

  def __init__(self, settings: DataSettings, split: str):
    if settings.masks is None:
      raise UserError(
        "data.source 'mask_folder' needs config.data.masks (classes, ignore, ...): see configs/camvid.py"
      )
    self._settings = settings.masks
    self._root = split_folder(settings, split)
    self._pairs = masks.pair_names(self._root, *(self._files(kind) for kind in ('images', 'masks')))
    self.class_names = _class_names(settings.path, settings.masks.classes)

  def _files(self, kind: str) -> list[str]:
    folder = os.path.join(self._root, kind)
    if not os.path.isdir(folder):
      raise UserError(
        f"no folder '{folder}'; data.source 'mask_folder' reads <split>/images and <split>/masks"
      )
    suffixes = image_suffixes()
    with os.scandir(folder) as entries:
      return [
        e.name
        for e in entries
        if not e.name.startswith('.') and os.path.splitext(e.name)[1].lower() in suffixes
      ]

  def __len__(self) -> int:
    return len(self._pairs)

  def name(self, index: int) -> str:
    return os.path.join(self._root, 'images', self._pairs[index][0])

  def file(self, index: int) -> str:
    return self.name(index)

  def label(self, index: int) -> int:
    return -1

  def read(self, index: int) -> tuple[bytes, int]:
    return read_file(self.name(index)), -1

  def mask(self, index: int) -> np.ndarray:
    path = os.path.join(self._root, 'masks', self._pairs[index][1])
    try:
      data = read_file(path)
    except OSError as error:
      raise UserError(f"mask '{path}' cannot be read ({error}); mend it") from None
    return masks.decode_mask(data, path, self._settings)


def _class_names(root: str, classes: int) -> tuple[str, ...]:
  path = os.path.join(root, 'classes.txt')
  if not os.path.isfile(path):
    return tuple(f'class {number}' for number in range(classes))
  with open(path, encoding='utf-8') as file:
    names = tuple(line.strip() for line in file if line.strip())
  if len(names) != classes:
    raise UserError(
      f"'{path}' names {len(names)} classes and data.masks.classes is {classes}; make them agree"
    )
  return names
