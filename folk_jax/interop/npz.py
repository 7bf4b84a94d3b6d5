"""Archives of arrays by name, read without trust: nothing is unpickled, no more memory is taken than the file accounts
for, and what is damaged is said in a line.
"""

import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from typing import IO

import jax.numpy as jnp
import numpy as np

from folk_jax import errors

# What a file may unpack to, where the caller knows no better: more than any backbone has.
LIMIT_BYTES = 16 << 30
_MEMBERS = 100_000
# NumPy writes these two. Others (LZMA, for one) may ask for gigabytes before the first byte comes.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHUNK = 1 << 22
_ENDING = '.npy'
# What zipfile, zlib and NumPy's header raise on what they cannot read.
_FAILURES = (
  ValueError,
  TypeError,
  OSError,
  EOFError,
  LookupError,
  RuntimeError,  # A password, a method that is unknown, nesting too deep.
  OverflowError,
  MemoryError,
  SyntaxError,
  tokenize.TokenError,
  struct.error,
  zipfile.BadZipFile,
  zlib.error,
)


def read_npz(path: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES) -> dict[str, np.ndarray]:
  """Reads an `.npz` file.

  Args:
    path: of a local file.
    limit_bytes: all arrays together may have so many; a file that says it has more is refused unread.

  Returns:
    name -> array of numbers. bfloat16, which NumPy knows only as pairs of bytes, comes as float32.

  Raises:
    UserError: no such file, no such archive, a damaged one, one that holds anything but arrays of numbers, or too much.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise errors.UserError(f'{path}: no such file; give an .npz of weights')
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
      _check(members, limit_bytes)
      return {member.filename.removesuffix(_ENDING): _array(archive, member) for member in members}
  except _FAILURES as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise errors.UserError(f'{path}: damaged or not what its ending says ({reason})') from error


def _check(members: list[zipfile.ZipInfo], limit_bytes: int) -> None:
  """The table of contents alone: nothing has been unpacked yet."""
  names = {member.filename for member in members}
  if len(members) > _MEMBERS or len(names) < len(members):
    raise ValueError(f'it has {len(members)} members, {len(names)} of them by different names')
  total = sum(member.file_size for member in members)
  if total > limit_bytes:
    raise ValueError(f'it unpacks to {total / 1e9:.1f} GB, more than weights of this model can be')
  for member in members:
    if member.compress_type not in _COMPRESSIONS:
      raise ValueError(f'{member.filename} is compressed by an unknown method')


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  name = member.filename
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
      raise ValueError(f'{name} is no array of numbers')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of Python and NumPy, about how a header is written.
      shape, by_columns, dtype = read[version](file)
    narrow = dtype.kind == 'V' and dtype.itemsize == 2 and dtype.names is None
    if dtype.kind not in 'fiu' and not narrow:
      raise ValueError(f'{name} is no array of numbers')
    size = math.prod(shape) * dtype.itemsize
    # Before memory is taken for it: the header's word alone is worth nothing.
    if size != member.file_size - file.tell():
      raise ValueError(f'{name} claims {size} bytes and has {member.file_size - file.tell()}')
    data = _exactly(file, size)
    if file.read(1):  # Also compares the checksum, at the end.
      raise ValueError(f'{name} is longer than it says')
  flat = np.frombuffer(data, dtype)
  array = flat.reshape(shape, order='F' if by_columns else 'C')
  if narrow:
    return array.view(jnp.bfloat16).astype(np.float32)
  return array


def _exactly(file: IO[bytes], size: int) -> bytearray:
  """So many bytes, with memory taken as they come."""
  data = bytearray()
  while len(data) < size:
    chunk = file.read(min(_CHUNK, size - len(data)))
    if not chunk:
      raise EOFError(f'it ends after {len(data)} of {size} bytes')
    data += chunk
  return data
