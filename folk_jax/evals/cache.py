"""Features on disk: extracted once for a set of weights and a data set, and found again by every evaluation after.

Shape letters: N images, D features.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

Features = dict[str, np.ndarray]

_KEY, _LABELS, _FEATURE = 'key', 'labels', 'feature/'


def cache_key(weights: Any, about: Mapping[str, Any]) -> str:
  """A name for features: equal where all that they depend on is equal.

  Args:
    weights: any tree of arrays that are whole on this host: parameters and BatchNorm statistics.
    about: what else the features depend on, as JSON has it: the data (source, split, number of images, names of
      classes), their preprocessing (sizes, interpolation, mean and deviation), the model's fields and compute type,
      the names of the features.

  Returns:
    64 hexadecimal digits of SHA-256 over every leaf's name, dtype, shape and bytes, and over `about` in the order of
    its keys.

  Raises:
    TypeError: where `about` holds what JSON does not.
  """
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  for path, leaf in jax.tree.leaves_with_path(weights):
    array = np.ascontiguousarray(jax.device_get(leaf))
    digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def load_or_extract(
  path: str, key: str, compute: Callable[[], tuple[Features, np.ndarray]]
) -> tuple[Features, np.ndarray]:
  """The features that `path` holds under `key`, or those that `compute` makes, kept there for the next time.

  A file that is damaged, no such file, or of another key is replaced, and one line of warning says so. On several hosts
  all read or all compute, and the first writes.

  Args:
    path: of an .npz file; its folder is made.
    key: from `cache_key`.
    compute: makes (features by name, each float32 [N, D], and labels int32 [N]).

  Returns:
    What `compute` returned, now or earlier, bit for bit.
  """
  file = epath.Path(path).expanduser()
  found = _read(file, key)
  if jax.process_count() > 1:
    everywhere = multihost_utils.process_allgather(np.array(found is not None))
    found = found if np.all(everywhere) else None
  if found is not None:
    return found
  features, labels = compute()
  if jax.process_index() == 0:
    _write(file, key, features, labels)
  return features, labels


def _read(file: epath.Path, key: str) -> tuple[Features, np.ndarray] | None:
  """What the file holds; None, and a warning unless it just isn't there, where that is of no use."""
  if not file.exists():
    return None
  try:
    # Reading an array to its end checks the archive's CRC: a flipped bit is found.
    with file.open('rb') as opened, np.load(opened, allow_pickle=False) as archive:
      if str(archive[_KEY]) != key:
        raise ValueError('it is of other weights, data or preprocessing')
      features = {
        name.removeprefix(_FEATURE): archive[name]
        for name in archive.files
        if name.startswith(_FEATURE)
      }
      labels = archive[_LABELS]
  # What a damaged archive raises is zipfile's, zlib's and NumPy's, and not documented: BadZipFile, OSError, EOFError,
  # ValueError, KeyError, NotImplementedError, SyntaxError have been seen.
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    logging.warning('features in %s are extracted again: %s', file, reason)
    return None
  return features, labels


def _write(file: epath.Path, key: str, features: Features, labels: np.ndarray) -> None:
  """All or nothing: a kill leaves the old file or the new one. A disk that is full costs the cache, not the run."""
  fresh = file.with_name(f'{file.name}.tmp')
  arrays = {_KEY: np.array(key), _LABELS: labels}
  arrays |= {f'{_FEATURE}{name}': feature for name, feature in features.items()}
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with fresh.open('wb') as opened:
      np.savez(opened, **arrays)
    fresh.replace(file)
  except OSError as error:
    logging.warning('features are not kept in %s: %s', file, error)
