"""timm's (and torchvision's) names of a ResNet, with BatchNorm's running statistics."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from folk_jax.interop.names import CONVOLUTION, PARAMS, SAME, STATISTICS, Entry, Names
from folk_jax.models import resnet

# Depths that timm registers with plain stems; the others are one of these with other `layers`.
TIMM_DEPTHS = (18, 26, 34, 50, 101, 152)
_TIMM_BASES = {resnet.BASIC: 18, resnet.BOTTLENECK: 50}

# timm's module -> our key, in timm's order; a block has those that its parameters have.
_BLOCK = {
  'conv1': 'conv1',
  'bn1': 'bn1',
  'conv2': 'conv2',
  'bn2': 'bn2',
  'conv3': 'conv3',
  'bn3': 'bn3',
  'downsample.0': 'downsample_conv',
  'downsample.1': 'downsample_bn',
}
# A parameter that tells the kind of module -> timm's leaf, our collection, our leaf, axes.
_LEAVES = {
  'kernel': (('weight', PARAMS, 'kernel', CONVOLUTION),),
  'scale': (
    ('weight', PARAMS, 'scale', SAME),
    ('bias', PARAMS, 'bias', SAME),
    ('running_mean', STATISTICS, 'mean', SAME),
    ('running_var', STATISTICS, 'var', SAME),
  ),
}
_COUNTER = 'num_batches_tracked'


def _entries(params: Mapping[str, Any]) -> Iterator[Entry]:
  for name in ('conv1', 'bn1'):
    yield from _module(params, name, (name,))
  stage_and_index = {key: re.findall(r'\d+', key) for key in params if key.startswith('layer')}
  for key, (stage, index) in sorted(
    stage_and_index.items(), key=lambda item: tuple(map(int, item[1]))
  ):
    for name, ours in _BLOCK.items():
      if ours in params[key]:
        yield from _module(params, f'layer{stage}.{index}.{name}', (key, ours))


def _module(params: Mapping[str, Any], name: str, path: tuple[str, ...]) -> Iterator[Entry]:
  module = params
  for key in path:
    module = module[key]
  for kind, leaves in _LEAVES.items():
    if kind in module:
      for leaf, collection, ours, axes in leaves:
        yield Entry(f'{name}.{leaf}', (collection, *path, ours), None, axes)
  if 'scale' in module:
    yield Entry(f'{name}.{_COUNTER}', (STATISTICS, *path), counter=True)


def _statistics(params: Mapping[str, Any]) -> dict[str, Any]:
  """A mean and a variance for each scale there is."""
  shapes = {}
  for key, node in params.items():
    if not isinstance(node, Mapping):
      continue
    if 'scale' in node:
      shape = jax.ShapeDtypeStruct(node['scale'].shape, np.float32)
      shapes[key] = {'mean': shape, 'var': shape}
    elif below := _statistics(node):
      shapes[key] = below
  return shapes


def _prepared(
  state: Mapping[str, np.ndarray], grid: tuple[int, int] | None, state_grid: tuple[int, int] | None
) -> dict[str, np.ndarray]:
  """The state as it is: nothing in a ResNet depends on the size of the image."""
  del grid, state_grid
  return dict(state)


def _timm_model(*, depth: int, width: int, image_size: int | tuple[int, int]) -> dict[str, Any]:
  del image_size  # Any that 32 divides.
  sides, layers = resnet.DEPTHS[depth]
  args: dict[str, Any] = {'num_classes': 0}
  if depth not in TIMM_DEPTHS:
    depth = _TIMM_BASES[sides]
    args['layers'] = list(layers)
  if width != 64:
    args['channels'] = [width * 2**stage for stage in range(len(layers))]
  return {'model': f'resnet{depth}', 'args': args}


def _positions(map_NDhw: np.ndarray) -> np.ndarray:
  n, channels = map_NDhw.shape[:2]
  return map_NDhw.reshape(n, channels, -1).transpose(0, 2, 1)


RESNET = Names(
  mark='conv1',
  classifier='fc.',
  fields=('depth', 'width'),
  shape_fields='model.depth and width',
  entries=_entries,
  statistics=_statistics,
  prepared=_prepared,
  timm_model=_timm_model,
  positions=_positions,
  layouts=('timm',),
)
