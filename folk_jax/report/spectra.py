"""What a filter leaves of an image: its mask on the full spectrum, how many coefficients, how much energy.

Shape letters: B images, H rows, W columns, F = W // 2 + 1 columns of the half-spectrum, C channels, M mask channels.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from folk_jax.signal import fourier
from folk_jax.signal.dft import hermitian_weights
from folk_jax.signal.filters import FILTERS, Filter

# What filters call the two things that they do with the coefficients they select, if not 'kept' and 'removed'.
_WORDS = {
  'com_rcom': ('Com', 'RCom'),
  'com': ('Com', ''),
  'rcom': ('', 'RCom'),
  'radial': ('low-pass', 'high-pass'),
  'low_pass': ('low-pass', ''),
  'high_pass': ('', 'high-pass'),
}


@dataclasses.dataclass(frozen=True)
class Left:
  """One image under one filter.

  Attributes:
    name: of what was done, such as 'Com 1 %'.
    filter: the filter's name.
    portion: share of the coefficients that was selected; None where a radius says it.
    keep: whether the selected set was kept, or removed.
    image_HWC: float32, what is left; without clamp signed where the mean was removed.
    kept_HWM: bool, full and shifted; all False for wavelet filters, whose sets are of other coefficients.
    fourier: whether the mask says what was kept.
    coefficients: how many are kept, on average over mask channels; of the wavelet transform for wavelet filters.
    energy: share of the spectral energy, in [0, 1] without clamp.
    energy_without_mean: the same of all but the coefficient at frequency 0; 0 for a constant image.
  """

  name: str
  filter: str
  portion: float | None
  keep: bool
  image_HWC: np.ndarray
  kept_HWM: np.ndarray
  fourier: bool
  coefficients: float
  energy: float
  energy_without_mean: float


def under_filter(image_HWC: np.ndarray, settings: Filter, seed: int = 0) -> Iterator[Left]:
  """An image under a filter at each of its portions, kept and removed, as far as the filter does either.

  Args:
    image_HWC: float32 in [0, 1].
    settings: of the filter; its portions are taken one by one, its `com_probability` is not looked at.
    seed: of what a random filter draws.

  Yields:
    For each portion what is left where the selected set is kept, then where it is removed.
  """
  kind = FILTERS[settings.name]
  by_portion = kind.sized_by == 'portions'
  for portion in settings.portions if by_portion else (None,):
    for keep in (True, False):
      if kind.keep is not None and kind.keep is not keep:
        continue
      one = dataclasses.replace(
        settings,
        portions=(portion,) if by_portion else settings.portions,
        com_probability=float(keep),
      )
      found = one(image_HWC[None], jax.random.split(jax.random.key(seed), 1))
      yield _left(named(one, keep), one, keep, image_HWC, *map(np.asarray, found))


def named(settings: Filter, keep: bool) -> str:
  """What a filter at its first portion is called where it keeps, or removes, what it selects: 'Com 1 %'."""
  word = _WORDS.get(settings.name, ('kept', 'removed'))[not keep]
  by_portion = FILTERS[settings.name].sized_by == 'portions'
  return f'{word} {settings.portions[0] * 100:g} %' if by_portion else word


def is_fourier(name: str) -> bool:
  """Whether a filter selects Fourier coefficients, so that its mask says which: all but the wavelets' do."""
  return not name.startswith('wavelet')


def _left(name, settings, keep, image_HWC, filtered_BHWC, kept_BHFM) -> Left:
  height, width = image_HWC.shape[:2]
  portion = settings.portions[0] if FILTERS[settings.name].sized_by == 'portions' else None
  if is_fourier(settings.name):
    coefficients = count(kept_BHFM[0], width)
  else:
    selected = fourier.coefficient_count(portion, height, width)
    coefficients = selected if keep else height * width - selected
  energy, without_mean = energies(filtered_BHWC[0], image_HWC)
  return Left(
    name=name,
    filter=settings.name,
    portion=portion,
    keep=keep,
    image_HWC=filtered_BHWC[0],
    kept_HWM=full_mask(kept_BHFM[0], width),
    fourier=is_fourier(settings.name),
    coefficients=coefficients,
    energy=energy,
    energy_without_mean=without_mean,
  )


def full_mask(half_HFM: np.ndarray, width: int) -> np.ndarray:
  """A mask of the half-spectrum on the full one, the lowest frequency in the middle: bool [H, W, M]."""
  height = half_HFM.shape[0]
  rows_H, columns = -np.arange(height) % height, width - np.arange(half_HFM.shape[1], width)
  mirrored = half_HFM[rows_H][:, columns]
  return np.fft.fftshift(np.concatenate([half_HFM, mirrored], axis=1), axes=(0, 1))


def count(half_HFM: np.ndarray, width: int) -> float:
  """How many coefficients of the full spectrum a mask of the half-spectrum holds, on average over mask channels."""
  return float((half_HFM * hermitian_weights(width)[:, None]).sum((0, 1)).mean())


def energies(filtered_HWC: np.ndarray, image_HWC: np.ndarray) -> tuple[float, float]:
  """The share of an image's spectral energy, the sum of |F|^2 over channels, that a filtered one has; then without
  the coefficient at frequency 0, which is the mean, of either.

  0 where the image has no such energy.
  """

  def split(pixels_HWC: np.ndarray) -> tuple[float, float]:
    spectrum_HWC = np.fft.fft2(pixels_HWC.astype(np.float64), axes=(0, 1))
    total = np.square(np.abs(spectrum_HWC)).sum()
    return total, total - np.square(np.abs(spectrum_HWC[0, 0])).sum()

  # A constant image's energy beside its mean is rounding.
  floor = 1e-12 * max(split(image_HWC)[0], 1e-300)
  return tuple(
    float(left / whole) if whole > floor else 0.0
    for left, whole in zip(split(filtered_HWC), split(image_HWC), strict=True)
  )
