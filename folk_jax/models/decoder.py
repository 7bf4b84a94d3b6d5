"""The light decoder of masked image modelling: from the visible patches to all of them.

Shape letters: N images, T patches in row-major order, S visible ones, h and w patches a side, D
encoder's width, E decoder's width, L levels (one where there is one target), K values of a patch.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax import errors
from folk_jax.models import layers as layers_lib
from folk_jax.models.linear import Linear
from folk_jax.models.norm import LayerNorm

_LONGEST_PERIOD = 10_000.0


def sincos_position(grid: tuple[int, int], width: int) -> np.ndarray:
  """The fixed position embedding of MAE (arXiv 2111.06377, A.1; sines: 1706.03762, section 3.5).

  The first half of the channels encodes the column, the second the row; in each half the sines come
  first, then the cosines, of the place times 10000^(-4 i / width).

  Args:
    grid: (h, w).
    width: channels, a multiple of 4.

  Returns:
    float32 [h*w, width], in [-1, 1]; patches in row-major order.

  Raises:
    UserError: the width is no multiple of 4.
  """
  if width % 4 or width < 4:
    raise errors.UserError(
      f'sines and cosines of rows and columns in {width} channels: give a multiple of 4'
    )
  count = width // 4
  frequency_F = _LONGEST_PERIOD ** (-np.arange(count) / count)
  row_T, column_T = np.indices(grid).reshape(2, -1)
  angles = [place_T[:, None] * frequency_F for place_T in (column_T, row_T)]
  return np.concatenate([f(x) for x in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class MaskedDecoder(nn.Module):
  """MAE's decoder (arXiv 2111.06377, section 3), with a projection in and out for each level.

  The levels share the blocks and the norm; each has a linear layer in, a mask token and a linear
  head. With one level this is MAE's. Positions are fixed sines and cosines, none for the class
  token, which passes through the blocks and predicts nothing.

  Parameters: `embed_<l>`, `mask_token` [L, E], `blocks`, `norm`, `head_<l>`.

  Attributes:
    grid: (h, w).
    outputs: values to predict for a patch, one entry a level.
    width: channels of a token, a multiple of `heads` and of 4.
    depth: number of pre-norm blocks, at least 1.
    heads: attention heads.
    mlp_ratio: hidden width of the MLP over `width`.
    dtype: compute dtype, 'float32' or 'bfloat16'; the output is float32.
    remat: what the backward pass recomputes, a key of `layers.REMAT`.
    attention: as in `ViT`.
    scan_unroll: blocks per iteration of the scan over layers, at least 1.

  Raises:
    UserError: for widths and heads that do not fit, when the module is first bound.
  """

  grid: tuple[int, int]
  outputs: tuple[int, ...]
  width: int = 512
  depth: int = 8
  heads: int = 16
  mlp_ratio: float = 4.0
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'xla'
  scan_unroll: int = 1

  def check(self) -> None:
    """Raises UserError where the fields contradict each other."""
    if self.heads < 1 or self.width % self.heads or self.width % 4 or self.width < 4:
      raise errors.UserError(
        f'a decoder of width {self.width} with {self.heads} heads: the heads must divide the width,'
        ' and so must 4 (sines and cosines of rows and columns)'
      )
    if self.depth < 1:
      raise errors.UserError(f'a decoder of {self.depth} blocks: give at least 1')

  @nn.compact
  def __call__(
    self, encoded: tuple[tuple[jax.Array, jax.Array], ...], visible_NS: jax.Array
  ) -> tuple[jax.Array, ...]:
    """Predicts every patch from the visible ones.

    Args:
      encoded: for each level (pooled [N, D], patches [N, 1, S, D]), as `BackboneOutput` has them.
      visible_NS: the visible patches' numbers, as the encoder was given them.

    Returns:
      For each level float32 [N, T, K], patches in row-major order.
    """
    self.check()
    count, levels = self.grid[0] * self.grid[1], len(self.outputs)
    if len(encoded) != levels:
      raise ValueError(f'{len(encoded)} encoded levels for {levels} outputs')
    n, visible = visible_NS.shape
    dtype = jnp.dtype(self.dtype)
    mask_token_LE = self.param('mask_token', layers_lib.normal, (levels, self.width))
    position_TE = sincos_position(self.grid, self.width)

    tokens = []
    for level, (pooled_ND, patches_N1SD) in enumerate(encoded):
      chex.assert_shape(patches_N1SD, (n, 1, visible, None))
      tokens_NSD = jnp.concatenate([pooled_ND[:, None], patches_N1SD[:, 0]], axis=1)
      tokens_NSE = self._linear(self.width, f'embed_{level}')(tokens_NSD).astype(jnp.float32)
      patches_NTE = layers_lib.place(tokens_NSE[:, 1:], visible_NS, count, mask_token_LE[level])
      tokens.append(jnp.concatenate([tokens_NSE[:, :1], patches_NTE + position_TE], axis=1))

    # An image's levels lie next to each other: the batch axis stays on the devices it is on.
    tokens_MTE = jnp.stack(tokens, axis=1).reshape(n * levels, 1 + count, self.width)
    settings = layers_lib.BlockSettings(
      heads=self.heads,
      hidden=int(self.width * self.mlp_ratio),
      layer_scale=None,
      dtype=dtype,
      attention=self.attention,
    )
    blocks = layers_lib.scanned_blocks(
      settings, self.depth, collect=False, remat=self.remat, unroll=self.scan_unroll
    )
    tokens_MTE, _ = blocks(tokens_MTE, None)
    tokens_MTE = LayerNorm(name='norm')(tokens_MTE)[:, 1:]
    tokens_NLTE = tokens_MTE.reshape(n, levels, count, self.width)
    return tuple(
      self._linear(values, f'head_{level}')(tokens_NLTE[:, level]).astype(jnp.float32)
      for level, values in enumerate(self.outputs)
    )

  def _linear(self, features: int, name: str) -> Linear:
    return Linear(features, jnp.dtype(self.dtype), layers_lib.xavier, name=name)
