"""Our ViT backbone in big_vision's layout, and back.

Shape letters: D width, H heads, E channels of a head; 3 for queries, keys and values.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from folk_jax import errors
from folk_jax.interop.names import at, check_fit, transposed
from folk_jax.interop.vit_names import VIT, depth


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
  for layer in range(depth(backbone)):
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
  return {'/'.join(key.key for key in path): transposed(leaf) for path, leaf in leaves}


# big_vision's names and ours where only the name differs; attention's arrays have other shapes too.
_OUTER = {
  'embedding/kernel': ('patch_embed', 'kernel'),
  'embedding/bias': ('patch_embed', 'bias'),
  'Transformer/encoder_norm/scale': ('norm', 'scale'),
  'Transformer/encoder_norm/bias': ('norm', 'bias'),
}
_BLOCK = {
  'LayerNorm_0/scale': ('norm1', 'scale'),
  'LayerNorm_0/bias': ('norm1', 'bias'),
  'LayerNorm_1/scale': ('norm2', 'scale'),
  'LayerNorm_1/bias': ('norm2', 'bias'),
  'MlpBlock_0/Dense_0/kernel': ('mlp', 'fc1', 'kernel'),
  'MlpBlock_0/Dense_0/bias': ('mlp', 'fc1', 'bias'),
  'MlpBlock_0/Dense_1/kernel': ('mlp', 'fc2', 'kernel'),
  'MlpBlock_0/Dense_1/bias': ('mlp', 'fc2', 'bias'),
}
_ATTENTION = 'MultiHeadDotProductAttention_0'
_PREFIX, _CLASS, _POSITION = 'params/', 'cls', 'pos_embedding'
# The original repository (vision_transformer, AugReg's files) has other names for the same arrays, and gives the class
# token a position of its own.
_OLD_POSITION = 'Transformer/posembed_input/pos_embedding'
_OLD_NAMES = {
  '/LayerNorm_2/': '/LayerNorm_1/',
  '/MultiHeadDotProductAttention_1/': f'/{_ATTENTION}/',
  '/MlpBlock_3/': '/MlpBlock_0/',
}


def is_big_vision(state: Mapping[str, Any]) -> bool:
  """Whether arrays have a ViT's names in big_vision or in the repository before it, with `params/` or without."""
  return any(
    name.removeprefix(_PREFIX).startswith(('embedding/', 'Transformer/')) for name in state
  )


def from_big_vision(
  state: Mapping[str, np.ndarray], template: Mapping[str, Any], *, heads: int | None = None
) -> dict[str, Any]:
  """Our ViT's parameters from big_vision's: the inverse of `to_big_vision`, but for where the class token's position
  is kept, which no output shows.

  Positions stay as many as the file has. A classifier's arrays are ignored, and so is what else a training checkpoint
  holds beside `params/`. Files of the repository before big_vision (AugReg's) are read too.

  Args:
    state: name -> array, with `params/` before every name or without.
    template: our backbone's parameters or their shapes.
    heads: of the model to be filled; None takes the file's, which the parameters' shapes don't check.

  Returns:
    The tree `params['backbone']`, float32.

  Raises:
    UserError: a model without this layout; or with every missing, unexpected and misshapen name, as the file has
      them.
  """
  if VIT.mark not in template or 'ls1' in template['blocks']:
    raise errors.UserError(
      "these are a ViT's weights in big_vision's layout, and the model is "
      f'{"a ViT with LayerScale" if VIT.mark in template else "no ViT"}; check model.name and model.layer_scale'
    )
  prefix = _PREFIX if any(name.startswith(_PREFIX) for name in state) else ''
  state = {
    name.removeprefix(prefix): np.asarray(value, np.float32)
    for name, value in state.items()
    if name.startswith(prefix) and not name.startswith(f'{prefix}head/')
  }
  state = _renamed(state)
  if heads is None:
    query = state.get(f'Transformer/encoderblock_0/{_ATTENTION}/query/kernel')
    heads = query.shape[1] if query is not None and query.ndim == 3 else 1
  check_fit(
    {prefix + name: array for name, array in state.items()},
    {prefix + name: shape for name, shape in _shapes(template, heads, state).items()},
    'model.width, depth, heads, patch and mlp_ratio',
    kind='big_vision',
  )
  tree: dict[str, Any] = {'cls_token': state[_CLASS]}
  # Its position is in the class token already.
  tree['pos_embed'] = np.pad(state[_POSITION], ((0, 0), (1, 0), (0, 0)))
  for name, path in _OUTER.items():
    _set(tree, path, state[name])
  layers = [f'Transformer/encoderblock_{layer}/' for layer in range(depth(template))]
  for name, path in _BLOCK.items():
    _set(tree, ('blocks', *path), np.stack([state[layer + name] for layer in layers]))
  packed = [_packed(state, f'{layer}{_ATTENTION}/') for layer in layers]
  tree['blocks']['attn'] = jax.tree.map(lambda *arrays: np.stack(arrays), *packed)
  return tree


def _renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The state in big_vision's names, whichever of the two repositories it is of."""
  position = state.get(_OLD_POSITION)
  if position is None or position.ndim != 3 or _CLASS not in state:
    return dict(state)
  if state[_CLASS].shape != (1, 1, position.shape[2]):
    return dict(state)  # For the report.
  renamed = {}
  for name, array in state.items():
    for old, new in _OLD_NAMES.items():
      name = name.replace(old, new)
    renamed[name] = array
  del renamed[_OLD_POSITION]
  return renamed | {_CLASS: state[_CLASS] + position[:, :1], _POSITION: position[:, 1:]}


def _shapes(
  template: Mapping[str, Any], heads: int, state: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
  """What the file must hold; positions may be of any square grid, since they are resampled."""
  _, tokens, width = template['pos_embed'].shape
  found = state[_POSITION].shape if _POSITION in state else ()
  square = len(found) == 3 and math.isqrt(found[1]) ** 2 == found[1] > 0
  patches = found[1] if square else tokens - 1
  shapes = {_CLASS: (1, 1, width), _POSITION: (1, patches, width)}
  shapes |= {name: tuple(at(template, path).shape) for name, path in _OUTER.items()}
  head = (heads, width // heads)
  for layer in range(depth(template)):
    block = f'Transformer/encoderblock_{layer}/'
    for name, path in _BLOCK.items():
      shapes[block + name] = tuple(at(template['blocks'], path).shape[1:])
    for name in ('query', 'key', 'value'):
      shapes[f'{block}{_ATTENTION}/{name}/kernel'] = (width, *head)
      shapes[f'{block}{_ATTENTION}/{name}/bias'] = head
    shapes[f'{block}{_ATTENTION}/out/kernel'] = (*head, width)
    shapes[f'{block}{_ATTENTION}/out/bias'] = (width,)
  return shapes


def _packed(state: Mapping[str, np.ndarray], attention: str) -> dict[str, Any]:
  """One layer's attention, as we pack it: queries, keys and values side by side, a head after the other."""
  kernels_D3HE, biases_3HE = (
    np.stack([state[f'{attention}{name}/{what}'] for name in ('query', 'key', 'value')], axis)
    for what, axis in (('kernel', 1), ('bias', 0))
  )
  width = len(kernels_D3HE)
  return {
    'qkv': {'kernel': kernels_D3HE.reshape(width, -1), 'bias': biases_3HE.reshape(-1)},
    'proj': {
      'kernel': state[f'{attention}out/kernel'].reshape(-1, width),
      'bias': state[f'{attention}out/bias'],
    },
  }


def _set(tree: dict[str, Any], path: tuple[str, ...], array: np.ndarray) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = array
