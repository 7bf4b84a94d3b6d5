"""Half-spectra, the informed filters Com and RCom, and the frequency distance.

Com and RCom are the filters of FOLK (arXiv 2409.10362): Com keeps the frequencies that are largest
in magnitude in that very image, RCom keeps the others. The frequency distance is that of MFM (arXiv
2206.07706).

A real image's spectrum is conjugate-symmetric, so half of it (`rfft2`) holds everything. Every sum
or count over the full spectrum is then a weighted one over the half: see `hermitian_weights`. A
mask on the half-spectrum that is symmetric in the self-conjugate columns stands for a
conjugate-symmetric mask on the full one, and filters a real image to a real image.

Spectra are float32 (complex64) whatever the model's dtype: half-precision FFTs gave MFM's users
NaN. Floating-point images of any width are cast; integer images are refused, because nothing says
whether they mean 0..1 or 0..255.

Shapes: B images, H rows, W columns, F = W // 2 + 1 columns of the half-spectrum, C channels.
"""

import functools
import math
from decimal import Decimal
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from folk_jax.errors import UserError
from folk_jax.signal import dft
from folk_jax.signal.dft import hermitian_weights, self_conjugate_columns

Ranking = Literal['shared', 'per_channel']

# MFM's constant under the square root; it keeps the gradient finite where a difference is zero.
_EPSILON = 1e-12
# A non-negative float32 read as an int32 keeps its order, and needs 31 bits.
_MAGNITUDE_BITS = 31


class Filtered(NamedTuple):
  """A filtered batch: the images, and which coefficients of their half-spectra were kept."""

  image_BHWC: jax.Array
  kept_BHFC: jax.Array


def coefficient_count(portion: float, height: int, width: int) -> int:
  """The number of coefficients that a portion of the full spectrum means: ceil(portion * H * W).

  In exact decimal arithmetic: 0.05 of 80 x 80 is 320 coefficients, where floats would give 321.

  Args:
    portion: share of the H * W coefficients, above 0 and below 1.
    height: H.
    width: W.

  Returns:
    k, from 1 to H * W.

  Raises:
    UserError: `portion` lies outside (0, 1).
  """
  if not 0 < portion < 1:
    raise UserError(
      f'a portion of the spectrum is {portion}: choose it above 0 and below 1, for instance 0.01'
    )
  return math.ceil(Decimal(str(portion)) * height * width)


def half_spectrum(image_BHWC: jax.Array, backend: str = 'fft') -> jax.Array:
  """The half-spectrum of each channel: `rfft2` over rows and columns, DC at [0, 0], unnormalised.

  Args:
    image_BHWC: floating point, any range; cast to float32.
    backend: one of `dft.BACKENDS`.

  Returns:
    complex64 [B, H, F, C].

  Raises:
    TypeError: the image does not hold floating-point numbers.
  """
  return dft.forward(_float32(image_BHWC), backend)


def inverse(spectrum_BHFC: jax.Array, width: int, backend: str = 'fft') -> jax.Array:
  """The inverse of `half_spectrum`.

  Args:
    spectrum_BHFC: complex64.
    width: W; F alone does not tell an even width from the odd one after it.
    backend: one of `dft.BACKENDS`.

  Returns:
    float32 [B, H, W, C].
  """
  _assert_spectrum(spectrum_BHFC, width)
  return dft.backward(spectrum_BHFC, width, backend)


def ranking_magnitude(
  spectrum_BHFC: jax.Array, width: int, ranking: Ranking = 'shared'
) -> jax.Array:
  """The magnitudes by which coefficients are ranked.

  |F(-y, -x)| = |F(y, x)| holds on paper only: in the columns that hold both coefficients of a pair,
  rounding breaks the tie and a threshold could keep one without the other. The two are averaged
  there.

  Args:
    spectrum_BHFC: complex64 half-spectrum of a real image.
    width: W.
    ranking: 'shared' sums |F| over channels, for one mask an image; 'per_channel' ranks each
      channel alone. Shared is our choice: the paper's abstract does not say.

  Returns:
    float32 [B, H, F, 1] if shared, [B, H, F, C] if per channel; exactly conjugate-symmetric.

  Raises:
    UserError: the ranking's name is unknown.
  """
  height = _assert_spectrum(spectrum_BHFC, width)
  magnitude_BHFC = jnp.abs(spectrum_BHFC)
  if ranking == 'shared':
    magnitude_BHFC = jnp.sum(magnitude_BHFC, axis=-1, keepdims=True)
  elif ranking != 'per_channel':
    raise UserError(f"ranking '{ranking}' is unknown: choose 'shared' or 'per_channel'")
  mirrored_row_H = -np.arange(height) % height
  for column in self_conjugate_columns(width):
    column_BHC = magnitude_BHFC[:, :, column]
    symmetric_BHC = 0.5 * (column_BHC + column_BHC[:, mirrored_row_H])
    magnitude_BHFC = magnitude_BHFC.at[:, :, column].set(symmetric_BHC)
  return magnitude_BHFC


def kth_largest(magnitude_BHFC: jax.Array, k_B: jax.Array, width: int) -> jax.Array:
  """The exact k-th largest magnitude of the full spectrum, for each image and mask channel.

  Bisects the bits of the float32 values, two in a pass: 16 passes, each of which counts the
  coefficients at or above three candidates. No sort, no collective, a traced k for each image.

  Args:
    magnitude_BHFC: float32, not negative, half-spectrum; C may be 1.
    k_B: int32, from 1 to H * W, counted in coefficients of the full spectrum.
    width: W.

  Returns:
    float32 [B, 1, 1, C], each a value that occurs in its magnitudes.
  """
  _assert_spectrum(magnitude_BHFC, width)
  chex.assert_type(magnitude_BHFC, jnp.float32)
  chex.assert_shape(k_B, magnitude_BHFC.shape[:1])
  batch, _, _, channels = magnitude_BHFC.shape
  # Every coefficient counts twice, and those of the self-conjugate columns once less. One long row
  # of numbers for each count: three to seven times faster on a CPU than weights on a short axis.
  bits_BCHF = jnp.moveaxis(lax.bitcast_convert_type(magnitude_BHFC, jnp.int32), -1, 1)
  single_BCN = bits_BCHF[..., self_conjugate_columns(width)].reshape(batch, channels, -1)
  bits_BCN = bits_BCHF.reshape(batch, channels, -1)
  k_B1 = k_B.astype(jnp.int32)[:, None]

  def settle(settled_BC: jax.Array, shift: jax.Array | int, candidates: int) -> jax.Array:
    # The candidates grow and their counts fall, so as many as reach k are reached one by one.
    candidates_BC = [settled_BC + (jnp.int32(i) << shift) for i in range(1, candidates + 1)]
    doubles = _counts_at_or_above(bits_BCN, candidates_BC)
    singles = _counts_at_or_above(single_BCN, candidates_BC)
    reached_BC = sum(
      (2 * double_BC - single_BC >= k_B1).astype(jnp.int32)
      for double_BC, single_BC in zip(doubles, singles, strict=True)
    )
    return settled_BC + (reached_BC << shift)

  # Zeros made from the inputs, so that inside shard_map the carry varies over the mesh as they do.
  zeros_BC = (bits_BCN[..., 0] ^ k_B1) & 0
  top_bit = _MAGNITUDE_BITS - 1

  def settle_two_bits(step: jax.Array, settled_BC: jax.Array) -> jax.Array:
    return settle(settled_BC, top_bit - 2 * (step + 1), 3)

  settled_BC = settle(zeros_BC, top_bit, 1)
  settled_BC = lax.fori_loop(0, top_bit // 2, settle_two_bits, settled_BC)
  return lax.bitcast_convert_type(settled_BC, jnp.float32)[:, None, None]


def top_mask(magnitude_BHFC: jax.Array, k_B: jax.Array, width: int) -> jax.Array:
  """True on the k coefficients of largest magnitude, and on those that tie with the last of them.

  Conjugate pairs tie, so k or k + 1 coefficients of the full spectrum are true, and more only where
  the image has further ties. Arguments as in `kth_largest`.

  Returns:
    bool [B, H, F, C].
  """
  return magnitude_BHFC >= kth_largest(magnitude_BHFC, k_B, width)


def draw_filters(
  keys_B: jax.Array,
  portions: tuple[float, ...],
  com_probability: float,
  height: int,
  width: int,
) -> tuple[jax.Array, jax.Array]:
  """Draws each image's filter: its portion uniformly from the list, and Com or RCom.

  Args:
    keys_B: typed PRNG keys, one an image.
    portions: the pre-set list of the paper, for instance (0.005, 0.01, 0.05).
    com_probability: P(Com), from 0 to 1.
    height: H.
    width: W.

  Returns:
    k_B, int32: how many coefficients of the full spectrum are prominent; com_B, bool: True keeps
    them, False the rest.

  Raises:
    UserError: no portion, a portion outside (0, 1), or a probability outside [0, 1].
  """
  if not portions:
    raise UserError('the list of portions is empty: give at least one, for instance (0.01,)')
  if not 0 <= com_probability <= 1:
    raise UserError(f'com_probability is {com_probability}: choose it from 0 to 1')
  counts_P = np.asarray([coefficient_count(p, height, width) for p in portions], np.int32)

  def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    portion_key, kind_key = jax.random.split(key)
    k = jnp.asarray(counts_P)[jax.random.randint(portion_key, (), 0, len(portions))]
    return k, jax.random.bernoulli(kind_key, float(com_probability))

  return jax.vmap(draw)(keys_B)


def filter_images(
  image_BHWC: jax.Array,
  k_B: jax.Array,
  com_B: jax.Array,
  ranking: Ranking = 'shared',
  clamp: bool = False,
  backend: str = 'fft',
) -> Filtered:
  """Com or RCom of each image (arXiv 2409.10362).

  On a mesh, call it through `shard.over_batch`.

  Args:
    image_BHWC: floating point in [0, 1], before mean and deviation are taken out.
    k_B: int32, how many coefficients of the full spectrum count as prominent.
    com_B: bool; True (Com) keeps the prominent coefficients, False (RCom) all others.
    ranking: 'shared' or 'per_channel', see `ranking_magnitude`.
    clamp: cuts the images to [0, 1], as MFM's code does. RCom's images are signed: a clamp zeroes
      half their pixels.
    backend: one of `dft.BACKENDS`.

  Returns:
    Filtered: float32 images, without clamp such that Com + RCom = image; and the bool mask of the
      kept coefficients,
    [B, H, F, 1] if shared, [B, H, F, C] if per channel.

  Raises:
    TypeError: the image does not hold floating-point numbers.
    UserError: the ranking's name is unknown.
  """
  chex.assert_shape((k_B, com_B), image_BHWC.shape[:1])
  width = image_BHWC.shape[2]
  spectrum_BHFC = half_spectrum(image_BHWC, backend)
  magnitude_BHFC = ranking_magnitude(spectrum_BHFC, width, ranking)
  kept_BHFC = top_mask(magnitude_BHFC, k_B, width) == com_B[:, None, None, None]
  filtered_BHWC = inverse(jnp.where(kept_BHFC, spectrum_BHFC, 0), width, backend)
  if clamp:
    filtered_BHWC = jnp.clip(filtered_BHWC, 0, 1)
  return Filtered(filtered_BHWC, kept_BHFC)


def frequency_distance(
  prediction_BHWC: jax.Array,
  target_BHWC: jax.Array,
  masked_BHFC: jax.Array,
  gamma: float = 1.0,
  backend: str = 'fft',
) -> tuple[jax.Array, jax.Array]:
  """MFM's frequency distance (arXiv 2206.07706, section 3.3) as a sum and a count for each image.

  The sum runs over the masked coefficients of the full, orthonormal spectrum and all channels of
  (|F(prediction) - F(target)|^2 + 1e-12) ** (gamma / 2). The quotient of the two sums over a batch
  is MFM's pooled loss; the mean of the quotients is the loss per image.

  On a mesh, call it through `shard.over_batch`. The gradient with respect to prediction and target
  is one inverse transform.

  Args:
    prediction_BHWC: floating point; cast to float32.
    target_BHWC: the same shape.
    masked_BHFC: bool, True where the loss is taken, that is where the filter did NOT keep; its C
      may be 1.
    gamma: exponent, above 0.
    backend: one of `dft.BACKENDS`.

  Returns:
    sum_B, count_B: float32. The count is of terms: masked coefficients times channels.

  Raises:
    TypeError: an image does not hold floating-point numbers.
    UserError: gamma is not above 0.
  """
  if not gamma > 0:
    raise UserError(f'gamma of the frequency distance is {gamma}: choose it above 0')
  chex.assert_equal_shape((prediction_BHWC, target_BHWC))
  width, channels = prediction_BHWC.shape[2:]
  _assert_spectrum(masked_BHFC, width)
  chex.assert_shape(masked_BHFC, (*prediction_BHWC.shape[:2], None, {1, channels}))
  chex.assert_type(masked_BHFC, bool)
  difference_BHWC = _float32(prediction_BHWC) - _float32(target_BHWC)
  sum_B = _masked_power(difference_BHWC, masked_BHFC, float(gamma), width, backend)
  weights_F1 = hermitian_weights(width)[:, None].astype(np.float32)
  count_B = jnp.sum(jnp.where(masked_BHFC, weights_F1, 0), axis=(1, 2, 3))
  return sum_B, count_B * (channels // masked_BHFC.shape[-1])


# Autodiff through rfft2 would pad the half-spectrum with zeros and run a full complex FFT.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _masked_power(
  difference_BHWC: jax.Array, masked_BHFC: jax.Array, gamma: float, width: int, backend: str
) -> jax.Array:
  return _masked_power_forward(difference_BHWC, masked_BHFC, gamma, width, backend)[0]


def _masked_power_forward(difference_BHWC, masked_BHFC, gamma, width, backend):
  spectrum_BHFC = dft.forward(difference_BHWC, backend, norm='ortho')
  power_BHFC = _squared_modulus(spectrum_BHFC) + _EPSILON
  distance_BHFC = jnp.sqrt(power_BHFC) if gamma == 1 else power_BHFC ** (gamma / 2)
  weights_F1 = hermitian_weights(width)[:, None].astype(np.float32)
  sum_B = jnp.sum(jnp.where(masked_BHFC, distance_BHFC * weights_F1, 0), axis=(1, 2, 3))
  return sum_B, (spectrum_BHFC, masked_BHFC)


def _masked_power_backward(gamma, width, backend, residuals, sum_cotangent_B):
  spectrum_BHFC, masked_BHFC = residuals
  power_BHFC = _squared_modulus(spectrum_BHFC) + _EPSILON
  slope_BHFC = gamma * (lax.rsqrt(power_BHFC) if gamma == 1 else power_BHFC ** (gamma / 2 - 1))
  # d(sum)/d(image) is the inverse transform of slope * F over the full spectrum. It supplies
  # the conjugate half, which is the weight 2, and in the self-conjugate columns takes the real
  # part, which is the weight 1.
  scale_BHFC = jnp.where(masked_BHFC, slope_BHFC, 0) * sum_cotangent_B[:, None, None, None]
  return dft.backward(spectrum_BHFC * scale_BHFC, width, backend, norm='ortho'), None


_masked_power.defvjp(_masked_power_forward, _masked_power_backward)


def _counts_at_or_above(bits_BCN: jax.Array, candidates_BC: list[jax.Array]) -> list[jax.Array]:
  """How many of N reach each candidate; all counts in one pass over memory."""
  ones = [(bits_BCN >= candidate[..., None]).astype(jnp.int32) for candidate in candidates_BC]
  zeros = [jnp.int32(0)] * len(ones)

  def add(lefts, rights):
    return [left + right for left, right in zip(lefts, rights, strict=True)]

  return lax.reduce(ones, zeros, add, dimensions=(2,))


def _squared_modulus(spectrum: jax.Array) -> jax.Array:
  return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _assert_spectrum(array_BHFC: jax.Array, width: int) -> int:
  """Checks rank and number of columns; returns H."""
  chex.assert_rank(array_BHFC, 4)
  chex.assert_axis_dimension(array_BHFC, 2, width // 2 + 1)
  return array_BHFC.shape[1]


def _float32(image_BHWC: jax.Array) -> jax.Array:
  chex.assert_rank(image_BHWC, 4)
  if not jnp.issubdtype(image_BHWC.dtype, jnp.floating):
    raise TypeError(
      f'the image holds {image_BHWC.dtype}, expected floating point: convert it, uint8 by / 255'
    )
  return image_BHWC.astype(jnp.float32)
