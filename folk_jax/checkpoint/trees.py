"""Saved trees of arrays, as metadata: compared with what is wanted, and searched by names."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_SHOWN_MISMATCHES = 3


def abstract(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
  """A leaf's shape, dtype and sharding. Raises ValueError where it has no sharding."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    raise ValueError(f'{".".join(_names(path))} has no sharding: restore needs one at every leaf')
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """A jax key path as Orbax names it: fields, keys and positions alike as text."""
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def mismatches(saved: Any, wanted: Any) -> str:
  """The first differences of two trees in paths, shapes and dtypes; '' where there is none.

  Orbax would cast dtypes and pass over some of the rest.
  """
  found, expected = (
    {_names(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (saved, wanted)
  )
  differing = []
  for keys in expected | found:
    there, here = _described(found.get(keys)), _described(expected.get(keys))
    if there != here:
      differing.append(f'{".".join(keys)}: found {there}, expected {here}')
  more = len(differing) - _SHOWN_MISMATCHES
  return '; '.join(differing[:_SHOWN_MISMATCHES]) + (f'; and {more} more' if more > 0 else '')


def _described(leaf: Any) -> str:
  return 'nothing' if leaf is None else f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def size(tree: Any) -> int:
  """Bytes of all leaves, arrays or descriptions of them."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'dtype')]
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def children(node: Any) -> list[tuple[str, Any]]:
  """A node's children by their names; positions in lists as text."""
  if isinstance(node, Mapping):
    return [(str(key), child) for key, child in node.items()]
  if isinstance(node, list | tuple):
    return [(str(position), child) for position, child in enumerate(node)]
  return []


def matches(node: Any, under: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
  """Every node that the pattern reaches, by its keys."""
  if not under:
    return {(): node}
  deep = under[0] == '**'
  found = matches(node, under[1:]) if deep else {}
  for key, child in children(node):
    if deep or key == under[0]:
      below = matches(child, under if deep else under[1:])
      found |= {(key, *keys): match for keys, match in below.items()}
  return found


def with_node(tree: Any, keys: tuple[str, ...], node: Any) -> Any:
  """The tree with another node at `keys`."""
  if not keys:
    return node
  replaced = {
    key: with_node(child, keys[1:], node) if key == keys[0] else child
    for key, child in children(tree)
  }
  return replaced if isinstance(tree, Mapping) else list(replaced.values())


def upper_levels(tree: Any) -> str:
  """The two upper levels in words: `params (backbone, projection), step`."""
  below = {key: ', '.join(name for name, _ in children(child)) for key, child in children(tree)}
  return ', '.join(f'{key} ({names})' if names else key for key, names in below.items())
