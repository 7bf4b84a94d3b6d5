"""Our backbones in timm's names and torch's layouts, and back.

Both directions read one table of names and transposes for each backbone, `vit_names` and
`resnet_names`. The shape of a tree tells whose it is.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from folk_jax import errors
from folk_jax.interop.big_vision import from_big_vision, is_big_vision, to_big_vision
from folk_jax.interop.names import PARAMS, STATISTICS, Entry, Names, check_fit
from folk_jax.interop.npz import LIMIT_BYTES, read_npz
from folk_jax.interop.resnet_names import RESNET
from folk_jax.interop.safetensors_file import read_safetensors
from folk_jax.interop.vit_names import TIMM_PATCHES, VIT, VIT_SIZES

__all__ = [
  'NAMES',
  'TIMM_PATCHES',
  'VIT_SIZES',
  'Variables',
  'from_big_vision',
  'from_timm',
  'ignored_names',
  'is_big_vision',
  'load_timm_file',
  'names_of',
  'read_npz',
  'statistics_shapes',
  'timm_model',
  'timm_shapes',
  'to_big_vision',
  'to_timm',
  'variables_from_timm',
]

# `model.name` -> its table.
NAMES: dict[str, Names] = {'vit': VIT, 'resnet': RESNET}
_CLASSIFIERS = tuple(names.classifier for names in NAMES.values())
_COUNTER = '.num_batches_tracked'


class Variables(NamedTuple):
  """Trees of float32 numpy arrays: a backbone's parameters, and its statistics ({} for none)."""

  params: dict[str, Any]
  statistics: dict[str, Any]


def to_timm(
  backbone: Mapping[str, Any], statistics: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
  """Renames and transposes our parameters to timm's `state_dict()`.

  Args:
    backbone: the tree `params['backbone']` of a `models.ViT` or `models.ResNet`, float32.
    statistics: a ResNet's tree `batch_stats`. Without it the result has weights alone, which timm
      does not load strictly.

  Returns:
    timm name -> C-contiguous float32 array; a ResNet's `num_batches_tracked` are int64 zeros.
  """
  backbone = jax.tree.map(np.asarray, dict(backbone))
  variables = {PARAMS: backbone, STATISTICS: jax.tree.map(np.asarray, dict(statistics or {}))}
  return {
    entry.name: entry.to_timm(variables)
    for entry in names_of(backbone).entries(backbone)
    if variables[entry.path[0]]
  }


def timm_shapes(backbone: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The names and shapes of timm's state dict for parameters, or for their shapes alone."""
  variables = {PARAMS: backbone, STATISTICS: statistics_shapes(backbone)}
  return {entry.name: entry.shape(variables) for entry in names_of(backbone).entries(backbone)}


def statistics_shapes(backbone: Mapping[str, Any]) -> dict[str, Any]:
  """The tree `batch_stats`, as shapes, that parameters go with: {} for a backbone without BatchNorm."""
  return names_of(backbone).statistics(backbone)


def from_timm(
  state: Mapping[str, np.ndarray],
  template: Mapping[str, Any],
  *,
  grid: tuple[int, int] | None = None,
  state_grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """The parameters alone of `variables_from_timm`: a ViT has nothing else."""
  return variables_from_timm(state, template, grid=grid, state_grid=state_grid).params


def variables_from_timm(
  state: Mapping[str, np.ndarray],
  template: Mapping[str, Any],
  *,
  grid: tuple[int, int] | None = None,
  state_grid: tuple[int, int] | None = None,
) -> Variables:
  """Builds our parameters and statistics from timm's state dict: the inverse of `to_timm`.

  A ViT's position embedding is resampled (bicubic, antialiased, as timm does) where the number of
  patches differs. A classifier's entries and counts of batches are ignored; `ignored_names` lists
  them.

  Args:
    state: timm name -> array.
    template: our backbone's parameters or their shapes (`jax.eval_shape` of its init): what the
      result must look like.
    grid: a ViT's patches (down, across) in the model to be filled, `ViT.grid`; None for a ResNet.
    state_grid: the same of the model that was saved; by default `grid` where the count agrees, else
      a square.

  Returns:
    `Variables`.

  Raises:
    UserError: with every missing, unexpected and misshapen name.
  """
  names = names_of(template)
  ignored = {*ignored_names(state)}
  state = {
    name: np.asarray(value, np.float32) for name, value in state.items() if name not in ignored
  }
  state = names.prepared(state, grid, state_grid)
  entries = [entry for entry in names.entries(template) if not entry.counter]
  shapes = timm_shapes(template)
  check_fit(state, {entry.name: shapes[entry.name] for entry in entries}, names.shape_fields)
  variables = _tree({entry: entry.from_timm(state[entry.name]) for entry in entries})
  return Variables(variables[PARAMS], variables.get(STATISTICS, {}))


def ignored_names(state: Mapping[str, Any]) -> list[str]:
  """Names of a timm state dict that are left out: a classifier's, and counts of batches."""
  return sorted(name for name in state if name.startswith(_CLASSIFIERS) or name.endswith(_COUNTER))


def load_timm_file(
  path: str | os.PathLike[str], limit_bytes: int = LIMIT_BYTES
) -> dict[str, np.ndarray]:
  """Reads a timm state dict from a local `.safetensors` file, or an `.npz` with the same names.

  Args:
    path: the file.
    limit_bytes: a file with more of arrays is refused unread.

  Raises:
    UserError: when the file is absent, of another kind, damaged or too large.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise errors.UserError(f'{path}: no such file; give a .safetensors file with timm names')
  for ending, read in {'.safetensors': read_safetensors, '.npz': read_npz}.items():
    if path.endswith(ending):
      return read(path, limit_bytes)
  raise errors.UserError(
    f'{path}: expected a .safetensors file with timm names; convert torch files with'
    ' safetensors.torch.save_file(state_dict, path)'
  )


def timm_model(
  name: str = 'vit', *, image_size: int | tuple[int, int], **fields: Any
) -> dict[str, Any]:
  """Names the timm model that ours is: `timm.create_model(result['model'], **result['args'])`.

  Args:
    name: `model.name`, a key of `NAMES`.
    image_size: side in pixels, or (height, width).
    **fields: those of the model that `NAMES[name].fields` lists.

  Returns:
    `model`, a name that timm registers, and `args`, JSON-ready keyword arguments; `num_classes` is
    0, so that the model returns our `BackboneOutput.pooled`.
  """
  return NAMES[name].timm_model(image_size=image_size, **fields)


def names_of(backbone: Mapping[str, Any]) -> Names:
  """The table for a tree of parameters. Raises ValueError for one that is no backbone's."""
  for names in NAMES.values():
    if names.mark in backbone:
      return names
  raise ValueError(f'no backbone has parameters named {", ".join(backbone)}')


def _tree(arrays: Mapping[Entry, np.ndarray]) -> dict[str, Any]:
  """A nested dict by the entries' paths; layers, which come in order, stacked."""
  leaves: dict[tuple[str, ...], list[np.ndarray]] = {}
  for entry, array in arrays.items():
    leaves.setdefault(entry.path, []).append(array)
  stacked = {entry.path for entry in arrays if entry.layer is not None}
  tree: dict[str, Any] = {}
  for path, layers in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = np.stack(layers) if path in stacked else layers[0]
  return tree
