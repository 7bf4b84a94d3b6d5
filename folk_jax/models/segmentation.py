"""Heads that turn feature maps into class scores a position: a linear layer, and UPerNet.

Shape letters: N images, h, w positions of a map, D width of a backbone's features, C channels of a head, K classes,
P, Q positions of a line before and after.

Resizing is bilinear with half-pixel centres (torch's `align_corners=False`). Norms are GroupNorms where mmseg's UPerNet
has SyncBN [D]: nothing depends on the rest of the batch, and evaluation needs no running statistics.
"""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.models import layers as layers_lib

# Sides in bins of the pyramid pooling module (PSPNet, arXiv 1612.01105, section 3.2).
BINS = (1, 2, 3, 6)
# Strides of the four levels of a feature pyramid.
LEVELS = 4
_GROUP_SIZE = 16
_AUXILIARY_CHANNELS = 256


def resize(x_NhwC: jax.Array, height: int, width: int) -> jax.Array:
  """Resizes maps bilinearly, without antialiasing, as torch's `interpolate(align_corners=False)`.

  Args:
    x_NhwC: float [N, h, w, C].
    height: wanted, in positions.
    width: wanted, in positions.

  Returns:
    [N, height, width, C], the same dtype.
  """
  chex.assert_rank(x_NhwC, 4)
  n, h, w, channels = x_NhwC.shape
  if (h, w) == (height, width):
    return x_NhwC
  return jax.image.resize(x_NhwC, (n, height, width, channels), 'bilinear', antialias=False)


def _pooling(size: int, bins: int) -> np.ndarray:
  """The matrix [Q, P] of torch's adaptive average pooling: bin q averages floor(qP/Q) up to ceil((q+1)P/Q)."""
  matrix_QP = np.zeros((bins, size), np.float32)
  for q in range(bins):
    start, stop = q * size // bins, -(-(q + 1) * size // bins)
    matrix_QP[q, start:stop] = 1 / (stop - start)
  return matrix_QP


def adaptive_pool(x_NhwC: jax.Array, bins: int) -> jax.Array:
  """Averages maps over `bins` x `bins` regions, as torch's `adaptive_avg_pool2d`: [N, bins, bins, C]."""
  chex.assert_rank(x_NhwC, 4)
  down_QP, across_QP = (jnp.asarray(_pooling(size, bins)) for size in x_NhwC.shape[1:3])
  return jnp.einsum('qp,nprc,sr->nqsc', down_QP, x_NhwC.astype(jnp.float32), across_QP).astype(
    x_NhwC.dtype
  )


def factors(patch: int) -> tuple[float, ...]:
  """What a ViT's map is enlarged by at each level of its pyramid: (4, 2, 1, 1/2) at patch 16, as BEiT's code.

  The first level has about a position every 4 pixels: (2, 1, 1/2, 1/4) at patch 8, (1, ...) at patch 4 and below.
  """
  first = 2 ** min(2, max(0, round(math.log2(patch / 4))))
  return tuple(first / 2**level for level in range(LEVELS))


def pyramid_layers(depth: int) -> tuple[int, ...]:
  """Numbers, from 0, of a ViT's blocks d/4, d/2, 3d/4 and d, rounded up."""
  return tuple(math.ceil(depth * quarter / LEVELS) - 1 for quarter in range(1, LEVELS + 1))


def _group_norm(channels: int, name: str) -> nn.GroupNorm:
  """Groups of 16 channels (32 groups of 512), float32; two passes, as `norm.LayerNorm`.

  Not 32 groups of however few: on a map of one position a group of one channel is always 0.
  """
  return nn.GroupNorm(
    num_groups=None,
    group_size=math.gcd(_GROUP_SIZE, channels),
    epsilon=1e-5,
    dtype=jnp.float32,
    use_fast_variance=False,
    name=name,
  )


class ConvNorm(nn.Module):
  """Convolution without bias, GroupNorm in float32, ReLU."""

  channels: int
  side: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_NhwC: jax.Array) -> jax.Array:
    x_NhwC = nn.Conv(
      self.channels,
      (self.side, self.side),
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.he_normal(),
      name='conv',
    )(x_NhwC)
    norm = _group_norm(self.channels, 'norm')
    return nn.relu(norm(x_NhwC)).astype(self.dtype)


class Enlarge(nn.Module):
  """A transposed convolution of side and stride 2: each position becomes four, by one matrix product."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_NhwD: jax.Array) -> jax.Array:
    n, h, w, width = x_NhwD.shape
    init = layers_lib.torch_uniform
    x_NhwE = nn.Dense(4 * width, dtype=self.dtype, kernel_init=init, name='four')(x_NhwD)
    x = x_NhwE.reshape(n, h, w, 2, 2, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, 2 * h, 2 * w, width)


class Pyramid(nn.Module):
  """Four maps of one size, from blocks of a ViT, to four sizes, as BEiT's and MAE's code for segmentation.

  x4: transposed convolution, norm, GELU, transposed convolution; x2: one of them; x1: nothing; less: max pooling (an
  odd side rounds up [D]).
  """

  factors: tuple[float, ...]
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    levels = []
    for level, (x_NhwD, factor) in enumerate(zip(maps, self.factors, strict=True)):
      x_NhwD = x_NhwD.astype(self.dtype)
      for number in range(round(math.log2(max(factor, 1)))):
        if number:
          norm = _group_norm(x_NhwD.shape[-1], f'norm_{level}')
          x_NhwD = layers_lib.gelu(norm(x_NhwD)).astype(self.dtype)
        x_NhwD = Enlarge(self.dtype, name=f'enlarge_{level}_{number}')(x_NhwD)
      if factor < 1:
        window = (round(1 / factor),) * 2
        x_NhwD = nn.max_pool(x_NhwD, window, window, 'SAME')
      levels.append(x_NhwD)
    return tuple(levels)


class LinearHead(nn.Module):
  """A linear layer on each position's features: what frozen or fine-tuned features say by themselves.

  Attributes:
    classes: K.
    dtype: compute dtype.
  """

  classes: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, maps: tuple[jax.Array, ...], sample_keys: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Scores of feature maps.

    Args:
      maps: float [N, h, w, D] each, of one size; their features are joined.
      sample_keys: ignored; nothing is dropped.

    Returns:
      Logits float32 [N, h, w, K], and None: there is no auxiliary head.
    """
    del sample_keys
    chex.assert_equal_shape_prefix(maps, 3)
    x_NhwD = jnp.concatenate(maps, axis=-1)
    init = layers_lib.normal
    logits = nn.Dense(self.classes, dtype=self.dtype, kernel_init=init, name='classify')(x_NhwD)
    return logits.astype(jnp.float32), None


class UPerNet(nn.Module):
  """UPerNet's head for segmentation (Xiao et al., ECCV 2018, arXiv 1807.10221, section 3.1).

  Pyramid pooling on the coarsest map, a top-down path with lateral connections, and the four levels fused at the finest
  one's size. The auxiliary head is FCN's of one convolution, on the third level.

  Attributes:
    classes: K.
    channels: C, of every level: 512 in BEiT's and MAE's code.
    factors: what maps of one size (a ViT's) are first enlarged by; () for maps that are a pyramid (a ResNet's).
    dropout: probability that a channel is dropped before the classifier, in [0, 1); acts where keys are given.
    auxiliary: whether there is an auxiliary head.
    dtype: compute dtype.
  """

  classes: int
  channels: int = 512
  factors: tuple[float, ...] = ()
  dropout: float = 0.1
  auxiliary: bool = False
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, maps: tuple[jax.Array, ...], sample_keys: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Scores of feature maps.

    Args:
      maps: four of float [N, h, w, D], the finest first.
      sample_keys: typed keys [N] for dropout, or None for none.

    Returns:
      Logits float32 [N, h, w, K] at the size of the finest level, and the auxiliary head's at that of the third, or
      None.
    """
    if len(maps) != LEVELS:
      raise ValueError(f'UPerNet takes {LEVELS} maps, found {len(maps)}')
    dtype = jnp.dtype(self.dtype)
    levels = [x.astype(dtype) for x in maps]
    if self.factors:
      levels = list(Pyramid(self.factors, dtype, name='pyramid')(maps))

    def conv(name: str, side: int, channels: int = self.channels) -> ConvNorm:
      return ConvNorm(channels, side, dtype, name=name)

    def classify(x_NhwC: jax.Array, name: str) -> jax.Array:
      x_NhwC = _drop_channels(x_NhwC, sample_keys, self.dropout)
      init = layers_lib.normal
      dense = nn.Dense(self.classes, dtype=dtype, kernel_init=init, name=name)
      return dense(x_NhwC).astype(jnp.float32)

    # 1. Pyramid pooling on the coarsest level.
    top = levels[-1]
    sides = top.shape[1:3]
    pooled = [resize(conv(f'pool_{bins}', 1)(adaptive_pool(top, bins)), *sides) for bins in BINS]
    top = conv('bottleneck', 3)(jnp.concatenate([top, *pooled], axis=-1))
    # 2. Top-down: what is coarser is added to what is finer.
    merged = [conv(f'lateral_{level}', 1)(x) for level, x in enumerate(levels[:-1])] + [top]
    for level in reversed(range(LEVELS - 1)):
      merged[level] = merged[level] + resize(merged[level + 1], *merged[level].shape[1:3])
    # 3. All levels at the finest one's size, fused.
    fine = [conv(f'fpn_{level}', 3)(x) for level, x in enumerate(merged[:-1])] + [top]
    fine = [resize(x, *merged[0].shape[1:3]) for x in fine]
    fused = conv('fuse', 3)(jnp.concatenate(fine, axis=-1))
    logits = classify(fused, 'classify')
    if not self.auxiliary:
      return logits, None
    third = conv('auxiliary', 3, _AUXILIARY_CHANNELS)(levels[2])
    return logits, classify(third, 'classify_auxiliary')


def _drop_channels(x_NhwC: jax.Array, keys_N: jax.Array | None, rate: float) -> jax.Array:
  """Whole channels of an image to 0, the others scaled up, by one key an image (torch's Dropout2d)."""
  if keys_N is None or not rate:
    return x_NhwC
  keep = 1.0 - rate
  channels = x_NhwC.shape[-1:]
  kept_NC = jax.vmap(lambda key: jax.random.bernoulli(key, keep, channels))(keys_N)
  return x_NhwC * (kept_NC / keep).astype(x_NhwC.dtype)[:, None, None]
