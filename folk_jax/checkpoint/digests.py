"""Checksums of a checkpoint's files: what a disk loses between a save and a resume is found.

Orbax's indices carry checksums, the data of large arrays do not: a flipped bit there would be
trained on. `digests.json` holds size and CRC-32 of every file of the items. It is written by the
first process, after all processes have written, and before the step gets its name: a step under its
name has its digests. They find accidents; whoever changes a file on purpose can change its digest.

The cost: the first process reads the checkpoint once after each save, in the background, and once
more before a resume. A core does some 3 GB/s of CRC-32, so that storage sets the pace: what this
machine has just written is mostly in its page cache, what other processes wrote to shared storage is
read from there. The others wait for that, and give a save up that takes too long: above
`MOST_BYTES_OF_SEVERAL` the checkpoints of several processes have no digests.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from folk_jax.checkpoint import files
from folk_jax.errors import UserError

NAME = 'digests.json'
_ALGORITHM = 'crc32'
_CHUNK = 4 << 20
_THREADS = 4
# Read in three minutes at 400 MB/s, of the twenty for which Orbax lets the other processes wait.
MOST_BYTES_OF_SEVERAL = 64 << 30
# A checkpoint of a thousand processes has some tens of thousands of files.
_MOST_BYTES = 64 << 20


def write(folder: epath.Path, items: Sequence[str]) -> None:
  """Writes `digests.json` into a step's folder, for the files below its folders `items`.

  Raises:
    OSError: a file that cannot be read, or a disk that is full.
  """
  names = _files(folder, items)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))
  files.replace_text(folder / NAME, json.dumps({'algorithm': _ALGORITHM, 'files': digests}))


def problem(folder: epath.Path, items: Sequence[str]) -> str:
  """What is wrong with a step's files; '' where nothing is, or where nothing is known.

  A step from before there were digests, or in a bucket, has none. Files that the digests do not
  know are nobody's concern.

  Raises:
    OSError: a file, or a folder, that cannot be read: nothing is known about it.
  """
  if files.is_remote(folder) or not (folder / NAME).exists():
    return ''
  try:
    saved = files.read_json(folder / NAME, _MOST_BYTES)
    expected = saved['files']
    if saved['algorithm'] != _ALGORITHM:
      return f'{NAME} is damaged: its algorithm is {saved["algorithm"]!r}'  # Another one would get another file.
    # From the folder's own list of files: nothing is opened because a file names it.
    there = _files(folder, items)
    if missing := sorted(expected.keys() - set(there)):
      return f'{missing[0]} is missing'
    names = [name for name in there if name in expected]
    for name in names:
      size = os.path.getsize(folder / name)
      if size != expected[name][0]:
        return f'{name} has {size} bytes instead of {expected[name][0]}'
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      found = pool.map(lambda name: _digest(folder / name), names)
      for name, digest in zip(names, found, strict=True):
        if digest != list(expected[name]):
          return f'{name} has another checksum than when it was written'
  except (UserError, KeyError, TypeError, AttributeError, IndexError) as error:
    return f'{NAME} is damaged: {files.brief(error)}'
  return ''


def exist(folder: epath.Path) -> bool:
  """Whether a step has digests."""
  return not files.is_remote(folder) and (folder / NAME).exists()


def status(folder: epath.Path, items: Sequence[str]) -> list[tuple[str, int, int]]:
  """Name, bytes and time of change (ns) of every file of the items, and of the digests."""
  names = [*_files(folder, items), *[NAME] * exist(folder)]
  found = [(name, os.stat(folder / name)) for name in names]
  return [(name, one.st_size, one.st_mtime_ns) for name, one in found]


def _files(folder: epath.Path, items: Sequence[str]) -> list[str]:
  """Paths below the folder, with slashes, sorted. Raises OSError for a folder that cannot be listed."""
  root = os.fspath(folder)

  def fail(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # What is not there has no files.
      raise error

  return sorted(
    os.path.relpath(os.path.join(where, name), root).replace(os.sep, '/')
    for item in items
    for where, _, names in os.walk(os.path.join(root, item), onerror=fail)
    for name in names
  )


def _digest(path: Any) -> list[int]:
  """[bytes, CRC-32]."""
  size, checksum = 0, 0
  with open(path, 'rb') as file:
    while chunk := file.read(_CHUNK):
      size += len(chunk)
      checksum = zlib.crc32(chunk, checksum)  # Lets other threads run.
  return [size, checksum]
