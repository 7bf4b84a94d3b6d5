"""DINO's weighted k-nearest-neighbour classifier on frozen features: exact, blocked, on device.

Shape letters: N labelled images (the bank), M images of a block of it, Q images to classify, D
features, K neighbours, C classes. Functions called `of_one` see one image to classify: they are
mapped.

Protocol (DINO, https://arxiv.org/abs/2104.14294, section 4.1 and appendix; from Wu et al.,
https://arxiv.org/abs/1805.01978): cosine similarity s to the bank, the k nearest images vote for
their class with weight exp(s / temperature). The order is total, so that the answer does not depend
on blocks or devices (similarities apart that differ by rounding alone): equal similarities rank by
position in the bank, equal votes by class number.
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

from folk_jax.errors import UserError
from folk_jax.signal.shard import over_batch


def knn(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  ks: Sequence[int] = (10, 20, 100, 200),
  temperature: float = 0.07,
  classes: int,
  bank_block: int = 16384,
  query_block: int = 256,
) -> dict[int, tuple[float, float]]:
  """Top-1 and top-5 accuracy of the weighted vote, for every k from one search.

  The images to classify are spread over the mesh that `jax.set_mesh` has set, if any; every device
  sees the whole bank, block by block. Memory of a device: a few blocks of the bank, a few times
  `query_block * bank_block` similarities, and its images to classify with their neighbours so far.
  On several hosts every process passes the same arrays.

  Args:
    train_features: [N, D], any float dtype and scale: L2-normalised here, a vector of zeros stays
      one.
    train_labels: integers [N] in [0, classes).
    test_features: [Q, D].
    test_labels: integers [Q] in [0, classes).
    ks: numbers of neighbours; one above N uses all N.
    temperature: of the vote, positive.
    classes: number of classes.
    bank_block: images of the bank taken at a time.
    query_block: images classified at a time on a device.

  Returns:
    {k: (top-1, top-5)} in the order of `ks`, shares in [0, 1]. Top-5 counts a class only if it has
    a vote, so with fewer than five classes among the neighbours it can be below 1; DINO's code
    fills up with classes that have none.

  Raises:
    UserError: if a label lies outside [0, classes).
    ValueError: if shapes do not fit, a feature is not finite, or k or temperature is not positive.
  """
  train_features, train_labels = _checked('train', train_features, train_labels, classes)
  test_features, test_labels = _checked('test', test_features, test_labels, classes)
  if train_features.shape[1] != test_features.shape[1]:
    raise ValueError(
      f'train features have {train_features.shape[1]} dimensions, '
      f'test features {test_features.shape[1]}'
    )
  if not ks or min(ks) < 1:
    raise ValueError(f'ks is {tuple(ks)}, expected at least one number, all of at least 1')
  if not temperature > 0:
    raise ValueError(f'temperature is {temperature}, expected a positive number')

  bank, images = len(train_labels), len(test_labels)
  clipped = tuple(sorted({min(k, bank) for k in ks}))
  devices = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
  padding = -images % devices
  query_QD, nearest = _start(_padded(test_features, padding), clipped[-1])

  bank_block = min(bank_block, bank)
  for first in range(0, bank, bank_block):
    block_MD = train_features[first : first + bank_block]
    count = len(block_MD)
    block_MD = _padded(block_MD, bank_block - count)
    # Transfers are queued ahead of the work: waiting here keeps at most two blocks on a device.
    jax.block_until_ready(nearest)
    nearest = _search(query_QD, *nearest, block_MD, first, count, query_block=query_block)

  hits_K2 = _score(
    *nearest,
    train_labels,
    _padded(test_labels, padding),
    np.arange(images + padding) < images,
    ks=clipped,
    temperature=temperature,
    classes=classes,
    query_block=query_block,
  )
  accuracy = dict(zip(clipped, (np.asarray(hits_K2) / images).tolist(), strict=True))
  return {k: tuple(accuracy[min(k, bank)]) for k in ks}


def votes(
  similarity_K: jax.Array, label_K: jax.Array, ks: Sequence[int], temperature: float, classes: int
) -> jax.Array:
  """Votes of the k nearest neighbours of one image for each class, for each k.

  Args:
    similarity_K: float32 cosine similarities, falling.
    label_K: the neighbours' classes, int32.
    ks: rising, at least 1 and at most K; static.
    temperature: positive.
    classes: C, static.

  Returns:
    float32 [len(ks), C] in units of the nearest neighbour's vote: exp(s / temperature) itself
    overflows at temperatures below 0.0113. A class has more than 0 if and only if a neighbour voted
    for it.
  """
  weight_K = jnp.exp((similarity_K - similarity_K[0]) / temperature)
  weight_K = jnp.maximum(weight_K, jnp.finfo(jnp.float32).tiny)
  class_C = jnp.arange(classes)

  def ballot_C(rank: jax.Array | int) -> jax.Array:
    return jnp.where(class_C == label_K[rank], weight_K[rank], 0.0)

  # One neighbour after the other: no [K, C] array an image, and a fixed order of summation, which a
  # scatter lacks on GPUs.
  vote_C, counted, snapshots = ballot_C(0), 1, []
  for k in ks:
    vote_C = jax.lax.fori_loop(counted, k, lambda rank, vote_C: vote_C + ballot_C(rank), vote_C)
    counted = k
    snapshots.append(vote_C)
  return jnp.stack(snapshots)


@functools.partial(jax.jit, static_argnames='k')
def _start(query_QD: jax.Array, k: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Normalised images to classify, and k neighbours of each that any real one displaces."""

  def of_one(query_D: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _unit(query_D), (jnp.full((k,), -jnp.inf), jnp.zeros((k,), jnp.int32))

  return over_batch(jax.vmap(of_one), query_QD)


@functools.partial(jax.jit, static_argnames='query_block')
def _search(
  query_QD: jax.Array,
  similarity_QK: jax.Array,
  index_QK: jax.Array,
  block_MD: jax.Array,
  first: jax.Array,
  count: jax.Array,
  *,
  query_block: int,
) -> tuple[jax.Array, jax.Array]:
  """The nearest among those so far and a block's first `count` rows, numbered from `first`."""

  def share(query_QD, similarity_QK, index_QK, block_MD, first, count):
    block_MD = _unit(block_MD)
    real_M = jnp.arange(block_MD.shape[0]) < count

    def of_one(one):
      query_D, similarity_K, index_K = one
      # Full precision: rounding similarities to bfloat16 or TF32 reorders the neighbours.
      similarity_M = jnp.einsum('d,md->m', query_D, block_MD, precision=jax.lax.Precision.HIGHEST)
      similarity_M = jnp.where(real_M, similarity_M, -jnp.inf)
      # top_k puts the earlier of two equals first, and what came from earlier blocks stands first.
      k = len(similarity_K)
      both = jnp.concatenate([similarity_K, similarity_M])
      similarity_K, position_K = jax.lax.top_k(both, k)
      old_K = index_K[jnp.minimum(position_K, k - 1)]
      return similarity_K, jnp.where(position_K < k, old_K, first + position_K - k)

    return jax.lax.map(of_one, (query_QD, similarity_QK, index_QK), batch_size=query_block)

  return over_batch(share, query_QD, similarity_QK, index_QK, replicated=(block_MD, first, count))


@functools.partial(jax.jit, static_argnames=('ks', 'temperature', 'classes', 'query_block'))
def _score(
  similarity_QK: jax.Array,
  index_QK: jax.Array,
  train_label_N: jax.Array,
  test_label_Q: jax.Array,
  valid_Q: jax.Array,
  *,
  ks: tuple[int, ...],
  temperature: float,
  classes: int,
  query_block: int,
) -> jax.Array:
  """For each k, how many images have their class first, and in the first five: int32 [k, 2]."""

  def share(similarity_QK, index_QK, test_label_Q, valid_Q, train_label_N):
    def of_one(one):
      similarity_K, index_K, label, valid = one
      vote_KC = votes(similarity_K, train_label_N[index_K], ks, temperature, classes)
      own_K1 = vote_KC[:, label][:, None]
      ahead_KC = (vote_KC > own_K1) | ((vote_KC == own_K1) & (jnp.arange(classes) < label))
      rank_K1 = ahead_KC.sum(axis=1, keepdims=True)
      return valid & (own_K1 > 0) & (rank_K1 < jnp.array([1, 5]))

    rows = (similarity_QK, index_QK, test_label_Q, valid_Q)
    return jax.lax.map(of_one, rows, batch_size=query_block)

  hit_QK2 = over_batch(
    share, similarity_QK, index_QK, test_label_Q, valid_Q, replicated=(train_label_N,)
  )
  return hit_QK2.sum(axis=0, dtype=jnp.int32)


def _unit(feature: jax.Array) -> jax.Array:
  """L2-normalised over the last axis, in float32; torch's rule for vectors of hardly any length."""
  feature = feature.astype(jnp.float32)
  return feature / jnp.maximum(jnp.linalg.norm(feature, axis=-1, keepdims=True), 1e-12)


def _padded(rows: np.ndarray, padding: int) -> np.ndarray:
  return np.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1))


def _checked(
  split: str, features: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
  features, labels = np.asarray(features), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
    raise ValueError(
      f'{split} features have shape {features.shape} and labels {labels.shape}, '
      'expected [N, D] and [N] with N > 0'
    )
  # A float64 sum is finite exactly where all float32 terms are, and takes no second array.
  if not np.isfinite(features.sum(dtype=np.float64)):
    raise ValueError(
      f'{split} features hold values that are not finite: the network that made them has diverged'
    )
  if labels.min() < 0 or labels.max() >= classes:
    raise UserError(
      f'{split} labels lie in {labels.min()}..{labels.max()}, kNN expects 0..{classes - 1}: '
      'evaluate on a labelled data set, or switch the evaluation off'
    )
  return features, labels.astype(np.int32)
