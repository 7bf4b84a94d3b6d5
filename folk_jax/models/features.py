"""One vector an image from what a backbone returns, by name: what probes, kNN and low-shot classifiers take.

Shape letters: N images, D width of a token, h, w positions of the feature map.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import numpy as jnp

from folk_jax import errors
from folk_jax.models.vit import BackboneOutput, ViT


@dataclasses.dataclass(frozen=True)
class Feature:
  """How a vector is made.

  Attributes:
    of: from a backbone's output to [N, some width].
    last_blocks: of how many of a ViT's last blocks it takes the class tokens; 0 where the output of the whole backbone
      is enough.
    patches: whether it reads patch tokens (a ResNet's feature map).
  """

  of: Callable[[BackboneOutput], jax.Array]
  last_blocks: int = 0
  patches: bool = False


def _mean_patch(output: BackboneOutput) -> jax.Array:
  return output.patches.astype(jnp.float32).mean(axis=(1, 2))


def _concat(output: BackboneOutput) -> jax.Array:
  return jnp.concatenate([output.pooled.astype(jnp.float32), _mean_patch(output)], axis=-1)


def _last(count: int) -> Feature:
  def of(output: BackboneOutput) -> jax.Array:
    if len(output.layers) < count:
      raise ValueError(
        f'the output holds blocks {sorted(output.layers)}, the last {count} are needed: '
        'pass encode_options(...) to models.encode'
      )
    last = sorted(output.layers)[-count:]
    return jnp.concatenate([output.layers[layer][0] for layer in last], axis=-1)

  return Feature(of, last_blocks=count)


FEATURES: dict[str, Feature] = {
  'pooled': Feature(lambda output: output.pooled),
  'mean_patch': Feature(_mean_patch, patches=True),
  'concat': Feature(_concat, patches=True),
  'last4': _last(4),
}


def feature(output: BackboneOutput, name: str) -> jax.Array:
  """One vector an image from what a backbone returns.

  Args:
    output: of a backbone, on N images; called with `encode_options(name, backbone)`.
    name: 'pooled' (a ViT's class token, a ResNet's average pool; DINO's and iBOT's kNN),
      'mean_patch' (the mean of the patch tokens; MFM's fine-tuning), 'concat' (both, in this order; DINO's and iBOT's
      linear probe of ViT-B) or 'last4' (the normalised class tokens of the last four blocks, the deepest last; their
      linear probe of ViT-S, arXiv 2104.14294, appendix).

  Returns:
    float32 [N, D], [N, 2D] for 'concat', [N, 4D] for 'last4'.

  Raises:
    UserError: for another name.
    ValueError: if the output lacks the blocks that the feature takes.
  """
  return _named(name).of(output).astype(jnp.float32)


def encode_options(names: str | Iterable[str], backbone: Any) -> dict[str, Any]:
  """What `models.encode` must be asked for so that `feature` can make these features of its output.

  Args:
    names: one name, or several that share a forward pass.
    backbone: from `make_backbone`.

  Returns:
    Keyword arguments of `models.encode`: `patches`, whether any of them reads patch tokens, and where one takes blocks,
    `layers` (their indices) and `normalise_layers`.

  Raises:
    UserError: for an unknown name, a backbone whose blocks have no class tokens (a ResNet), or one with too few blocks.
  """
  needed, patches = 0, False
  for name in [names] if isinstance(names, str) else names:
    count = _named(name).last_blocks
    patches |= _named(name).patches
    if not count:
      continue
    if not isinstance(backbone, ViT):
      whole = ', '.join(known for known, how in FEATURES.items() if not how.last_blocks)
      raise errors.UserError(
        f'feature {name!r} takes the class tokens of the last {count} blocks, and a {type(backbone).__name__} has no '
        f'class tokens: use {whole}.'
      )
    if backbone.depth < count:
      raise errors.UserError(
        f'feature {name!r} takes the last {count} blocks and config.model.depth is {backbone.depth}: '
        "use another feature, such as 'pooled'."
      )
    needed = max(needed, count)
  if not needed:
    return {'patches': patches}
  return {
    'patches': patches,
    'layers': tuple(range(backbone.depth - needed, backbone.depth)),
    'normalise_layers': True,
  }


def _named(name: str) -> Feature:
  if name not in FEATURES:
    raise errors.UserError(f'unknown feature {name!r}. Known: {", ".join(FEATURES)}.')
  return FEATURES[name]
