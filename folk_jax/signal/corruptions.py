"""Common corruptions of images at five severities, on the device, after Hendrycks and Dietterich (arXiv 1903.12261).

Not ImageNet-C or CIFAR-10-C, and no figure on these images is a figure on those: the benchmarks are
files, made once with NumPy, OpenCV, Pillow, SciPy and ImageMagick and stored as JPEG or 8-bit
arrays, while these are drawn anew from each image's own key, in float32, from the images as they are
given (the benchmark crops first and corrupts then), without rounding to 8 bits between or after the
operations. What an operation computes and its severities are those of the paper's public code unless the list says
otherwise. 14 of its 15 corruptions are here, and 3 of its 4 spare ones:

  noise    gaussian_noise, shot_noise, impulse_noise; spare: speckle_noise. The same distributions.
  blur     defocus_blur, zoom_blur; spare: gaussian_blur. The same filters.
           motion_blur: ImageMagick's filter, rebuilt from its definition.
           glass_blur: its own. The reference swaps neighbours in place, pixel after pixel, so that a
           pixel may travel on; here every pixel is drawn from its neighbourhood at once, as many
           rounds, and values may be lost or doubled. On a few photographs its distance from the clean image
           (root mean square) was 0.77 to 0.93 of the reference's at 32 pixels, 0.92 to 1.08 at 224.
  weather  fog, brightness. The same maps.
           snow: as motion_blur.
           frost: left out, it needs six photographs.
  digital  contrast, pixelate. The same maps.
           elastic_transform: OpenCV rounds the affine map's places to 1/32 pixel, this does not.
           jpeg_compression: the codec's loss in float32, see `digital.jpeg`.
  spare    saturate. The same map. (speckle_noise and gaussian_blur, above, are spare too.)
           spatter: left out, its water needs Canny edges and a distance transform.

Severities come as two lists: ImageNet-C's, for 224 pixels, and CIFAR-10-C's, for 32. Images whose
shorter side is at most 64 pixels take CIFAR-10-C's, others ImageNet-C's, and neither is scaled: at
sizes far from 32 and 224 a severity is not what it is there. Parameters are lengths in pixels.

Shape letters: B images, H rows, W columns, C = 3 channels (red, green, blue). Functions with an
`image_HWC` see one image: `corrupt` maps them.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.signal import blurs, digital, weather

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64
LEAST_SIDE = 8
_MOST_PHOTONS = 64


@dataclasses.dataclass(frozen=True)
class Corruption:
  """One corruption.

  Attributes:
    group: 'noise', 'blur', 'weather', 'digital' or 'spare' (the paper's hold-out corruptions, which
      its mean over fifteen does not count).
    fn: `(image_HWC, key, *parameters) -> image_HWC`, not yet clipped to [0, 1].
    large: five tuples of parameters, ImageNet-C's.
    small: five, CIFAR-10-C's.
  """

  group: str
  fn: Callable[..., jax.Array]
  large: tuple[tuple[float, ...], ...]
  small: tuple[tuple[float, ...], ...]


def corrupt(name: str, image_BHWC: jax.Array, keys_B: jax.Array, severity: int) -> jax.Array:
  """Corrupts each image by what its key draws. On a mesh, call it through `shard.over_batch`.

  Args:
    name: a key of CORRUPTIONS.
    image_BHWC: float32 in [0, 1], three channels.
    keys_B: typed PRNG keys, one an image.
    severity: 1 to 5, static.

  Returns:
    float32 [B, H, W, C] in [0, 1].

  Raises:
    UserError: an unknown name or severity, or images with a side below 8 pixels.
  """
  chex.assert_rank(image_BHWC, 4)
  chex.assert_axis_dimension(image_BHWC, 3, 3)
  chex.assert_type(image_BHWC, jnp.float32)
  chex.assert_shape(keys_B, image_BHWC.shape[:1])
  corruption = find(name)
  if severity not in SEVERITIES:
    raise UserError(f'the severity of {name} is {severity}: choose 1, 2, 3, 4 or 5')
  side = min(image_BHWC.shape[1:3])
  if side < LEAST_SIDE:
    raise UserError(
      f'{name} is given images of {image_BHWC.shape[1]} x {image_BHWC.shape[2]} pixels: both sides '
      f'must be at least {LEAST_SIDE}'
    )
  values = (corruption.small if side <= SMALL_SIDE else corruption.large)[severity - 1]

  def one(image_HWC: jax.Array, key: jax.Array) -> jax.Array:
    return corruption.fn(image_HWC, key, *values)

  return jnp.clip(jax.vmap(one)(image_BHWC, keys_B), 0, 1)


def find(name: str) -> Corruption:
  """The corruption of that name.

  Raises:
    UserError: there is none.
  """
  if name not in CORRUPTIONS:
    near = difflib.get_close_matches(str(name), CORRUPTIONS, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    if name in ('frost', 'spatter'):
      hint = ' It is left out: evaluate on the files of the benchmark.'
    raise UserError(f'unknown corruption {name!r}.{hint} Known: {", ".join(CORRUPTIONS)}.')
  return CORRUPTIONS[name]


def gaussian_noise(image_HWC: jax.Array, key: jax.Array, sigma: float) -> jax.Array:
  """Adds independent Gaussian noise to every value."""
  return image_HWC + sigma * jax.random.normal(key, image_HWC.shape)


def shot_noise(image_HWC: jax.Array, key: jax.Array, photons: float) -> jax.Array:
  """Every value as a Poisson count, of which `photons` make 1.

  By inverting the distribution: as many steps for every value and batch, where a sampler that
  rejects runs as long as its unluckiest value. Counts beyond 6 deviations are cut to that.
  """
  # exp(-mean) has to stay well inside float32, so a large count is a sum of smaller ones.
  parts = math.ceil(photons / _MOST_PHOTONS)
  most = photons / parts
  mean_HWC = image_HWC * most
  steps = math.ceil(most + 6 * math.sqrt(most) + 6)

  def draw(part: int) -> jax.Array:
    uniform_HWC = jax.random.uniform(jax.random.fold_in(key, part), image_HWC.shape)

    def climb(count: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      total_HWC, chance_HWC, below_HWC = state
      total_HWC += uniform_HWC >= below_HWC
      chance_HWC *= mean_HWC / (count + 1)
      return total_HWC, chance_HWC, below_HWC + chance_HWC

    none_HWC = jnp.exp(-mean_HWC)
    start = (0 * mean_HWC, none_HWC, none_HWC)
    return jax.lax.fori_loop(0, steps, climb, start)[0]

  return sum(draw(part) for part in range(parts)) / photons


def impulse_noise(image_HWC: jax.Array, key: jax.Array, amount: float) -> jax.Array:
  """Sets a share of the values, each channel's for itself, to 0 or 1 with even odds."""
  draw_HWC = jax.random.uniform(key, image_HWC.shape)
  salted_HWC = jnp.where(draw_HWC < amount, 1.0, image_HWC)
  return jnp.where(draw_HWC < amount / 2, 0.0, salted_HWC)


def speckle_noise(image_HWC: jax.Array, key: jax.Array, sigma: float) -> jax.Array:
  """Adds Gaussian noise in proportion to the value."""
  return image_HWC + sigma * image_HWC * jax.random.normal(key, image_HWC.shape)


def brightness(image_HWC: jax.Array, key: jax.Array, amount: float) -> jax.Array:
  """Adds to the value of HSV, cut at 1; hue and saturation stay, and so the channels' ratios."""
  del key
  value_HW1 = jnp.max(image_HWC, axis=-1, keepdims=True)
  brighter_HW1 = jnp.clip(value_HW1 + amount, 0, 1)
  ratio_HWC = image_HWC / jnp.where(value_HW1 > 0, value_HW1, 1)
  return jnp.where(value_HW1 > 0, ratio_HWC, 1) * brighter_HW1


def contrast(image_HWC: jax.Array, key: jax.Array, factor: float) -> jax.Array:
  """Shrinks each channel's distance from its mean."""
  del key
  mean_11C = jnp.mean(image_HWC, axis=(0, 1), keepdims=True)
  return factor * (image_HWC - mean_11C) + mean_11C


def saturate(image_HWC: jax.Array, key: jax.Array, factor: float, offset: float) -> jax.Array:
  """Scales and shifts the saturation of HSV, cut to [0, 1]; hue and value stay.

  Grey has the hue of red there, so that an offset tints it.
  """
  del key
  value_HW1 = jnp.max(image_HWC, axis=-1, keepdims=True)
  chroma_HW1 = value_HW1 - jnp.min(image_HWC, axis=-1, keepdims=True)
  grey_HW1 = chroma_HW1 == 0
  # How far each channel lies below the value, as a share of the chroma: the hue's part of HSV.
  share_HWC = (value_HW1 - image_HWC) / jnp.where(grey_HW1, 1, chroma_HW1)
  share_HWC = jnp.where(grey_HW1, jnp.asarray([0.0, 1.0, 1.0]), share_HWC)
  saturation_HW1 = chroma_HW1 / jnp.where(value_HW1 > 0, value_HW1, 1)
  saturation_HW1 = jnp.clip(factor * saturation_HW1 + offset, 0, 1)
  return value_HW1 * (1 - saturation_HW1 * share_HWC)


def _motion(image_HWC: jax.Array, key: jax.Array, radius: int, sigma: float) -> jax.Array:
  angle = jax.random.uniform(key, minval=-45.0, maxval=45.0)
  return blurs.motion(image_HWC, angle, radius, sigma)


def _keyless(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A function that draws nothing, in the form of the others."""
  return lambda image_HWC, key, *values: fn(image_HWC, *values)


def _each(*values: float) -> tuple[tuple[float], ...]:
  """Five severities of one parameter."""
  return tuple((value,) for value in values)


CORRUPTIONS: Mapping[str, Corruption] = types.MappingProxyType({
  'gaussian_noise': Corruption(
    'noise', gaussian_noise,
    large=_each(0.08, 0.12, 0.18, 0.26, 0.38),
    small=_each(0.04, 0.06, 0.08, 0.09, 0.10),
  ),
  'shot_noise': Corruption(
    'noise', shot_noise,
    large=_each(60, 25, 12, 5, 3),
    small=_each(500, 250, 100, 75, 50),
  ),
  'impulse_noise': Corruption(
    'noise', impulse_noise,
    large=_each(0.03, 0.06, 0.09, 0.17, 0.27),
    small=_each(0.01, 0.02, 0.03, 0.05, 0.07),
  ),
  'defocus_blur': Corruption(
    'blur', _keyless(blurs.defocus),  # radius, sigma of its rim
    large=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    small=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
  ),
  'glass_blur': Corruption(
    'blur', blurs.glass,  # sigma, reach, rounds
    large=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    small=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
  ),
  'motion_blur': Corruption(
    'blur', _motion,  # radius, sigma
    large=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    small=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
  ),
  'zoom_blur': Corruption(
    'blur', _keyless(blurs.zoom),  # below which factor, by what steps
    large=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    small=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
  ),
  'snow': Corruption(
    'weather', weather.snow,  # mean, deviation, size, threshold, radius, sigma, shade
    large=(
      (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
      (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
      (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    small=(
      (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
      (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
      (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
  ),
  'fog': Corruption(
    'weather', weather.fog,  # strength, decay
    large=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    small=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
  ),
  'brightness': Corruption(
    'weather', brightness,
    large=_each(0.1, 0.2, 0.3, 0.4, 0.5),
    small=_each(0.05, 0.1, 0.15, 0.2, 0.3),
  ),
  'contrast': Corruption(
    'digital', contrast,
    large=_each(0.4, 0.3, 0.2, 0.1, 0.05),
    small=_each(0.75, 0.5, 0.4, 0.3, 0.15),
  ),
  'elastic_transform': Corruption(
    'digital', digital.elastic,  # strength, sigma, corner; the reference's multiples of 244 and 32
    large=(
      (488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
      (29.28, 2.44, 4.88),
    ),
    small=((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
  ),
  'pixelate': Corruption(
    'digital', _keyless(digital.pixelate),
    large=_each(0.6, 0.5, 0.4, 0.3, 0.25),
    small=_each(0.95, 0.9, 0.85, 0.75, 0.65),
  ),
  'jpeg_compression': Corruption(
    'digital', _keyless(digital.jpeg),
    large=_each(25, 18, 15, 10, 7),
    small=_each(80, 65, 58, 50, 40),
  ),
  'speckle_noise': Corruption(
    'spare', speckle_noise,
    large=_each(0.15, 0.2, 0.35, 0.45, 0.6),
    small=_each(0.06, 0.1, 0.12, 0.16, 0.2),
  ),
  'gaussian_blur': Corruption(
    'spare', _keyless(blurs.gaussian),
    large=_each(1, 2, 3, 4, 6),
    small=_each(0.4, 0.6, 0.7, 0.8, 1),
  ),
  'saturate': Corruption(
    'spare', saturate,
    large=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    small=((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
  ),
})  # fmt: skip
