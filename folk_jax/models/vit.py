"""Vision Transformer in timm's conventions (arXiv 2010.11929; timm's `VisionTransformer`).

Class token first, learned position embedding that includes the class token, pre-norm blocks,
exact-erf GELU, LayerNorm epsilon 1e-6, packed q, k, v with biases. Blocks are stacked along a
leading layer axis and scanned.

Shape letters: N images, H and W pixels, C channels, P patch, h and w patches a side, T tokens (1 +
h*w), S visible patches, D width, L layers.
"""

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from folk_jax import errors
from folk_jax.models import fused_attention
from folk_jax.models import layers as layers_lib
from folk_jax.models.linear import cast
from folk_jax.models.norm import LayerNorm

DTYPES = ('float32', 'bfloat16')


@flax.struct.dataclass
class BackboneOutput:
  """What a backbone returns, all float32.

  Attributes:
    pooled: [N, D]; ViT: class token after the final norm; ResNet: average over positions.
    patches: [N, h, w, D]; ViT: patch tokens after the final norm; ResNet: last feature map. None where the call said
      that they aren't read.
    layers: block index -> (pooled [N, D], patches [N, h, w, D]) for the blocks that were asked for,
      before the final norm unless `normalise_layers` was set.

  Where a ViT was given `visible_NS`, all patches are [N, 1, S, D], in the order of that argument.
  """

  pooled: jax.Array
  patches: jax.Array | None
  layers: dict[int, tuple[jax.Array, jax.Array]]


def resample_position_embedding(
  position_1TD: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> jax.Array:
  """Resamples a position embedding to another grid of patches, as timm's `resample_abs_pos_embed`.

  Bicubic with antialiasing (which `jax.image.resize` shares with torch only when antialiasing is
  on); the class token's entry, which comes first, is kept as it is.

  Args:
    position_1TD: float [1, 1 + h*w, D], patches in row-major order.
    old_grid: (h, w) of the embedding.
    new_grid: (h', w') wanted.

  Returns:
    [1, 1 + h'*w', D], the same dtype.
  """
  chex.assert_shape(position_1TD, (1, 1 + old_grid[0] * old_grid[1], None))
  if tuple(old_grid) == tuple(new_grid):
    return position_1TD
  width = position_1TD.shape[-1]
  grid_1hwD = position_1TD[:, 1:].reshape(1, *old_grid, width)
  grid_1hwD = jax.image.resize(grid_1hwD, (1, *new_grid, width), 'bicubic', antialias=True)
  return jnp.concatenate([position_1TD[:, :1], grid_1hwD.reshape(1, -1, width)], axis=1)


def to_patches(image_NHWC: jax.Array, patch: int) -> jax.Array:
  """Cuts images: [N, H, W, C] -> [N, h, w, P*P*C], inside a patch (row, column, channel)."""
  n, height, width, channels = image_NHWC.shape
  h, w = height // patch, width // patch
  cut = image_NHWC.reshape(n, h, patch, w, patch, channels).transpose(0, 1, 3, 2, 4, 5)
  return cut.reshape(n, h, w, patch * patch * channels)


class PatchEmbedding(nn.Module):
  """Convolution by its own size as one matrix product; kernel [P, P, C, D], bias [D]."""

  width: int
  patch: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, image_NHWC: jax.Array) -> jax.Array:
    shape = (self.patch, self.patch, image_NHWC.shape[-1], self.width)
    # timm and DINO leave this convolution at torch's default; at patch 4 a deviation of 0.02 would
    # be four times less.
    kernel = self.param('kernel', layers_lib.torch_uniform, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    patches_NhwK = to_patches(image_NHWC.astype(self.dtype), self.patch)
    kernel = cast(kernel, self.dtype).reshape(-1, self.width)
    return patches_NhwK @ kernel + bias.astype(self.dtype)


class ViT(nn.Module):
  """Vision Transformer backbone.

  Attributes:
    width: channels of a token; a multiple of `heads`.
    depth: number of blocks.
    heads: attention heads.
    patch: side of a square patch in pixels.
    image_size: side in pixels, or (height, width), for which the position embedding is built; a
      multiple of `patch`. Images of another size are accepted: the embedding is then resampled on
      the fly.
    mlp_ratio: hidden width of the MLP over `width`.
    drop_path: drop probability of the last block's branches (linear from 0 at the first); acts
      where keys are given.
    layer_scale: initial gain of LayerScale, or None for none.
    dtype: compute dtype, 'float32' or 'bfloat16'. Parameters, residual stream, norms, softmax and
      outputs stay float32.
    remat: what the backward pass recomputes: 'none', 'elementwise' (all but the products with
      weights and attention's result: norms, GELU, scores) or 'block' (all but each block's input).
    attention: 'xla'; 'cudnn' for the fused kernel of NVIDIA GPUs (in bfloat16); or 'pallas' for
      ours of TPUs (heads of 64 or 128 channels). Elsewhere both are 'xla'.
    scan_unroll: blocks per iteration of the scan over layers, at least 1; `depth` leaves no loop.

  Raises:
    UserError: for sizes that do not divide and unknown options, when the module is first bound.
  """

  width: int
  depth: int
  heads: int
  patch: int
  image_size: int | tuple[int, int]
  mlp_ratio: float = 4.0
  drop_path: float = 0.0
  layer_scale: float | None = None
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'xla'
  scan_unroll: int = 1

  @property
  def stride(self) -> int:
    """Pixels a side of a position of the feature map."""
    return self.patch

  @property
  def features(self) -> int:
    """Channels of a token."""
    return self.width

  @property
  def grid(self) -> tuple[int, int]:
    """Patches (down, across) of an image of `image_size`."""
    size = self.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // self.patch, width // self.patch

  def check(self) -> None:
    """Raises UserError where the fields contradict each other."""
    size = self.image_size
    for side in (size,) if isinstance(size, int) else size:
      _check_divides(side, self.patch)
    if self.width % self.heads:
      raise errors.UserError(
        f'model.width is {self.width} and model.heads is {self.heads}:'
        ' the heads must divide the width'
      )
    if self.attention == 'pallas' and not fused_attention.fits(self.width, self.heads):
      raise errors.UserError(
        f"model.attention 'pallas' takes heads of {' or '.join(map(str, fused_attention.WIDTHS))} channels and a width "
        f'that is a multiple of 128; model.width {self.width} with {self.heads} heads is neither: use '
        "'xla'"
      )
    if self.scan_unroll < 1:
      raise errors.UserError(
        f'model.scan_unroll is {self.scan_unroll}: it must be 0 (chosen by device) or a number of blocks'
      )
    if not 0.0 <= self.drop_path < 1.0:
      raise errors.UserError(f'model.drop_path is {self.drop_path}: it must lie in [0, 1)')
    for field, known in (
      ('dtype', DTYPES),
      ('remat', tuple(layers_lib.REMAT)),
      ('attention', tuple(layers_lib.ATTENTION)),
    ):
      if getattr(self, field) not in known:
        raise errors.UserError(
          f'model.{field} is {getattr(self, field)!r}: expected one of {", ".join(known)}'
        )

  @nn.compact
  def __call__(
    self,
    image_NHWC: jax.Array,
    sample_keys: jax.Array | None = None,
    train: bool = False,
    layers: tuple[int, ...] = (),
    normalise_layers: bool = False,
    mask_Nhw: jax.Array | None = None,
    mask_token_D: jax.Array | None = None,
    visible_NS: jax.Array | None = None,
    patches: bool = True,
  ) -> BackboneOutput:
    """Encodes normalised images.

    Args:
      image_NHWC: float [N, H, W, 3], normalised by the data's mean and deviation.
      sample_keys: typed key array [N] for drop path, or None for the deterministic forward pass.
      train: ignored; nothing here differs in training but drop path, which the keys switch on.
      layers: indices in [0, depth) of the blocks whose outputs are returned as well.
      normalise_layers: whether the final norm is applied to those outputs (as DINO's linear
        evaluation does).
      mask_Nhw: bool, the patches whose embeddings are replaced by `mask_token_D` before positions
        are added (iBOT, arXiv 2111.07832, section 3.1); both or neither.
      mask_token_D: float.
      visible_NS: integers in [0, h*w), row-major: the patches that alone enter the blocks, with the
        positions they have in the image (MAE, arXiv 2111.06377, section 3); None for all.
      patches: whether patch tokens are returned. Without them the last block computes the class token alone: the same
        value to rounding, for 7 % less work in a ViT of 12 blocks.

    Returns:
      BackboneOutput, float32.

    Raises:
      UserError: when the patch does not divide the image.
      ValueError: for a block index outside [0, depth).
    """
    self.check()
    chex.assert_rank(image_NHWC, 4)
    for side in image_NHWC.shape[1:3]:
      _check_divides(side, self.patch)
    if any(not 0 <= layer < self.depth for layer in layers):
      raise ValueError(f'layers {layers} must lie in [0, {self.depth})')
    if (mask_Nhw is None) != (mask_token_D is None):
      raise ValueError('mask_Nhw and mask_token_D go together: give both or neither')
    dtype = jnp.dtype(self.dtype)

    patches_NhwD = PatchEmbedding(self.width, self.patch, dtype, name='patch_embed')(image_NHWC)
    n, *grid, _ = patches_NhwD.shape
    patches_NhwD = patches_NhwD.astype(jnp.float32)
    if mask_Nhw is not None:
      chex.assert_shape(mask_Nhw, (n, *grid))
      chex.assert_shape(mask_token_D, (self.width,))
      patches_NhwD = jnp.where(mask_Nhw[..., None], mask_token_D, patches_NhwD)
    init = layers_lib.normal  # class token and positions, as DINO (timm's class token: 1e-6)
    class_11D = self.param('cls_token', init, (1, 1, self.width))
    position_1TD = self.param('pos_embed', init, (1, 1 + self.grid[0] * self.grid[1], self.width))
    position_1TD = resample_position_embedding(position_1TD, self.grid, tuple(grid))
    tokens_NTD = jnp.concatenate(
      [
        jnp.broadcast_to(class_11D, (n, 1, self.width)),
        patches_NhwD.reshape(n, -1, self.width),
      ],
      axis=1,
    )
    tokens_NTD = tokens_NTD + position_1TD
    if visible_NS is not None:
      chex.assert_shape(visible_NS, (n, None))
      seen_NSD = layers_lib.select(tokens_NTD[:, 1:], visible_NS)
      tokens_NTD = jnp.concatenate([tokens_NTD[:, :1], seen_NSD], axis=1)
      grid = (1, visible_NS.shape[1])

    scales_L2N = None
    if sample_keys is not None and self.drop_path > 0.0:
      scales_L2N = layers_lib.drop_path_scales(sample_keys, self.depth, self.drop_path)
    settings = layers_lib.BlockSettings(
      heads=self.heads,
      hidden=int(self.width * self.mlp_ratio),
      layer_scale=self.layer_scale,
      dtype=dtype,
      attention=self.attention,
    )
    options = {'collect': bool(layers), 'remat': self.remat, 'unroll': self.scan_unroll}
    if patches or self.is_initializing():  # Parameters are made by the scan, whatever is read.
      blocks = layers_lib.scanned_blocks(settings, self.depth, **options)
      tokens_NTD, outputs_LNTD = blocks(tokens_NTD, scales_L2N)
    else:
      params = self.variables['params']['blocks']
      tokens_NTD, outputs_LNTD = layers_lib.class_token_blocks(
        settings, params, tokens_NTD, scales_L2N, **options
      )

    norm = LayerNorm(name='norm')

    def split(x_NTD):
      return x_NTD[:, 0], x_NTD[:, 1:].reshape(n, *grid, self.width) if patches else None

    pooled_ND, patches_NhwD = split(norm(tokens_NTD))
    chosen = {layer: outputs_LNTD[layer] for layer in layers}
    if normalise_layers:
      chosen = {layer: norm(x_NTD) for layer, x_NTD in chosen.items()}
    return BackboneOutput(pooled_ND, patches_NhwD, {k: split(x_NTD) for k, x_NTD in chosen.items()})


def _check_divides(side: int, patch: int) -> None:
  if side % patch or side < patch:
    low = max(side // patch, 1) * patch
    raise errors.UserError(
      f'an image side of {side} pixels is not a multiple of the patch, {patch}:'
      f' use {low} or {low + patch}'
    )
