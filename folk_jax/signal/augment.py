"""Colour augmentation of a batch on the device, each image with a key of its own.

The views of DINO and iBOT after the crop and the flip, which the host cuts: colour jitter,
grayscale, Gaussian blur, solarisation (arXiv 2104.14294, 2111.07832), with torchvision's semantics
for floating-point images. Every draw depends on the image's key alone, so an image comes out the
same whatever batch it travels in.

Shapes: B images, H rows, W columns, C = 3 channels (red, green, blue). `augment` and `normalise`
take channels last as the rest of the program does; the single operations take channels before
pixels, because three is a poor innermost axis for vector units.
"""

import dataclasses
import enum
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ITU-R BT.601 luma, rounded as Pillow and torchvision have it.
_LUMA = (0.299, 0.587, 0.114)
# Standard deviations that the blur's kernel reaches to each side; 0.3 % of a Gaussian lies outside.
_BLUR_REACH = 3


class _Draw(enum.IntEnum):
  """What a key is folded with for each draw, so that no operation disturbs another's draws."""

  JITTER = 0
  ORDER = 1
  BRIGHTNESS = 2
  CONTRAST = 3
  SATURATION = 4
  HUE = 5
  GRAYSCALE = 6
  BLUR = 7
  BLUR_SIGMA = 8
  SOLARISE = 9


class Jitter(enum.IntEnum):
  """The operations of `jitter`; integers, because jax sorts the keys of dictionaries."""

  BRIGHTNESS = 0
  CONTRAST = 1
  SATURATION = 2
  HUE = 3


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Strengths and probabilities; an operation of strength or probability 0 is not computed at all.

  Attributes:
    brightness: factor uniform in [max(0, 1 - brightness), 1 + brightness]; likewise contrast and
      saturation.
    contrast: see brightness.
    saturation: see brightness.
    hue: shift uniform in [-hue, hue], in turns of the colour circle; at most 0.5.
    jitter_probability: of the four above together.
    grayscale_probability: of three equal channels of luma.
    blur_probability: of the Gaussian blur.
    blur_sigma: bounds of its standard deviation, in pixels, drawn uniformly.
    solarise_probability: of inverting what is at or above the threshold.
    solarise_threshold: in [0, 1].

  Raises:
    UserError: a value outside its range.
  """

  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  jitter_probability: float = 0.0
  grayscale_probability: float = 0.0
  blur_probability: float = 0.0
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  solarise_probability: float = 0.0
  solarise_threshold: float = 0.5

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if name.endswith(('probability', 'threshold')) and not 0 <= value <= 1:
        raise UserError(f'augmentation {name} is {value}: choose it from 0 to 1')
    for name in ('brightness', 'contrast', 'saturation'):
      if not getattr(self, name) >= 0:
        raise UserError(f'augmentation {name} is {getattr(self, name)}: choose it 0 or above')
    if not 0 <= self.hue <= 0.5:
      raise UserError(f'augmentation hue is {self.hue}: choose it from 0 to 0.5 turns')
    if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
      raise UserError(
        f'augmentation blur_sigma is {self.blur_sigma}: give two values above 0, the smaller first'
      )


def augment(image_BHWC: jax.Array, keys_B: jax.Array, settings: Augmentation) -> jax.Array:
  """Jitter, grayscale, blur and solarisation, in this order, each with its probability.

  Args:
    image_BHWC: float32 in [0, 1], three channels.
    keys_B: typed PRNG keys, one an image.
    settings: static under jit.

  Returns:
    float32 [B, H, W, 3] in [0, 1].
  """
  chex.assert_rank(image_BHWC, 4)
  chex.assert_axis_dimension(image_BHWC, 3, 3)
  chex.assert_type(image_BHWC, jnp.float32)
  chex.assert_shape(keys_B, image_BHWC.shape[:1])
  image_BCHW = jnp.moveaxis(image_BHWC, -1, 1)
  if settings.jitter_probability > 0:
    image_BCHW = _draw_jitter(image_BCHW, keys_B, settings)
  if settings.grayscale_probability > 0:
    gray_B = _happens(keys_B, _Draw.GRAYSCALE, settings.grayscale_probability)
    image_BCHW = jnp.where(_per_image(gray_B), luma(image_BCHW), image_BCHW)
  if settings.blur_probability > 0:
    sigma_B = _uniform(keys_B, _Draw.BLUR_SIGMA, *settings.blur_sigma)
    blurred_B = _happens(keys_B, _Draw.BLUR, settings.blur_probability)
    # The longest kernel serves every image: its length shapes the program.
    reach = math.ceil(_BLUR_REACH * settings.blur_sigma[1])
    image_BCHW = gaussian_blur(image_BCHW, jnp.where(blurred_B, sigma_B, 0), reach)
  if settings.solarise_probability > 0:
    solarised_B = _happens(keys_B, _Draw.SOLARISE, settings.solarise_probability)
    inverted = _per_image(solarised_B) & (image_BCHW >= settings.solarise_threshold)
    image_BCHW = jnp.where(inverted, 1 - image_BCHW, image_BCHW)
  return jnp.moveaxis(image_BCHW, 1, -1)


def normalise(
  image_BHWC: jax.Array,
  mean: tuple[float, ...] = IMAGENET_MEAN,
  std: tuple[float, ...] = IMAGENET_STD,
) -> jax.Array:
  """Takes out each channel's mean and divides by its standard deviation.

  Args:
    image_BHWC: floating point in [0, 1].
    mean: one a channel, in units of the image.
    std: one a channel.

  Returns:
    The same shape and dtype.
  """
  chex.assert_axis_dimension(image_BHWC, -1, len(mean))
  mean_C, std_C = np.asarray(mean, image_BHWC.dtype), np.asarray(std, image_BHWC.dtype)
  return (image_BHWC - mean_C) / std_C


def jitter(
  image_BCHW: jax.Array, order_BO: jax.Array, amounts_B: dict[Jitter, jax.Array]
) -> jax.Array:
  """Applies the operations of torchvision's ColorJitter, to each image in an order of its own.

  Brightness, contrast and saturation all mix the image with something grey: with black, with its
  mean luma, with its own luma. One mixing pass per place in the order therefore serves all three,
  whichever falls there.

  Args:
    image_BCHW: float32 in [0, 1].
    order_BO: int32, for each image a permutation of 0 .. O - 1, which number the operations in
      `amounts_B`, those of a lower `Jitter` first.
    amounts_B: for each operation float32 [B]: a factor, or turns for the hue.

  Returns:
    float32 [B, C, H, W] in [0, 1].
  """

  def apply_at(place: jax.Array, jittered_BCHW: jax.Array) -> jax.Array:
    number_B = jax.lax.dynamic_index_in_dim(order_BO, place, axis=1, keepdims=False)
    here_B111 = {op: _per_image(number_B == number) for number, op in enumerate(sorted(amounts_B))}
    return _jitter_once(jittered_BCHW, here_B111, amounts_B)

  # A loop, because XLA would fuse unrolled places into one and compute the first of them again and
  # again.
  return jax.lax.fori_loop(0, len(amounts_B), apply_at, image_BCHW)


def shift_hue(image_BCHW: jax.Array, turns_B: jax.Array) -> jax.Array:
  """Adds to the hue of HSV; saturation and value stay.

  In sixths of a turn, a channel of the shifted colour is value - chroma * clip(min(k, 4 - k), 0, 1)
  with k = (n + hue) mod 6 and n = 5, 3, 1 for red, green, blue: no case by case conversion back to
  RGB.

  Args:
    image_BCHW: float32 in [0, 1].
    turns_B: float32, in turns of the colour circle.

  Returns:
    float32 [B, C, H, W] in [0, 1].
  """
  red, green, blue = _channels(image_BCHW)
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  per_chroma = 1 / jnp.where(chroma > 0, chroma, 1)
  sixths = jnp.where(
    value == red,
    (green - blue) * per_chroma,
    jnp.where(value == green, (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4),
  )
  offset_C11 = np.asarray([5, 3, 1], np.float32)[:, None, None]
  k = sixths + 6 * _per_image(turns_B) + offset_C11
  k = k - 6 * jnp.floor(k / 6)
  return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def gaussian_blur(image_BCHW: jax.Array, sigma_B: jax.Array, reach: int) -> jax.Array:
  """A separable Gaussian with reflected borders (the edge pixel is not repeated), as torchvision's.

  Args:
    image_BCHW: float32.
    sigma_B: float32, standard deviation in pixels; 0 returns the image bit for bit.
    reach: the kernel has 2 * reach + 1 taps, and sums to 1.

  Returns:
    float32 [B, C, H, W], within the range of the image.
  """
  offset_T = np.arange(reach + 1, dtype=np.float32)
  taps_BT = jnp.exp(-0.5 * jnp.square(offset_T / jnp.maximum(sigma_B, 1e-3)[:, None]))
  taps_BT /= taps_BT[:, :1] + 2 * jnp.sum(taps_BT[:, 1:], axis=1, keepdims=True)
  for axis in (2, 3):
    # Without the barrier XLA fuses what made the image into every tap and computes it 13 times: 30x
    # slower on a CPU.
    image_BCHW = _correlate(jax.lax.optimization_barrier(image_BCHW), taps_BT, axis)
  return image_BCHW


def luma(image_BCHW: jax.Array) -> jax.Array:
  """0.299 red + 0.587 green + 0.114 blue; float32 [B, 1, H, W]."""
  red, green, blue = _channels(image_BCHW)
  return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _draw_jitter(image_BCHW: jax.Array, keys_B: jax.Array, settings: Augmentation) -> jax.Array:
  """Jitters with factors around 1, hue shifts around 0, and orders, drawn for each image."""
  amounts_B = {}
  for op, strength in (
    (Jitter.BRIGHTNESS, settings.brightness),
    (Jitter.CONTRAST, settings.contrast),
    (Jitter.SATURATION, settings.saturation),
  ):
    if strength > 0:
      draw = _Draw[op.name]
      amounts_B[op] = _uniform(keys_B, draw, max(0.0, 1 - strength), 1 + strength)
  if settings.hue > 0:
    amounts_B[Jitter.HUE] = _uniform(keys_B, _Draw.HUE, -settings.hue, settings.hue)
  if not amounts_B:
    return image_BCHW
  order_BO = _each(keys_B, _Draw.ORDER, lambda key: jax.random.permutation(key, len(amounts_B)))
  happens_B = _happens(keys_B, _Draw.JITTER, settings.jitter_probability)
  return jnp.where(_per_image(happens_B), jitter(image_BCHW, order_BO, amounts_B), image_BCHW)


def _jitter_once(
  image_BCHW: jax.Array, here_B111: dict[Jitter, jax.Array], amounts_B: dict[Jitter, jax.Array]
) -> jax.Array:
  """The operation that `here_B111` marks for each image."""
  factor_B111, grey = jnp.float32(1), jnp.float32(0)
  for op in (Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION):
    if op in here_B111:
      factor_B111 = jnp.where(here_B111[op], _per_image(amounts_B[op]), factor_B111)
  luma_B1HW = luma(image_BCHW)
  if Jitter.CONTRAST in here_B111:
    mean_B111 = jnp.mean(luma_B1HW, axis=(2, 3), keepdims=True)
    grey = jnp.where(here_B111[Jitter.CONTRAST], mean_B111, grey)
  if Jitter.SATURATION in here_B111:
    grey = jnp.where(here_B111[Jitter.SATURATION], luma_B1HW, grey)
  mixed_BCHW = jnp.clip(factor_B111 * image_BCHW + (1 - factor_B111) * grey, 0, 1)
  if Jitter.HUE in here_B111:
    turned_BCHW = shift_hue(image_BCHW, amounts_B[Jitter.HUE])
    mixed_BCHW = jnp.where(here_B111[Jitter.HUE], turned_BCHW, mixed_BCHW)
  return mixed_BCHW


def _correlate(image_BCHW: jax.Array, taps_BT: jax.Array, axis: int) -> jax.Array:
  """Correlates along one axis with a symmetric kernel of each image's own, given from its centre
  outwards."""
  reach, size = taps_BT.shape[1] - 1, image_BCHW.shape[axis]
  padding = [(0, 0)] * 4
  padding[axis] = (reach, reach)
  padded = jnp.pad(image_BCHW, padding, mode='reflect')

  def shifted(offset: int) -> jax.Array:
    return jax.lax.slice_in_dim(padded, reach + offset, reach + offset + size, axis=axis)

  total = _per_image(taps_BT[:, 0]) * shifted(0)
  for offset in range(1, reach + 1):
    total += _per_image(taps_BT[:, offset]) * (shifted(-offset) + shifted(offset))
  return total


def _channels(image_BCHW: jax.Array) -> list[jax.Array]:
  return [image_BCHW[:, channel : channel + 1] for channel in range(3)]


def _per_image(scalar_B: jax.Array) -> jax.Array:
  return scalar_B[:, None, None, None]


def _fold(keys_B: jax.Array, draw: _Draw) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, int(draw)))(keys_B)


def _each(keys_B: jax.Array, draw: _Draw, sample: Callable[[jax.Array], jax.Array]) -> jax.Array:
  return jax.vmap(sample)(_fold(keys_B, draw))


def _uniform(keys_B: jax.Array, draw: _Draw, low: float, high: float) -> jax.Array:
  return _each(keys_B, draw, lambda key: jax.random.uniform(key, minval=low, maxval=high))


def _happens(keys_B: jax.Array, draw: _Draw, probability: float) -> jax.Array:
  return _each(keys_B, draw, lambda key: jax.random.bernoulli(key, float(probability)))
