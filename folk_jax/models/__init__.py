"""Backbones and heads: the only room that knows Flax.

Every backbone maps normalised images [N, H, W, 3] to a `BackboneOutput` and is built by name
through `make_backbone`.
"""

import dataclasses
import difflib
from typing import Any

import flax.linen as nn
import jax

from folk_jax import errors
from folk_jax.models.decoder import MaskedDecoder, sincos_position
from folk_jax.models.heads import ProjectionHead, ReconstructionHead, compare
from folk_jax.models.layers import select
from folk_jax.models.resnet import ResNet
from folk_jax.models.vit import BackboneOutput, ViT, resample_position_embedding

__all__ = [
  'BACKBONES',
  'BackboneOutput',
  'MaskedDecoder',
  'ProjectionHead',
  'ReconstructionHead',
  'ResNet',
  'ViT',
  'compare',
  'encode',
  'make_backbone',
  'resample_position_embedding',
  'select',
  'sincos_position',
]

BACKBONES = {'vit': ViT, 'resnet': ResNet}


def make_backbone(name: str, image_size: int | tuple[int, int], **fields) -> nn.Module:
  """Builds a backbone by name.

  Args:
    name: a key of `BACKBONES`.
    image_size: side in pixels, or (height, width).
    **fields: the other fields of that backbone's module, e.g. width, depth, heads and patch for
      'vit'.

  Raises:
    UserError: for an unknown name or field, a missing field, or fields that contradict each other.
  """
  if name not in BACKBONES:
    raise errors.UserError(
      f'model.name is {name!r}: known models are {", ".join(sorted(BACKBONES))}'
    )
  backbone = BACKBONES[name]
  known = {
    f.name: f.default is dataclasses.MISSING
    for f in dataclasses.fields(backbone)
    if f.name not in ('parent', 'name', 'image_size')
  }
  for field in fields:
    if field not in known:
      near = difflib.get_close_matches(field, known, n=1)
      hint = f'did you mean {near[0]}?' if near else f'known fields are {", ".join(known)}'
      raise errors.UserError(f'model.{field} is not a field of {name!r}: {hint}')
  missing = [field for field, required in known.items() if required and field not in fields]
  if missing:
    raise errors.UserError(f'model {name!r} needs {", ".join(missing)}')
  module = backbone(image_size=image_size, **fields)
  module.check()
  return module


def encode(
  backbone: nn.Module,
  params: Any,
  statistics: Any,
  image_NHWC: jax.Array,
  sample_keys: jax.Array | None = None,
  *,
  train: bool = False,
  **options: Any,
) -> tuple[BackboneOutput, Any]:
  """Runs a backbone, with BatchNorm statistics or without.

  Args:
    backbone: from `make_backbone`.
    params: its parameters.
    statistics: BatchNorm's running statistics; {} for a backbone without any.
    image_NHWC: float [N, H, W, 3], normalised.
    sample_keys: typed keys [N] for drop path, or None for none.
    train: whether BatchNorm uses the batch's own statistics and moves the running ones.
    **options: further arguments of the backbone's call.

  Returns:
    The output, float32, and the statistics after the call: `statistics` itself unless they moved.
  """
  if not statistics:
    output = backbone.apply({'params': params}, image_NHWC, sample_keys=sample_keys, **options)
    return output, statistics
  variables = {'params': params, 'batch_stats': statistics}
  if not train:
    return backbone.apply(variables, image_NHWC, sample_keys=sample_keys, **options), statistics
  output, moved = backbone.apply(
    variables, image_NHWC, sample_keys=sample_keys, train=True, mutable=['batch_stats'], **options
  )
  return output, moved['batch_stats']
