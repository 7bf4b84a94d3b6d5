"""Mixup and CutMix of a batch on the device, soft targets, and random erasing.

mixup: Zhang et al., ICLR 2018, arXiv 1710.09412, section 2. CutMix: Yun et al., ICCV 2019, arXiv 1905.04899,
section 3.1. Random erasing: Zhong et al., AAAI 2020, arXiv 1708.04896, algorithm 1. Ranges and rounding are timm's,
which fine-tuning recipes of ViTs use.

An image's partner is its neighbour: images 2i and 2i + 1 are mixed with each other. timm mirrors the batch, which on
a mesh moves half of the pixels between devices; of a shuffled batch neighbours are as good a sample of pairs, they lie
on one device, and they are the same pairs whatever the number of devices. One draw serves the whole batch, as timm's
mode 'batch' has it. (Microbatches of an accumulated step pair among themselves.)

Shape letters: B images, H rows, W columns, C channels, K classes, T tries.
"""

import dataclasses
import enum
import math

import chex
import jax
import jax.numpy as jnp

from folk_jax.errors import UserError

# Of the erased rectangle: bounds of its share of the area, and of height over width, drawn log-uniformly.
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
_TRIES = 10


class _Draw(enum.IntEnum):
  """What a key is folded with for each draw, so that no draw disturbs another."""

  MIXES = 0
  SWITCHES = 1
  SHARE_MIXUP = 2
  SHARE_CUTMIX = 3
  ROW = 4
  COLUMN = 5
  ERASES = 6
  AREA = 7
  RATIO = 8
  NOISE = 9


@dataclasses.dataclass(frozen=True)
class Mixing:
  """How batches are mixed; both strengths 0 leave them alone.

  Attributes:
    mixup: a of the Beta(a, a) that mixup's share is drawn from; 0 for none.
    cutmix: the same for CutMix.
    mix_probability: that a batch is mixed at all.
    switch_probability: that a mixed batch gets CutMix, where both are on.

  Raises:
    UserError: a value outside its range.
  """

  mixup: float
  cutmix: float
  mix_probability: float
  switch_probability: float

  def __post_init__(self):
    for name in ('mixup', 'cutmix'):
      if not getattr(self, name) >= 0:
        raise UserError(
          f'{name} is {getattr(self, name)}: give the parameter of a Beta, or 0 for none'
        )
    for name in ('mix_probability', 'switch_probability'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f'{name} is {getattr(self, name)}: choose it from 0 to 1')

  @property
  def acts(self) -> bool:
    """Whether any batch is ever mixed."""
    return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


def soft_targets(label_B: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """Smoothed targets: `smoothing` / K for every class, and 1 - `smoothing` more for the label's.

  Args:
    label_B: integers. One outside [0, K) gives a row of NaN: there is no target for it.
    classes: K.
    smoothing: in [0, 1) (Szegedy et al., arXiv 1512.00567, section 7).

  Returns:
    float32 [B, K] whose rows sum to 1.
  """
  chex.assert_rank(label_B, 1)
  target_BK = smoothing / classes + (1 - smoothing) * jax.nn.one_hot(label_B, classes)
  known_B = (label_B >= 0) & (label_B < classes)
  return jnp.where(known_B[:, None], target_BK, jnp.nan)


def mix(
  image_BHWC: jax.Array, target_BK: jax.Array, key: jax.Array, settings: Mixing
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image and its target with its neighbour's.

  Args:
    image_BHWC: float32; normalised or not, mixing is linear.
    target_BK: float32 rows that sum to 1.
    key: one for the batch, the same on all devices.
    settings: static under jit.

  Returns:
    Both, mixed with the same share; every row of targets still sums to 1.

  Raises:
    UserError: an odd number of images.
  """
  chex.assert_rank([image_BHWC, target_BK], [4, 2])
  chex.assert_equal_shape_prefix([image_BHWC, target_BK], 1)
  if len(image_BHWC) % 2:
    raise UserError(
      f'mixup and cutmix pair the images of a device, and here it has {len(image_BHWC)}: make config.batch_size a '
      'multiple of 2 x devices x config.accumulate, or switch both off'
    )
  own_HW1, share = draw_weights(key, settings, *image_BHWC.shape[1:3])
  return (
    own_HW1 * image_BHWC + (1 - own_HW1) * partner(image_BHWC),
    share * target_BK + (1 - share) * partner(target_BK),
  )


def partner(x: jax.Array) -> jax.Array:
  """Rows 2i and 2i + 1 exchanged; any shape with an even leading axis."""
  return jnp.flip(x.reshape(-1, 2, *x.shape[1:]), axis=1).reshape(x.shape)


def draw_weights(
  key: jax.Array, settings: Mixing, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """Draws what an image keeps of itself.

  Mixup keeps the same share of each pixel. CutMix keeps all but a box, whose sides are sqrt(1 - share) of the image's,
  whose centre is uniform, and which is cut at the borders; the share is then what is really left.

  Args:
    key: one for the batch.
    settings: strengths and probabilities.
    height: of the image.
    width: of the image.

  Returns:
    Weights float32 [H, W, 1] in [0, 1], and their mean, a scalar.
  """
  keys = {draw: jax.random.fold_in(key, int(draw)) for draw in _Draw}
  cuts = jnp.bool_(settings.cutmix > 0)
  if settings.mixup > 0 and settings.cutmix > 0:
    cuts = jax.random.bernoulli(keys[_Draw.SWITCHES], float(settings.switch_probability))
  mixes = settings.acts & jax.random.bernoulli(keys[_Draw.MIXES], float(settings.mix_probability))
  faded = _beta(keys[_Draw.SHARE_MIXUP], settings.mixup)
  side = jnp.sqrt(1 - _beta(keys[_Draw.SHARE_CUTMIX], settings.cutmix))
  inside_HW, area = cut_box(
    side,
    jax.random.randint(keys[_Draw.ROW], (), 0, height),
    jax.random.randint(keys[_Draw.COLUMN], (), 0, width),
    height,
    width,
  )
  own_HW = jnp.where(cuts, 1.0 - inside_HW, faded)
  share = jnp.where(cuts, 1 - area / (height * width), faded)
  return jnp.where(mixes, own_HW, 1.0)[..., None], jnp.where(mixes, share, 1.0)


def cut_box(
  side: jax.Array, row: jax.Array, column: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """The box that CutMix takes out.

  Args:
    side: of the box over the image's, in [0, 1].
    row, column: integers, its centre.
    height, width: of the image.

  Returns:
    bool [H, W], true inside, and the number of pixels inside, int32.
  """

  def within(centre: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    cut = jnp.floor(length * side).astype(jnp.int32)
    low = jnp.maximum(centre - cut // 2, 0)
    high = jnp.minimum(centre + (cut + 1) // 2, length)
    place = jnp.arange(length)
    return (place >= low) & (place < high), high - low

  rows_H, count_rows = within(row, height)
  columns_W, count_columns = within(column, width)
  return rows_H[:, None] & columns_W[None, :], count_rows * count_columns


def erase(image_BHWC: jax.Array, keys_B: jax.Array, probability: float) -> jax.Array:
  """Random erasing: a rectangle of an image becomes Gaussian noise, every pixel and channel its own.

  Args:
    image_BHWC: float32, normalised: the noise is standard normal.
    keys_B: typed keys, one an image; its draws depend on them alone.
    probability: that an image loses a rectangle. (One whose ten tries all exceed it is left alone.)

  Returns:
    float32 [B, H, W, C].
  """
  chex.assert_rank(image_BHWC, 4)
  chex.assert_shape(keys_B, image_BHWC.shape[:1])
  if probability <= 0:
    return image_BHWC
  return jax.vmap(lambda image_HWC, key: _erase_one(image_HWC, key, probability))(
    image_BHWC, keys_B
  )


def _erase_one(image_HWC: jax.Array, key: jax.Array, probability: float) -> jax.Array:
  keys = {draw: jax.random.fold_in(key, int(draw)) for draw in _Draw}
  height, width, _ = image_HWC.shape
  low, high = ERASED_AREA
  area_T = height * width * jax.random.uniform(keys[_Draw.AREA], (_TRIES,), minval=low, maxval=high)
  low, high = (math.log(ratio) for ratio in ERASED_RATIO)
  ratio_T = jnp.exp(jax.random.uniform(keys[_Draw.RATIO], (_TRIES,), minval=low, maxval=high))
  rows_T = jnp.round(jnp.sqrt(area_T * ratio_T)).astype(jnp.int32)
  columns_T = jnp.round(jnp.sqrt(area_T / ratio_T)).astype(jnp.int32)
  fits_T = (rows_T < height) & (columns_T < width)
  first = jnp.argmax(fits_T)
  rows, columns = rows_T[first], columns_T[first]
  happens = jax.random.bernoulli(keys[_Draw.ERASES], float(probability)) & fits_T[first]
  # Where nothing fits, nothing is used: the bounds of the draws need only be in order.
  top = jax.random.randint(keys[_Draw.ROW], (), 0, jnp.maximum(height - rows, 0) + 1)
  left = jax.random.randint(keys[_Draw.COLUMN], (), 0, jnp.maximum(width - columns, 0) + 1)
  y_H1, x_1W = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
  inside_HW = (y_H1 >= top) & (y_H1 < top + rows) & (x_1W >= left) & (x_1W < left + columns)
  noise_HWC = jax.random.normal(keys[_Draw.NOISE], image_HWC.shape, image_HWC.dtype)
  return jnp.where((inside_HW & happens)[..., None], noise_HWC, image_HWC)


def _beta(key: jax.Array, strength: float) -> jax.Array:
  """Beta(strength, strength) in [0, 1]; 1 where the strength is 0, which mixes nothing."""
  return jax.random.beta(key, strength, strength) if strength > 0 else jnp.float32(1)
