"""Our ViT backbone in timm's names and torch's layouts and back, and in big_vision's layout.

Both directions read one table of names and transposes. timm keeps linear weights as (out, in) and
convolutions as (out, in, row, column), and one set of names per block; we keep (in, out), (row,
column, in, out), and blocks stacked along a leading layer axis.
"""

import math
import operator
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from folk_jax import errors, models

# width, depth, heads of the sizes that timm names.
VIT_SIZES = {'ti': (192, 12, 3), 's': (384, 12, 6), 'b': (768, 12, 12), 'l': (1024, 24, 16)}
TIMM_SIZE_NAMES = {'ti': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}
# The plain ViTs that timm 1.0 registers for 224 pixels; any other is built from the base model with
# arguments.
TIMM_PATCHES = {'ti': (16,), 's': (8, 16, 32), 'b': (8, 16, 32), 'l': (14, 16, 32)}
TIMM_BASE = 'vit_base_patch16_224'

# Axes that turn our array into timm's.
_SAME = None
_LINEAR = (1, 0)
_CONVOLUTION = (3, 2, 0, 1)

_OUTER = (
  ('cls_token', ('cls_token',), _SAME),
  ('pos_embed', ('pos_embed',), _SAME),
  ('patch_embed.proj.weight', ('patch_embed', 'kernel'), _CONVOLUTION),
  ('patch_embed.proj.bias', ('patch_embed', 'bias'), _SAME),
  ('norm.weight', ('norm', 'scale'), _SAME),
  ('norm.bias', ('norm', 'bias'), _SAME),
)
_BLOCK = (
  ('norm1.weight', ('norm1', 'scale'), _SAME),
  ('norm1.bias', ('norm1', 'bias'), _SAME),
  ('attn.qkv.weight', ('attn', 'qkv', 'kernel'), _LINEAR),
  ('attn.qkv.bias', ('attn', 'qkv', 'bias'), _SAME),
  ('attn.proj.weight', ('attn', 'proj', 'kernel'), _LINEAR),
  ('attn.proj.bias', ('attn', 'proj', 'bias'), _SAME),
  ('ls1.gamma', ('ls1', 'gamma'), _SAME),
  ('norm2.weight', ('norm2', 'scale'), _SAME),
  ('norm2.bias', ('norm2', 'bias'), _SAME),
  ('mlp.fc1.weight', ('mlp', 'fc1', 'kernel'), _LINEAR),
  ('mlp.fc1.bias', ('mlp', 'fc1', 'bias'), _SAME),
  ('mlp.fc2.weight', ('mlp', 'fc2', 'kernel'), _LINEAR),
  ('mlp.fc2.bias', ('mlp', 'fc2', 'bias'), _SAME),
  ('ls2.gamma', ('ls2', 'gamma'), _SAME),
)
_IGNORED = 'head.'
_NAMES_SHOWN = 4


def to_timm(backbone: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Renames and transposes our ViT's parameters to timm's `VisionTransformer.state_dict()`.

  Args:
    backbone: the tree `params['backbone']` of a `models.ViT`, float32.

  Returns:
    timm name -> C-contiguous float32 array.
  """
  backbone = jax.tree.map(np.asarray, dict(backbone))
  state = {}
  for name, path, layer, axes in _entries(backbone):
    leaf = _at(backbone, path)
    state[name] = _transposed(leaf if layer is None else leaf[layer], axes)
  return state


def timm_shapes(backbone: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The names and shapes that `to_timm` gives for parameters, or for their shapes alone."""
  return {
    name: _permuted(_at(backbone, path).shape[layer is not None :], axes)
    for name, path, layer, axes in _entries(backbone)
  }


def from_timm(
  state: Mapping[str, np.ndarray],
  template: Mapping[str, Any],
  *,
  grid: tuple[int, int],
  state_grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """Builds our ViT's parameters from timm's state dict: the inverse of `to_timm`.

  The position embedding is resampled (bicubic, antialiased, as timm does) where the number of
  patches differs. Entries of a classifier (`head.*`) are ignored; `ignored_names` lists them.

  Args:
    state: timm name -> array.
    template: our backbone's parameters or their shapes (`jax.eval_shape` of its init): what the
      result must look like.
    grid: patches (down, across) of the model to be filled, `ViT.grid`.
    state_grid: the same of the model that was saved; by default `grid` where the count agrees, else
      a square.

  Returns:
    The tree of float32 numpy arrays.

  Raises:
    UserError: with every missing, unexpected and misshapen name.
  """
  wanted = timm_shapes(template)
  state = {
    name: np.asarray(value, np.float32)
    for name, value in state.items()
    if not name.startswith(_IGNORED)
  }
  if 'pos_embed' in state:
    state['pos_embed'] = _resampled(state['pos_embed'], grid, state_grid)
  _check_fit(state, wanted)

  leaves: dict[tuple[str, ...], Any] = {}
  for name, path, layer, axes in _entries(template):
    leaf = _transposed(state[name], None if axes is None else np.argsort(axes))
    if layer is None:
      leaves[path] = leaf
    else:
      leaves.setdefault(path, []).append(leaf)
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = np.stack(leaf) if isinstance(leaf, list) else leaf
  return tree


def ignored_names(state: Mapping[str, Any]) -> list[str]:
  """Names of a timm state dict that `from_timm` leaves out: a classifier's."""
  return sorted(name for name in state if name.startswith(_IGNORED))


def load_timm_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads a timm state dict from a local `.safetensors` file, or an `.npz` with the same names.

  Raises:
    UserError: when the file is absent, of another kind or damaged.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise errors.UserError(f'{path}: no such file; give a .safetensors file with timm names')
  try:
    if path.endswith('.safetensors'):
      return safetensors.numpy.load_file(path)
    if path.endswith('.npz'):
      with np.load(path) as archive:
        return dict(archive)
  except (safetensors.SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
    raise errors.UserError(f'{path}: damaged or not what its ending says ({error})') from error
  raise errors.UserError(
    f'{path}: expected a .safetensors file with timm names; convert torch files with'
    ' safetensors.torch.save_file(state_dict, path)'
  )


def to_big_vision(backbone: Mapping[str, Any], *, heads: int) -> dict[str, np.ndarray]:
  """Renames our ViT's parameters to the `.npz` layout of big_vision's `models/vit.py` with
  pool_type='tok'.

  big_vision adds positions before it prepends the class token, so the class token's position is
  folded into `cls`. Its GELU is the tanh approximation and ours is exact, so features differ by
  about 1e-3 there; timm reads the same file into a model with `no_embed_class=True`, with equal
  features.

  Args:
    backbone: the tree `params['backbone']` of a `models.ViT` without LayerScale.
    heads: attention heads; big_vision keeps them on an axis of their own.

  Returns:
    'params/...' name -> float32 array.

  Raises:
    UserError: for a model with LayerScale, which big_vision has not.
  """
  blocks = jax.tree.map(np.asarray, dict(backbone['blocks']))
  if 'ls1' in blocks:
    raise errors.UserError(
      'big_vision has no LayerScale and model.layer_scale is set: export with --format=timm instead'
    )
  position_1TD = np.asarray(backbone['pos_embed'])
  width = position_1TD.shape[-1]
  tree = {
    'embedding': backbone['patch_embed'],
    'cls': np.asarray(backbone['cls_token']) + position_1TD[:, :1],
    'pos_embedding': position_1TD[:, 1:],
    'Transformer': {'encoder_norm': backbone['norm']},
  }
  for layer in range(_depth(backbone)):
    block = jax.tree.map(operator.itemgetter(layer), blocks)
    qkv = block['attn']['qkv']
    kernel_D3HE = qkv['kernel'].reshape(width, 3, heads, width // heads)
    bias_3HE = qkv['bias'].reshape(3, heads, width // heads)
    attention = {
      name: {'kernel': kernel_D3HE[:, i], 'bias': bias_3HE[i]}
      for i, name in enumerate(('query', 'key', 'value'))
    }
    attention['out'] = {
      'kernel': block['attn']['proj']['kernel'].reshape(heads, width // heads, width),
      'bias': block['attn']['proj']['bias'],
    }
    tree['Transformer'][f'encoderblock_{layer}'] = {
      'LayerNorm_0': block['norm1'],
      'MultiHeadDotProductAttention_0': attention,
      'LayerNorm_1': block['norm2'],
      'MlpBlock_0': {'Dense_0': block['mlp']['fc1'], 'Dense_1': block['mlp']['fc2']},
    }
  leaves, _ = jax.tree_util.tree_flatten_with_path({'params': tree})
  return {'/'.join(key.key for key in path): _transposed(leaf, _SAME) for path, leaf in leaves}


def timm_model(
  *,
  width: int,
  depth: int,
  heads: int,
  patch: int,
  image_size: int | tuple[int, int],
  mlp_ratio: float = 4.0,
  layer_scale: float | None = None,
) -> dict[str, Any]:
  """Names the timm model that our ViT is: `timm.create_model(result['model'], **result['args'])`.

  Returns:
    `model`, a name that timm registers, and `args`, JSON-ready keyword arguments; `num_classes` is
    0, so that the model returns the class token after the final norm, our `BackboneOutput.pooled`.
  """
  size = next((key for key, value in VIT_SIZES.items() if value == (width, depth, heads)), None)
  args: dict[str, Any] = {'num_classes': 0}
  if size is not None and patch in TIMM_PATCHES[size]:
    model = f'vit_{TIMM_SIZE_NAMES[size]}_patch{patch}_224'
  else:
    model = TIMM_BASE
    args |= {'patch_size': patch, 'embed_dim': width, 'depth': depth, 'num_heads': heads}
  if image_size != 224:
    args['img_size'] = image_size if isinstance(image_size, int) else list(image_size)
  if mlp_ratio != 4.0:
    args['mlp_ratio'] = mlp_ratio
  if layer_scale is not None:
    args['init_values'] = layer_scale
  return {'model': model, 'args': args}


def _entries(backbone: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], int | None, Any]]:
  """Yields (timm name, our path, layer or None, axes) for every parameter, layers in order."""
  for name, path, axes in _OUTER:
    yield name, path, None, axes
  blocks = backbone['blocks']
  for layer in range(_depth(backbone)):
    for name, path, axes in _BLOCK:
      if path[0] in blocks:
        yield f'blocks.{layer}.{name}', ('blocks', *path), layer, axes


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _depth(backbone: Mapping[str, Any]) -> int:
  return backbone['blocks']['norm1']['scale'].shape[0]


def _permuted(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
  return tuple(shape) if axes is None else tuple(shape[axis] for axis in axes)


def _transposed(array: Any, axes: Any) -> np.ndarray:
  array = np.asarray(array, np.float32)
  return np.ascontiguousarray(array if axes is None else array.transpose(axes))


def _resampled(
  position: np.ndarray, grid: tuple[int, int], state_grid: tuple[int, int] | None
) -> np.ndarray:
  """The saved position embedding on `grid`; as it is, for the report, where it makes no sense."""
  if position.ndim != 3:
    return position
  patches = position.shape[1] - 1
  if state_grid is None:
    side = math.isqrt(max(patches, 0))
    state_grid = grid if patches == math.prod(grid) else (side, side)
  if patches < 1 or math.prod(state_grid) != patches:
    return position
  return np.asarray(models.resample_position_embedding(position, state_grid, grid))


def _check_fit(state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> None:
  missing = [name for name in wanted if name not in state]
  unexpected = [name for name in state if name not in wanted]
  misshapen = [
    f'{name} (file {list(state[name].shape)}, model {list(shape)})'
    for name, shape in wanted.items()
    if name in state and state[name].shape != tuple(shape)
  ]
  faults = {
    'missing from the file': missing,
    'unknown to the model': unexpected,
    'of another shape': misshapen,
  }
  if any(faults.values()):
    report = '; '.join(
      f'{len(names)} {fault}: {_some(names)}' for fault, names in faults.items() if names
    )
    raise errors.UserError(
      f'these timm weights do not fit the model: {report}; check model.width, depth, patch,'
      ' mlp_ratio and layer_scale'
    )


def _some(names: list[str]) -> str:
  shown = ', '.join(names[:_NAMES_SHOWN])
  return shown if len(names) <= _NAMES_SHOWN else f'{shown} and {len(names) - _NAMES_SHOWN} more'
