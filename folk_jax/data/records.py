"""Our own ArrayRecord data sets: the record's layout, the index beside the shards, the source that
reads them.

A data set is a folder of ArrayRecord files (one image a group, uncompressed: images already are)
and `index.json`: `{"format": "folk_jax", "version": 1, "class_names": [...], "splits": {"train":
{"complete": true, "fingerprint": ..., "samples": N, "shards": [{"file": ..., "samples": n},
...]}}}`. `folk_jax.data.prepare` writes it. A record is the label (int32) and the name's length
(uint16), little-endian, then the name in UTF-8, then the image file's bytes.
"""

import json
import os
import struct
import threading
from typing import Any

import numpy as np

from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import TEST_SPLITS, MissingSplit, Source
from folk_jax.errors import UserError

INDEX = 'index.json'
FORMAT = 'folk_jax'
VERSION = 1
# Group size 1: random access would otherwise decompress a whole group for one record.
WRITER_OPTIONS = 'group_size:1,uncompressed'
_READER_OPTIONS = 'readahead_buffer_size:0'
_HEADER = struct.Struct('<iH')


def pack(label: int, name: str, data: bytes) -> bytes:
  """Returns one record: label (-1 unknown), name (shortened to 65,535 bytes), the image file's
  bytes.
  """
  encoded = name.encode('utf-8', 'replace')[:0xFFFF]
  return _HEADER.pack(label, len(encoded)) + encoded + data


def unpack(record: bytes) -> tuple[int, str, bytes]:
  """Returns (label, name, image bytes) of a record that `pack` made; struct.error where it is too short for one."""
  label, length = _HEADER.unpack_from(record)
  start = _HEADER.size + length
  return label, record[_HEADER.size : start].decode('utf-8', 'replace'), record[start:]


def load_index(path: str) -> dict[str, Any]:
  """Reads the index of a data set folder.

  Raises:
    UserError: no path, no index, or not one of ours.
  """
  if not path:
    raise UserError(
      "data.path is empty; source 'array_record' needs the folder that launch/prepare_data.sh wrote"
    )
  file = os.path.join(path, INDEX)
  if not os.path.isfile(file):
    raise UserError(
      f"no {INDEX} in '{path}'; write the data set first: launch/prepare_data.sh --from=folder "
      f'--source=DIR --out={path}'
    )
  with open(file, encoding='utf-8') as opened:
    try:
      index = json.load(opened)
    except ValueError as error:
      raise UserError(
        f"'{file}' is not JSON ({error}); prepare the data set again into an empty folder"
      ) from error
  found = (index.get('format'), index.get('version')) if isinstance(index, dict) else None
  if found != (FORMAT, VERSION):
    raise UserError(
      f"'{file}' is of {found}, not of {(FORMAT, VERSION)}; prepare the data set again"
    )
  return index


class ArrayRecordSource(Source):
  """The records of one split, in the order they were written; shards are opened when first read."""

  def __init__(self, settings: DataSettings, split: str):
    self._root = settings.path
    index = load_index(settings.path)
    splits = index['splits']
    wanted = settings.train_split if split == 'train' else settings.test_split
    name = next((n for n in ((wanted,) if wanted else TEST_SPLITS) if n in splits), None)
    if name is None:
      known = ', '.join(sorted(splits)) or 'none'
      raise MissingSplit(
        f"'{settings.path}' has no split '{wanted or ' / '.join(TEST_SPLITS)}'; known: {known}; "
        f'set data.{split}_split or prepare that split'
      )
    if not splits[name]['complete']:
      raise UserError(
        f"split '{name}' of '{settings.path}' is not finished; run the same prepare command again"
      )
    self.class_names = tuple(index['class_names'])
    self._files = [shard['file'] for shard in splits[name]['shards']]
    self._ends = np.cumsum([shard['samples'] for shard in splits[name]['shards']], dtype=np.int64)
    for file in self._files:
      if os.path.basename(file) != file:
        raise UserError(
          f"'{os.path.join(self._root, INDEX)}' names shard '{file}', which is outside its folder; prepare the data "
          'set again'
        )
      if not os.path.isfile(os.path.join(self._root, file)):
        raise UserError(
          f"shard '{file}' of '{self._root}' is missing; copy it there or prepare the data set "
          'again'
        )
    self._open()

  def _open(self) -> None:
    self._readers: list[Any] = [None] * len(self._files)
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key not in ('_readers', '_lock')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def _at(self, index: int) -> tuple[int, int]:
    """The number of a record's shard, and the record's in it."""
    shard = int(np.searchsorted(self._ends, index, side='right'))
    return shard, index - (int(self._ends[shard - 1]) if shard else 0)

  def _record(self, index: int) -> tuple[int, str, bytes]:
    """Reads a record; raises OSError, without the shard's name, where that is missing, cut short or damaged."""
    shard, position = self._at(index)
    reader = self._readers[shard]
    if reader is None:
      with self._lock:
        if self._readers[shard] is None:
          self._readers[shard] = open_reader(os.path.join(self._root, self._files[shard]))
        reader = self._readers[shard]
    # A shard that is missing or cut short opens without a word, and has no records.
    wanted = int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))
    if reader.num_records() != wanted:
      found = reader.num_records()
      raise OSError(
        f'the shard cannot be read: {wanted} records expected, {found} found: missing, cut short or damaged'
      )
    try:
      return unpack(reader.read([position])[0])
    except (RuntimeError, ValueError, IndexError, struct.error) as error:
      raise OSError(f'the record cannot be read: {error}'.splitlines()[0]) from error

  def read(self, index: int) -> tuple[bytes, int]:
    label, _, data = self._record(index)
    return data, label

  def name(self, index: int) -> str:
    try:
      return f'{self.place(index)}: {self._record(index)[1]}'
    except OSError:
      return self.place(index)

  def place(self, index: int) -> str:
    return f'{self.file(index)}, record {self._at(index)[1]}'

  def file(self, index: int) -> str:
    return os.path.join(self._root, self._files[self._at(index)[0]])


def open_reader(path: str) -> Any:
  """Opens a shard for random access; its reader is safe to share between threads."""
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(
    path, options=_READER_OPTIONS, file_reader_buffer_size=1 << 15
  )
