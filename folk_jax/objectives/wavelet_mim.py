"""Wavelet MIM, after WaMIM (arXiv 2503.00782, AAAI 2025): chosen encoder layers predict wavelet levels.

Patches are dropped as in MAE. What is predicted of them are their coefficients of a multi-level wavelet transform,
each level from a layer of its own: the deeper the layer, the coarser the level. The paper's code could not be had;
docs/fidelity.md lists what is our decision, marked [D] here.

Shape letters: N views, H, W pixels, C channels, h, w patches a side, T patches, K coefficients of a patch at a level.
"""

import dataclasses

import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.objectives.mae import MaskedModelling
from folk_jax.signal import wavelet

# Beside the variance of a level's coefficients: a flat image has none.
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class WaveletMim(MaskedModelling):
  """Wavelet MIM. Levels are listed finest first.

  Attributes:
    wavelet: a key of `signal.wavelet.WAVELETS`: 'haar' [D].
    layers: for each level the encoder layer, counted from 1, that predicts it; the last layer is one of them [D].
    level_weights: for each level its weight in the sum that is the loss; not normalised [D].
  """

  wavelet: str
  layers: tuple[int, ...]
  level_weights: tuple[float, ...]

  def __post_init__(self):
    levels, patch, depth = len(self.level_weights), self.parts.patch, self.parts.backbone.depth
    if len(self.layers) != levels or not levels:
      raise UserError(
        f'config.objective.layers {self.layers} and level_weights {self.level_weights} must have an entry a level.'
      )
    if patch % 2**levels:
      raise UserError(
        f'config.objective.level_weights has {levels} levels, each of which halves a patch: config.model.patch {patch} '
        f'must be a multiple of {2**levels}, or levels fewer.'
      )
    if any(not 1 <= layer <= depth for layer in self.layers):
      raise UserError(
        f'config.objective.layers {self.layers} must lie in 1 to config.model.depth, {depth}.'
      )
    if max(self.layers) < depth:
      raise UserError(
        f'config.objective.layers {self.layers} must name the last layer, {depth} (config.model.depth): nothing would '
        'train those after the deepest one named.'
      )
    if min(self.level_weights) < 0 or not any(self.level_weights):
      raise UserError(
        f'config.objective.level_weights {self.level_weights} must not be negative, and one must be positive.'
      )
    super().__post_init__()

  def _targets(self, image_NHWC: jax.Array) -> tuple[jax.Array, ...]:
    """The coefficients of each patch, standardised in each image.

    By the mean and deviation over the image of all details of a level (three bands, all channels); those of the
    approximation apart, whose coefficients are an order larger [D].
    """
    coefficients = wavelet.dwt(image_NHWC, self.wavelet, len(self.level_weights))
    standard = wavelet.Decomposition(
      _standardised(coefficients.approximation_BHWC),
      tuple(
        wavelet.Bands(*_standardised(jnp.stack(bands, axis=1)).swapaxes(0, 1))
        for bands in coefficients.details
      ),
    )
    return tuple(
      level_NhwK.reshape(len(image_NHWC), self._tokens, -1)
      for level_NhwK in wavelet.patch_coefficients(standard, self.parts.patch)
    )

  @property
  def _layers(self) -> tuple[int, ...]:
    return tuple(layer - 1 for layer in self.layers)

  @property
  def _weights(self) -> tuple[float, ...]:
    return self.level_weights


def _standardised(x: jax.Array) -> jax.Array:
  """Mean 0 and variance 1 over all but the first axis."""
  axes = tuple(range(1, x.ndim))
  centred = x - jnp.mean(x, axis=axes, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + _EPSILON)
