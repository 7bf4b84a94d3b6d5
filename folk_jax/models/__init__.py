"""Backbones and heads: the only room that knows Flax.

Every backbone maps normalised images [N, H, W, 3] to a `BackboneOutput` and is built by name
through `make_backbone`.
"""

import dataclasses
import difflib

import flax.linen as nn

from folk_jax import errors
from folk_jax.models.heads import ProjectionHead, ReconstructionHead
from folk_jax.models.vit import BackboneOutput, ViT, resample_position_embedding

__all__ = [
  'BACKBONES',
  'BackboneOutput',
  'ProjectionHead',
  'ReconstructionHead',
  'ViT',
  'make_backbone',
  'resample_position_embedding',
]

BACKBONES = {'vit': ViT}


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
