"""Random images with the 1/f spectrum of photographs, for benchmarks: no files, no decoding, hardly
any time.
"""

import functools

import numpy as np

from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source

_TEXTURES = 16
_COUNT = {'train': 10_000, 'test': 1_000}


@functools.cache
def _textures(side: int) -> np.ndarray:
  """Draws the textures that every sample is cut from, uint8 [16, side, side, 3]; once a process."""
  rng = np.random.default_rng(0)
  frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
  frequency[0, 0] = np.inf  # no mean: it is added below
  shape = (_TEXTURES, side, frequency.shape[1], 3)
  noise = rng.normal(size=shape) + 1j * rng.normal(size=shape)
  image = np.fft.irfft2(noise / frequency[None, :, :, None], s=(side, side), axes=(1, 2))
  image *= 0.2 / image.std(axis=(1, 2, 3), keepdims=True)
  image += rng.uniform(0.35, 0.65, size=(_TEXTURES, 1, 1, 3))
  return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


class SyntheticSource(Source):
  """Cyclic shifts of sixteen 1/f textures; the label is the texture's number. Sample i is the same
  in every run.
  """

  class_names = tuple(f'texture {i}' for i in range(_TEXTURES))

  def __init__(self, settings: DataSettings, split: str):
    self._split = split
    self._side = settings.short_side

  def __len__(self) -> int:
    return _COUNT[self._split]

  def read(self, index: int) -> tuple[np.ndarray, int]:
    label = index % _TEXTURES
    rng = np.random.default_rng((len(self), index))
    shift = tuple(rng.integers(0, self._side, size=2))
    return np.roll(_textures(self._side)[label], shift, axis=(0, 1)), label

  def label(self, index: int) -> int:
    return index % _TEXTURES

  def labels(self, indices: np.ndarray) -> np.ndarray:
    return np.asarray(indices) % _TEXTURES

  def name(self, index: int) -> str:
    return f'synthetic {self._split} {index}'
