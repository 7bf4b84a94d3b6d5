"""Archives of arrays by name, read without trust: nothing is unpickled, and what is damaged is said in a line."""

import os
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np

from folk_jax import errors


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads an `.npz` file.

  Args:
    path: of a local file.

  Returns:
    name -> array of numbers. bfloat16, which NumPy knows only as pairs of bytes, comes as float32.

  Raises:
    UserError: no such file, no such archive, a damaged one, or one that holds anything but arrays of numbers.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise errors.UserError(f'{path}: no such file; give an .npz of weights')
  try:
    if not zipfile.is_zipfile(path):
      raise ValueError('no zip archive')
    with np.load(path, allow_pickle=False) as archive:
      return {name: _numbers(name, archive[name]) for name in archive.files}
  except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
    raise errors.UserError(f'{path}: damaged or not what its ending says ({error})') from error


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
  # A member that is no .npy comes as bytes.
  if isinstance(array, np.ndarray):
    if array.dtype.kind in 'fiu':
      return array
    if array.dtype.kind == 'V' and array.dtype.itemsize == 2:
      return array.view(jnp.bfloat16).astype(np.float32)
  raise ValueError(f'{name} is no array of numbers')
