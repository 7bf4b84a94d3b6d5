"""The two-dimensional Fourier transform of real images, by FFT or as matrix products.

A TPU's strength is its matrix unit, and XLA's FFT there goes through memory many more times than the
transform needs. Written as products with the (small, constant) matrices of the discrete Fourier
transform, an image of 224 pixels takes 68 MFLOP a channel and transform, and a third of the bytes.

Shapes: B images, H rows, W columns, F = W // 2 + 1 columns of the half-spectrum, C channels.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from folk_jax.errors import UserError

Norm = Literal['backward', 'ortho']

BACKENDS = ('fft', 'matmul')

_HEIGHT_WIDTH = (1, 2)
# A TPU rounds the factors of a float32 product to bfloat16 otherwise: three digits of a spectrum.
_EXACT = lax.Precision.HIGHEST


def hermitian_weights(width: int) -> np.ndarray:
  """How many coefficients of the full spectrum each column of a half-spectrum stands for.

  Args:
    width: W, the image's number of columns.

  Returns:
    int32 [F]: 1 for the self-conjugate columns (0, and W / 2 where W is even), 2 for those between.
  """
  weights_F = np.full(width // 2 + 1, 2, np.int32)
  weights_F[self_conjugate_columns(width)] = 1
  return weights_F


def self_conjugate_columns(width: int) -> list[int]:
  """The columns of a half-spectrum that hold both coefficients of a conjugate pair."""
  return sorted({0, width // 2}) if width % 2 == 0 else [0]


def forward(image_BHWC: jax.Array, backend: str = 'fft', norm: Norm = 'backward') -> jax.Array:
  """`rfft2` over rows and columns.

  Args:
    image_BHWC: float32.
    backend: one of BACKENDS; they agree to float32's rounding.
    norm: as numpy's.

  Returns:
    complex64 [B, H, F, C].

  Raises:
    UserError: the back-end's name is unknown.
  """
  if _is_fft(backend):
    return jnp.fft.rfft2(image_BHWC, axes=_HEIGHT_WIDTH, norm=norm)
  _, height, width, _ = image_BHWC.shape
  columns = width // 2 + 1
  scale = (height * width) ** -0.5 if norm == 'ortho' else 1.0
  # e^{-i angle}: one product gives real and imaginary parts, side by side.
  cosine_WF, sine_WF = (table[:, :columns] for table in _tables(width))
  across_W2F = jnp.asarray(np.concatenate([cosine_WF, -sine_WF], axis=1) * scale, jnp.float32)
  half_BCH2F = jnp.einsum('bhwc,wf->bchf', image_BHWC, across_W2F, precision=_EXACT)
  real_BCHF, imaginary_BCHF = half_BCH2F[..., :columns], half_BCH2F[..., columns:]
  return _channels_last(*_down(real_BCHF, imaginary_BCHF, sign=-1))


def backward(
  spectrum_BHFC: jax.Array, width: int, backend: str = 'fft', norm: Norm = 'backward'
) -> jax.Array:
  """`irfft2`, the inverse of `forward`.

  Of the coefficients that ought to be real, the imaginary part is left out, as by `irfft2`.

  Args:
    spectrum_BHFC: complex64.
    width: W; F alone does not tell an even width from the odd one after it.
    backend: one of BACKENDS.
    norm: as numpy's.

  Returns:
    float32 [B, H, W, C].

  Raises:
    UserError: the back-end's name is unknown.
  """
  height = spectrum_BHFC.shape[1]
  if _is_fft(backend):
    return jnp.fft.irfft2(spectrum_BHFC, s=(height, width), axes=_HEIGHT_WIDTH, norm=norm)
  columns = width // 2 + 1
  scale = (height * width) ** (-0.5 if norm == 'ortho' else -1.0)
  spectrum_BCHF = jnp.moveaxis(spectrum_BHFC, -1, 1)
  real_BCHF, imaginary_BCHF = _down(spectrum_BCHF.real, spectrum_BCHF.imag, sign=1)
  # Re(z e^{i angle}), for the columns that stand for two twice. The sine is exactly zero where a
  # coefficient is its own conjugate.
  weights_F1 = scale * hermitian_weights(width)[:, None]
  cosine_FW, sine_FW = (weights_F1 * table[:columns] for table in _tables(width))
  across_2FW = jnp.asarray(np.concatenate([cosine_FW, -sine_FW]), jnp.float32)
  half_BCH2F = jnp.concatenate([real_BCHF, imaginary_BCHF], axis=-1)
  return jnp.einsum('bchf,fw->bhwc', half_BCH2F, across_2FW, precision=_EXACT)


def _is_fft(backend: str) -> bool:
  if backend not in BACKENDS:
    raise UserError(f'unknown spectral back-end {backend!r}. Known: {", ".join(BACKENDS)}.')
  return backend == 'fft'


def _tables(size: int) -> tuple[np.ndarray, np.ndarray]:
  """cos and sin of 2 pi jk / size, float64 [size, size]; exact at the quarter turns."""
  turn = np.outer(np.arange(size), np.arange(size)) % size
  angle = 2 * np.pi * turn / size
  cosine, sine = np.cos(angle), np.sin(angle)
  cosine[(4 * turn == size) | (4 * turn == 3 * size)] = 0
  sine[2 * turn % size == 0] = 0
  return cosine, sine


def _down(
  real_BCHF: jax.Array, imaginary_BCHF: jax.Array, sign: int
) -> tuple[jax.Array, jax.Array]:
  """The complex transform of the columns, by e^{sign i angle}; real and imaginary parts."""
  cosine_HH, sine_HH = (jnp.asarray(table, jnp.float32) for table in _tables(real_BCHF.shape[2]))

  def product(table_HH, part_BCHF):
    return jnp.einsum('gh,bchf->bcgf', table_HH, part_BCHF, precision=_EXACT)

  return (
    product(cosine_HH, real_BCHF) - sign * product(sine_HH, imaginary_BCHF),
    product(cosine_HH, imaginary_BCHF) + sign * product(sine_HH, real_BCHF),
  )


def _channels_last(real_BCHF: jax.Array, imaginary_BCHF: jax.Array) -> jax.Array:
  return jnp.moveaxis(lax.complex(real_BCHF, imaginary_BCHF), 1, -1)
