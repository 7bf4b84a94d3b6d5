"""ResNet in timm's conventions (arXiv 1512.03385; timm's `ResNet`, torchvision's "v1.5").

The stride of a bottleneck is on its 3x3 convolution, padding is symmetric, and BatchNorm is
torch's, over the whole batch on all devices.

Shape letters: N images, H and W pixels, h and w positions of a feature map, C channels of a feature
map, D channels of the last.
"""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from folk_jax import errors
from folk_jax.models.vit import DTYPES, BackboneOutput

STRIDE = 32
STEM_WIDTH = 64  # timm's, whatever the width of the stages: any of these loads there.
_EPSILON = 1e-5

# The sides of a residual branch's convolutions.
BASIC, BOTTLENECK = (3, 3), (1, 3, 1)
# Channels that a block puts out, over its width.
EXPANSION = {BASIC: 1, BOTTLENECK: 4}
# Depth, in layers with weights (a classifier's among them) -> the kind of block, blocks a stage.
DEPTHS = {
  10: (BASIC, (1, 1, 1, 1)),
  14: (BOTTLENECK, (1, 1, 1, 1)),
  18: (BASIC, (2, 2, 2, 2)),
  26: (BOTTLENECK, (2, 2, 2, 2)),
  34: (BASIC, (3, 4, 6, 3)),
  50: (BOTTLENECK, (3, 4, 6, 3)),
  101: (BOTTLENECK, (3, 4, 23, 3)),
  152: (BOTTLENECK, (3, 8, 36, 3)),
}
REMAT = ('none', 'block')

_he_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class BatchNorm(nn.Module):
  """torch's BatchNorm2d (arXiv 1502.03167) in float32 or wider, over every axis but the last.

  Parameters `scale`, `bias` [C]; `mean`, `var` [C] in the collection `batch_stats`. Under `train`
  the batch's mean and biased variance normalise, and mean and unbiased variance enter the
  collection: new = momentum * old + (1 - momentum) * batch. The batch is the global one: a mean
  over a sharded axis is one over all devices (what torch calls SyncBatchNorm).

  Attributes:
    momentum: weight of the old statistics (1 minus torch's momentum).
    zero_scale: whether `scale` starts at 0 instead of 1.
  """

  momentum: float
  zero_scale: bool = False

  @nn.compact
  def __call__(self, x_NhwC: jax.Array, train: bool) -> jax.Array:
    x_NhwC = _wide(x_NhwC)
    shape = (x_NhwC.shape[-1],)
    scale_C = self.param(
      'scale', nn.initializers.zeros if self.zero_scale else nn.initializers.ones, shape
    )
    bias_C = self.param('bias', nn.initializers.zeros, shape)
    stored = {
      'mean': self.variable('batch_stats', 'mean', jnp.zeros, shape),
      'var': self.variable('batch_stats', 'var', jnp.ones, shape),
    }
    mean_C, var_C = (stored[name].value for name in ('mean', 'var'))
    if train:
      # Two passes, as torch: E[x^2] - E[x]^2 cancels where a channel's mean is large.
      mean_C = jnp.mean(x_NhwC, axis=(0, 1, 2))
      var_C = jnp.mean(jnp.square(x_NhwC - mean_C), axis=(0, 1, 2))
      if not self.is_initializing():
        count = math.prod(x_NhwC.shape[:-1])
        batch = {'mean': mean_C, 'var': var_C * (count / max(count - 1, 1))}
        for name, statistic in stored.items():
          statistic.value = self.momentum * statistic.value + (1 - self.momentum) * batch[name]
    return (x_NhwC - mean_C) * (jax.lax.rsqrt(var_C + _EPSILON) * scale_C) + bias_C


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _convolution(features: int, side: int, stride: int, dtype: jnp.dtype, name: str) -> nn.Conv:
  """A convolution without bias, padded by side // 2 on every edge.

  'SAME' would pad stride-2 convolutions on the far edges only, half a stride off torch's.
  """
  return nn.Conv(
    features,
    (side, side),
    stride,
    padding=((side // 2, side // 2),) * 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=_he_fan_out,
    name=name,
  )


def max_pool(x_NhwC: jax.Array) -> jax.Array:
  """The largest of 3x3 positions, stride 2, padded by 1: [N, h, w, C], both even -> [N, h/2, w/2, C].

  One axis after the other by slices. XLA's own window (`nn.max_pool`) has a gradient that is slow on
  CPUs, and around which the partitioner gathers the whole batch, as it does around an FFT. Where two
  positions are the largest, they share the gradient; torch gives it to the first.
  """
  chex.assert_rank(x_NhwC, 4)
  for axis in (1, 2):
    side = x_NhwC.shape[axis]
    padding = [(int(i == axis), 0) for i in range(4)]
    padded = jnp.pad(x_NhwC, padding, constant_values=-jnp.inf)
    first, *rest = (
      jax.lax.slice_in_dim(padded, i, i + side - 1, stride=2, axis=axis) for i in range(3)
    )
    x_NhwC = functools.reduce(jnp.maximum, rest, first)
  return x_NhwC


class Block(nn.Module):
  """A residual block (arXiv 1512.03385, figure 5): relu(shortcut + branch).

  Sums, norms and ReLU are float32; what passes from layer to layer has the compute dtype, as under
  torch's autocast: a ResNet's time goes into moving feature maps.

  Attributes:
    sides: of the branch's convolutions, `BASIC` or `BOTTLENECK`.
    width: channels inside the branch.
    stride: of the first 3x3 convolution, and of the shortcut.
    momentum: `BatchNorm.momentum`.
    zero_init_last: whether the branch starts at zero.
    dtype: compute dtype.
  """

  sides: tuple[int, ...]
  width: int
  stride: int
  momentum: float
  zero_init_last: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_NhwC: jax.Array, train: bool) -> jax.Array:
    features = self.width * EXPANSION[self.sides]
    strided, last = self.sides.index(3), len(self.sides) - 1
    branch_NhwC = x_NhwC
    for i, side in enumerate(self.sides):
      branch_NhwC = _convolution(
        features if i == last else self.width,
        side,
        self.stride if i == strided else 1,
        self.dtype,
        f'conv{i + 1}',
      )(branch_NhwC)
      zero = self.zero_init_last and i == last
      branch_NhwC = BatchNorm(self.momentum, zero, name=f'bn{i + 1}')(branch_NhwC, train)
      if i != last:
        branch_NhwC = nn.relu(branch_NhwC).astype(self.dtype)
    shortcut_NhwC = _wide(x_NhwC)
    if self.stride != 1 or x_NhwC.shape[-1] != features:
      projected_NhwC = _convolution(features, 1, self.stride, self.dtype, 'downsample_conv')(x_NhwC)
      shortcut_NhwC = BatchNorm(self.momentum, name='downsample_bn')(projected_NhwC, train)
    return nn.relu(shortcut_NhwC + branch_NhwC).astype(self.dtype)


class ResNet(nn.Module):
  """ResNet backbone.

  Parameters and statistics have timm's names: `conv1`, `bn1`, `layer<stage>_<block>`. Blocks aren't
  scanned as a ViT's are: a scan copies every feature map that the backward pass needs.

  Attributes:
    image_size: side in pixels, or (height, width), that the run uses; a multiple of 32. Images of
      any other such size are accepted.
    depth: a key of `DEPTHS`.
    width: channels inside the blocks of the first stage, doubled at each of the three that follow.
    norm_momentum: weight of the old statistics in BatchNorm's, in [0, 1]; at 0 the collection
      `batch_stats` becomes the batch's own.
    zero_init_last: whether each block starts as its shortcut (arXiv 1706.02677, section 5.1).
    dtype: compute dtype of the convolutions, 'float32' or 'bfloat16'. Parameters, norms, statistics
      and outputs are float32.
    remat: what the backward pass recomputes: 'none', or 'block' (all but each block's input).

  Raises:
    UserError: for unknown depths and options, and sizes that 32 does not divide.
  """

  image_size: int | tuple[int, int]
  depth: int = 50
  width: int = 64
  norm_momentum: float = 0.9
  zero_init_last: bool = True
  dtype: str = 'float32'
  remat: str = 'none'

  @property
  def stride(self) -> int:
    """Pixels a side of a position of the last feature map."""
    return STRIDE

  @property
  def features(self) -> int:
    """Channels of the last feature map and of `pooled`."""
    return 8 * self.width * EXPANSION[DEPTHS[self.depth][0]]

  def check(self) -> None:
    """Raises UserError for fields that make no model."""
    for field, known in (('depth', DEPTHS), ('dtype', DTYPES), ('remat', REMAT)):
      if getattr(self, field) not in known:
        raise errors.UserError(
          f'model.{field} is {getattr(self, field)!r}: expected one of {", ".join(map(str, known))}'
        )
    if self.width < 1:
      raise errors.UserError(f'model.width is {self.width}: it must be at least 1')
    if not 0.0 <= self.norm_momentum <= 1.0:
      raise errors.UserError(f'model.norm_momentum is {self.norm_momentum}: it must lie in [0, 1]')
    size = self.image_size
    for side in (size,) if isinstance(size, int) else size:
      _check_divides(side)

  @nn.compact
  def __call__(
    self,
    image_NHWC: jax.Array,
    sample_keys: jax.Array | None = None,
    train: bool = False,
    layers: tuple[int, ...] = (),
    normalise_layers: bool = False,
    patches: bool = True,
  ) -> BackboneOutput:
    """Encodes normalised images.

    Args:
      image_NHWC: float [N, H, W, 3], normalised by the data's mean and deviation.
      sample_keys: ignored; nothing here is drawn.
      train: whether BatchNorm uses the statistics of this batch and updates the collection
        `batch_stats`, which must then be mutable; else it uses the stored ones.
      layers: stages, in [0, 4), whose feature maps are returned as well, with their averages.
      normalise_layers: ignored; a stage ends without a norm.
      patches: whether feature maps are returned, beside their averages.

    Returns:
      BackboneOutput, float32; `pooled` is the average over the positions of `patches`.

    Raises:
      UserError: when 32 does not divide the image.
      ValueError: for a stage outside [0, 4).
    """
    del sample_keys, normalise_layers
    self.check()
    chex.assert_rank(image_NHWC, 4)
    for side in image_NHWC.shape[1:3]:
      _check_divides(side)
    sides, blocks = DEPTHS[self.depth]
    if any(not 0 <= stage < len(blocks) for stage in layers):
      raise ValueError(f'layers {layers} must lie in [0, {len(blocks)})')
    dtype = jnp.dtype(self.dtype)
    block = nn.remat(Block, static_argnums=2) if self.remat == 'block' else Block

    x_NhwC = _convolution(STEM_WIDTH, 7, 2, dtype, 'conv1')(image_NHWC.astype(dtype))
    x_NhwC = BatchNorm(self.norm_momentum, name='bn1')(x_NhwC, train)
    x_NhwC = nn.relu(x_NhwC).astype(dtype)
    x_NhwC = max_pool(x_NhwC)
    outputs = []
    for stage, count in enumerate(blocks):
      for index in range(count):
        x_NhwC = block(
          sides=sides,
          width=self.width * 2**stage,
          stride=2 if stage and not index else 1,
          momentum=self.norm_momentum,
          zero_init_last=self.zero_init_last,
          dtype=dtype,
          name=f'layer{stage + 1}_{index}',
        )(x_NhwC, train)
      outputs.append(x_NhwC)

    def averaged(map_NhwC):
      map_NhwC = map_NhwC.astype(jnp.float32)
      return jnp.mean(map_NhwC, axis=(1, 2)), map_NhwC if patches else None

    chosen = {stage: averaged(outputs[stage]) for stage in layers}
    return BackboneOutput(*averaged(x_NhwC), chosen)


def _check_divides(side: int) -> None:
  if side % STRIDE or side < STRIDE:
    low = max(side // STRIDE, 1) * STRIDE
    raise errors.UserError(
      f"an image side of {side} pixels is not a multiple of a ResNet's stride, {STRIDE}:"
      f' use {low} or {low + STRIDE}'
    )
