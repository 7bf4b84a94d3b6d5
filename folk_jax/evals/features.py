"""Features of a data set, extracted once and shared by every evaluation on frozen features.

Shape letters: B images of a batch, N images of the data set, H, W pixels, D features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.experimental import multihost_utils

from folk_jax.errors import UserError
from folk_jax.models.features import FEATURES, encode_options, feature

__all__ = ['FEATURES', 'Diverged', 'encode_options', 'extract', 'feature']


class Diverged(UserError):
  """A network gives features that are not finite: nothing can be judged by them."""


def extract(
  apply_fn: Callable[[Any, jax.Array], Any],
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  put: Callable[[np.ndarray], jax.Array] | None = None,
  progress: Callable[[int], None] | None = None,
) -> tuple[Any, np.ndarray]:
  """Features and labels, on the host, of the valid rows of batches of single views.

  One batch is always in flight: the device works on it while the host fetches the one before. On
  several hosts every process iterates over its own share, with the same number of batches, and gets
  the features of all.

  Args:
    apply_fn: `(params, image uint8 [B, H, W, 3]) -> [B, D]`, or a dict of such features, which then
      share a forward pass. It is compiled here; pass the same function object again and it is not
      compiled again.
    params: its parameters, on the devices.
    batches: dicts with `views` uint8 [B, 1, H, W, 3], `label` int32 [B] and `valid` bool [B]; all
      of one size B.
    put: moves a host array with a leading batch axis to the devices, sharded as the caller likes;
      on several hosts it makes the global array of the processes' parts. By default `jnp.asarray`.
    progress: called with the number of rows, padding apart, each time a batch is done.

  Returns:
    features float32 [N, D], or a dict of them, and labels int32 [N], in the order of the batches.

  Raises:
    Diverged: an image's feature is not finite.
    ValueError: if a batch does not hold exactly one view an image, or no row is valid.
  """
  put = put or jnp.asarray
  apply_fn = jax.jit(apply_fn)
  features, labels = [], []

  def collect(pending: tuple[Any, Any, Any, Any]) -> None:
    found, label_B, valid_B, index_B = _to_host(pending)
    rows = np.flatnonzero(valid_B)
    if jax.process_count() > 1:
      rows = rows[np.argsort(index_B[rows], kind='stable')]
    features.append(jax.tree.map(lambda x_BD: np.asarray(x_BD, np.float32)[rows], found))
    labels.append(np.asarray(label_B, np.int32)[rows])
    if progress:
      progress(len(rows))

  pending = None
  for batch in batches:
    views_BVHWC = batch['views']
    if views_BVHWC.ndim != 5 or views_BVHWC.shape[1] != 1:
      raise ValueError(
        f'evaluation takes views of shape [B, 1, H, W, 3], found {views_BVHWC.shape}'
      )
    found = apply_fn(params, put(views_BVHWC[:, 0]))
    label_B, valid_B, index_B = batch['label'], batch['valid'], None
    if jax.process_count() > 1:
      # Rows of a global array lie in the order of the mesh's devices: labels travel the same way, and the samples'
      # numbers, by which the rows go back into the order of one process.
      label_B, valid_B, index_B = put(label_B), put(valid_B), put(batch['index'].astype(np.int32))
    else:
      for feature_BD in jax.tree.leaves(found):
        feature_BD.copy_to_host_async()
    if pending is not None:
      collect(pending)
    pending = found, label_B, valid_B, index_B
  if pending is not None:
    collect(pending)
  if not sum(map(len, labels)):
    raise ValueError('no valid image among the batches to extract features from')
  found = jax.tree.map(lambda *parts: np.concatenate(parts), *features)
  _check_finite(found)
  return found, np.concatenate(labels)


def _check_finite(found: Any) -> None:
  for feature_ND in jax.tree.leaves(found):
    # A float64 sum is finite exactly where all its float32 terms are, and takes no second array.
    with np.errstate(invalid='ignore'):
      bad = int(np.sum(~np.isfinite(feature_ND.sum(axis=1, dtype=np.float64))))
    if bad:
      raise Diverged(
        f'the network gives {bad} of {len(feature_ND)} images features that are not finite, so it cannot be judged: '
        'it has diverged. Take an earlier checkpoint, or train with a lower optimizer.learning_rate.'
      )


def _to_host(arrays: Any) -> Any:
  if jax.process_count() > 1:
    return multihost_utils.process_allgather(arrays, tiled=True)
  return jax.device_get(arrays)
