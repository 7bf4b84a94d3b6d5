"""timm's names of a Vision Transformer: one set for each block, where ours are stacked."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from folk_jax import models
from folk_jax.interop.names import CONVOLUTION, LINEAR, PARAMS, SAME, Entry, Names

# width, depth, heads of the sizes that timm names.
VIT_SIZES = {'ti': (192, 12, 3), 's': (384, 12, 6), 'b': (768, 12, 12), 'l': (1024, 24, 16)}
TIMM_SIZE_NAMES = {'ti': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}
# The plain ViTs that timm 1.0 registers for 224 pixels; any other is built from the base model with
# arguments.
TIMM_PATCHES = {'ti': (16,), 's': (8, 16, 32), 'b': (8, 16, 32), 'l': (14, 16, 32)}
TIMM_BASE = 'vit_base_patch16_224'

_OUTER = (
  ('cls_token', ('cls_token',), SAME),
  ('pos_embed', ('pos_embed',), SAME),
  ('patch_embed.proj.weight', ('patch_embed', 'kernel'), CONVOLUTION),
  ('patch_embed.proj.bias', ('patch_embed', 'bias'), SAME),
  ('norm.weight', ('norm', 'scale'), SAME),
  ('norm.bias', ('norm', 'bias'), SAME),
)
_BLOCK = (
  ('norm1.weight', ('norm1', 'scale'), SAME),
  ('norm1.bias', ('norm1', 'bias'), SAME),
  ('attn.qkv.weight', ('attn', 'qkv', 'kernel'), LINEAR),
  ('attn.qkv.bias', ('attn', 'qkv', 'bias'), SAME),
  ('attn.proj.weight', ('attn', 'proj', 'kernel'), LINEAR),
  ('attn.proj.bias', ('attn', 'proj', 'bias'), SAME),
  ('ls1.gamma', ('ls1', 'gamma'), SAME),
  ('norm2.weight', ('norm2', 'scale'), SAME),
  ('norm2.bias', ('norm2', 'bias'), SAME),
  ('mlp.fc1.weight', ('mlp', 'fc1', 'kernel'), LINEAR),
  ('mlp.fc1.bias', ('mlp', 'fc1', 'bias'), SAME),
  ('mlp.fc2.weight', ('mlp', 'fc2', 'kernel'), LINEAR),
  ('mlp.fc2.bias', ('mlp', 'fc2', 'bias'), SAME),
  ('ls2.gamma', ('ls2', 'gamma'), SAME),
)


def depth(params: Mapping[str, Any]) -> int:
  """The number of blocks."""
  return params['blocks']['norm1']['scale'].shape[0]


def _entries(params: Mapping[str, Any]) -> Iterator[Entry]:
  for name, path, axes in _OUTER:
    yield Entry(name, (PARAMS, *path), None, axes)
  for layer in range(depth(params)):
    for name, path, axes in _BLOCK:
      if path[0] in params['blocks']:
        yield Entry(f'blocks.{layer}.{name}', (PARAMS, 'blocks', *path), layer, axes)


def _prepared(
  state: Mapping[str, np.ndarray], grid: tuple[int, int] | None, state_grid: tuple[int, int] | None
) -> dict[str, np.ndarray]:
  """The state with its position embedding on `grid`; as it is, for the report, where it makes no sense."""
  if grid is None:
    raise ValueError('a ViT needs the grid of the model to be filled')
  position = state.get('pos_embed')
  if position is None or position.ndim != 3 or position.shape[0] != 1 or not position.shape[2]:
    return dict(state)
  patches = position.shape[1] - 1
  if state_grid is None:
    side = math.isqrt(max(patches, 0))
    state_grid = grid if patches == math.prod(grid) else (side, side)
  if patches < 1 or math.prod(state_grid) != patches:
    return dict(state)
  position = np.asarray(models.resample_position_embedding(position, state_grid, grid))
  return dict(state) | {'pos_embed': position}


def _timm_model(
  *,
  width: int,
  depth: int,
  heads: int,
  patch: int,
  image_size: int | tuple[int, int],
  mlp_ratio: float = 4.0,
  layer_scale: float | None = None,
) -> dict[str, Any]:
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
  if layer_scale:
    args['init_values'] = layer_scale
  return {'model': model, 'args': args}


VIT = Names(
  mark='pos_embed',
  classifier='head.',
  fields=('width', 'depth', 'heads', 'patch', 'mlp_ratio', 'layer_scale'),
  shape_fields='model.width, depth, patch, mlp_ratio and layer_scale',
  entries=_entries,
  statistics=lambda params: {},
  prepared=_prepared,
  timm_model=_timm_model,
  positions=lambda tokens_NTD: tokens_NTD[:, 1:],  # The class token comes first.
  layouts=('timm', 'npz'),
)
