"""Our ViT backbone in big_vision's layout."""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from folk_jax import errors
from folk_jax.interop.names import transposed
from folk_jax.interop.vit_names import depth


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
