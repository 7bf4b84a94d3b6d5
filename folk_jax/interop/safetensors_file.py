"""`.safetensors` files read without trust (format: huggingface.co/docs/safetensors, as of version 0.8).

Eight bytes say how long the header is, the header is JSON (name -> dtype, shape, first and last byte), and the rest is
data. All of the header is checked against the size of the file before memory is taken for any array.
"""

import json
import math
import os
import struct
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from folk_jax import errors
from folk_jax.interop.npz import LIMIT_BYTES

_DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype('<u2'),
  'I64': np.dtype('<i8'),
  'U64': np.dtype('<u8'),
  'I32': np.dtype('<i4'),
  'U32': np.dtype('<u4'),
  'I16': np.dtype('<i2'),
  'U16': np.dtype('<u2'),
  'I8': np.dtype('i1'),
  'U8': np.dtype('u1'),
}
# Some hundred bytes an array.
_HEADER_BYTES = 16 << 20
_AXES = 32


def read_safetensors(
  path: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES
) -> dict[str, np.ndarray]:
  """Reads a `.safetensors` file.

  Args:
    path: of a local file.
    limit_bytes: a larger file is refused unread.

  Returns:
    name -> array of numbers; bfloat16 comes as float32.

  Raises:
    UserError: a file that is damaged, holds anything but arrays of numbers, or too much.
  """
  path = os.fspath(path)
  try:
    with open(path, 'rb') as file:
      header, start, size = _header(file, limit_bytes)
      arrays = {name: _described(name, about) for name, about in header.items()}
      _check_layout(arrays, size - start)
      return {name: _array(file, start, *array) for name, array in arrays.items()}
  except (ValueError, OSError, RecursionError, MemoryError, struct.error) as error:
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise errors.UserError(f'{path}: damaged or not what its ending says ({reason})') from error


def _header(file: IO[bytes], limit_bytes: int) -> tuple[dict[str, Any], int, int]:
  """The header without its metadata, where the data begin, and the size of the file."""
  size = os.fstat(file.fileno()).st_size
  (length,) = struct.unpack('<Q', file.read(8))
  start = 8 + length
  if start > size or length > _HEADER_BYTES:
    raise ValueError(f'its header claims {length} bytes, the file has {size}')
  if size - start > limit_bytes:
    raise ValueError(f'it has {size / 1e9:.1f} GB, more than weights of this model can be')
  header = json.loads(file.read(length).decode('utf-8'), object_pairs_hook=_once)
  if not isinstance(header, dict):
    raise ValueError('its header is no JSON object')
  header.pop('__metadata__', None)
  return header, start, size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('its header has a name twice')
  return found


def _described(name: str, about: Any) -> tuple[str, tuple[int, ...], int, int]:
  """dtype, shape, first byte and the one after the last."""
  match about:
    case {'dtype': str(dtype), 'shape': [*shape], 'data_offsets': [begin, end]}:
      numbers = (*shape, begin, end)
      fine = dtype in _DTYPES and len(shape) <= _AXES
      fine = fine and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
      if fine and end - begin == math.prod(shape) * _DTYPES[dtype].itemsize:
        return dtype, tuple(shape), begin, end
  raise ValueError(f'{name[:80]} is no array of numbers that fits into its bytes')


def _check_layout(arrays: dict[str, tuple[str, tuple[int, ...], int, int]], size: int) -> None:
  """Arrays follow each other without gaps or overlaps, and fill the file."""
  position = 0
  for _, _, begin, end in sorted(arrays.values(), key=lambda array: array[2:]):
    if begin != position:
      raise ValueError(f'an array begins at byte {begin} of the data, expected {position}')
    position = end
  if position != size:
    raise ValueError(f'its arrays take {position} bytes and there are {size}')


def _array(
  file: IO[bytes], start: int, dtype: str, shape: tuple[int, ...], begin: int, end: int
) -> np.ndarray:
  file.seek(start + begin)
  data = file.read(end - begin)
  if len(data) != end - begin:
    raise ValueError('it was cut while it was read')
  array = np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
  return array.view(jnp.bfloat16).astype(np.float32) if dtype == 'BF16' else array
