"""Frequency filters by name, informed and uninformed, behind one interface.

Every filter selects a set of each image's coefficients and either keeps that set alone or removes
it. Com and RCom (arXiv 2409.10362) select the strongest coefficients of that very image, MFM
(arXiv 2206.07706) a disk around the lowest frequency; the others are what they are to be compared
with. FILTERS lists them and says which look at the image. All but the wavelets' select Fourier
coefficients, on half-spectra (see `fourier`) and with the two of a conjugate pair always together,
so that a filtered image is real.

A filter draws its portion, keep or remove, and whatever else it leaves to chance from the image's
own key. With one key each, 'com_rcom', 'random' and the rest draw the same portion.

Shapes: B images, H rows, W columns, F = W // 2 + 1 columns of the half-spectrum, C channels; M mask
channels, which is 1 if the ranking is shared and C if it is per channel.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError
from folk_jax.signal import bands, fourier

# MFM's radius is given for images of this side.
_REFERENCE_SIDE = 224
# draw_filters splits a key in two, which is to fold it with 0 and 1.
_SELECTION = 2
_RANKINGS = ('shared', 'per_channel')


@dataclasses.dataclass(frozen=True)
class Filter:
  """One frequency filter and its settings; the errors call them as fields of `config.objective`.

  Attributes:
    name: a key of FILTERS.
    portions: shares of the H * W coefficients that are selected, each above 0 and below 1; one is
      drawn for each image. Those filters that a radius sizes do without.
    com_probability: P(the selected set is kept), from 0 to 1; otherwise it is removed. For 'radial'
      that is P(low-pass): 0.5 for MFM's ViT, 0.3 for its ResNet-50. Filters whose name says which
      ('com', 'rcom', 'low_pass', 'high_pass') don't use it.
    ranking: 'shared', one selection for all channels, or 'per_channel', one for each: ranked by
      that channel alone, or drawn for it alone.
    radius: of the radial filters, at 224 pixels: they scale it by min(H, W) / 224, so that the disk
      holds the same share of the spectrum at any size. Above 0; the others don't use it.
    clamp: cuts filtered images to [0, 1]. Without the low frequencies an image is signed, and the
      cut zeroes half its pixels.
    backend: of the transform, one of `dft.BACKENDS`.

  Raises:
    UserError: on construction, for a field outside these ranges.
  """

  name: str
  portions: tuple[float, ...]
  com_probability: float
  ranking: str
  radius: float
  clamp: bool
  backend: str = 'fft'

  def __post_init__(self):
    if self.name not in FILTERS:
      near = difflib.get_close_matches(str(self.name), FILTERS, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise UserError(
        f'unknown config.objective.filter {self.name!r}.{hint} Known: {", ".join(sorted(FILTERS))}.'
      )
    needed = FILTERS[self.name].sized_by == 'portions' and not self.portions
    if needed or any(not 0 < portion < 1 for portion in self.portions):
      raise UserError(
        f'config.objective.portions {self.portions} must be numbers between 0 and 1, at least one.'
      )
    if not 0 <= self.com_probability <= 1:
      raise UserError(
        f'config.objective.com_probability {self.com_probability} must be between 0 and 1.'
      )
    if self.ranking not in _RANKINGS:
      raise UserError(
        f'unknown config.objective.ranking {self.ranking!r}. Known: {", ".join(_RANKINGS)}.'
      )
    if not self.radius > 0:
      raise UserError(f'config.objective.radius {self.radius} must be positive.')

  def __call__(self, image_BHWC: jax.Array, keys_B: jax.Array) -> fourier.Filtered:
    """Filters each image by what its key draws.

    On a mesh, call it through `shard.over_batch`.

    Args:
      image_BHWC: floating point in [0, 1], before mean and deviation are taken out.
      keys_B: typed PRNG keys, one an image.

    Returns:
      Filtered: float32 images, which without clamp are the image where what was kept and what was
      removed are added up; and the bool mask of the kept Fourier coefficients, [B, H, F, M], or
      [B, H, F, 1] where it is the same for all channels whatever the ranking. It is false all over
      for the wavelets' filters, which change every Fourier coefficient.

    Raises:
      TypeError: the image does not hold floating-point numbers.
      UserError: a wavelet filter is given an image with a side of one pixel.
    """
    chex.assert_rank(image_BHWC, 4)
    chex.assert_shape(keys_B, image_BHWC.shape[:1])
    kind = FILTERS[self.name]
    # Without portions the filter doesn't look at k, and any portion will do.
    k_B, keep_B = fourier.draw_filters(
      keys_B,
      self.portions or (0.5,),
      self.com_probability if kind.keep is None else float(kind.keep),
      *image_BHWC.shape[1:3],
    )
    selection_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, _SELECTION))(keys_B)
    filtered = kind.apply(self, image_BHWC, k_B, keep_B, selection_keys_B)
    if self.clamp:
      filtered = filtered._replace(image_BHWC=jnp.clip(filtered.image_BHWC, 0, 1))
    return filtered


# (settings, image_BHWC, k_B, keep_B, keys_B) to what `Filter` returns, before the clamp.
Apply = Callable[[Filter, jax.Array, jax.Array, jax.Array, jax.Array], fourier.Filtered]
# (settings, spectrum_BHFC, k_B, keys_B, width) to the selected coefficients, bool, to be broadcast
# to [B, H, F, M].
Select = Callable[[Filter, jax.Array, jax.Array, jax.Array, int], jax.Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
  """An entry of FILTERS.

  Attributes:
    apply: selects, keeps or removes, and transforms back.
    informed: whether the selection depends on the image.
    keep: True or False where the filter always keeps or always removes what it selects.
    sized_by: the field of `Filter` that says how much is selected.
  """

  apply: Apply
  informed: bool
  keep: bool | None = None
  sized_by: str = 'portions'


def _fourier(select: Select) -> Apply:
  """The filter that keeps or removes what `select` selects of the half-spectrum."""

  def apply(settings, image_BHWC, k_B, keep_B, keys_B):
    width = image_BHWC.shape[2]
    spectrum_BHFC = fourier.half_spectrum(image_BHWC, settings.backend)
    selected_BHFM = select(settings, spectrum_BHFC, k_B, keys_B, width)
    kept_BHFM = selected_BHFM == keep_B[:, None, None, None]
    filtered_BHFC = jnp.where(kept_BHFM, spectrum_BHFC, 0)
    return fourier.Filtered(fourier.inverse(filtered_BHFC, width, settings.backend), kept_BHFM)

  return apply


def _strongest(settings, spectrum_BHFC, k_B, keys_B, width):
  """The k largest in magnitude: `fourier.filter_images` to the bit. k or k + 1, and ties."""
  del keys_B
  magnitude_BHFM = fourier.ranking_magnitude(spectrum_BHFC, width, settings.ranking)
  return fourier.top_mask(magnitude_BHFM, k_B, width)


def _disk(settings, spectrum_BHFC, k_B, keys_B, width):
  """MFM's disk, the same for every image and channel."""
  del k_B, keys_B
  height = spectrum_BHFC.shape[1]
  radius = settings.radius * min(height, width) / _REFERENCE_SIDE
  return (squared_radius(height, width) < radius * radius)[None, :, :, None]


def _uniform(settings, spectrum_BHFC, k_B, keys_B, width):
  """k coefficients, each as likely as any other. k or k + 1."""
  waiting_BHFM = _waiting_times(settings, spectrum_BHFC, keys_B, width)
  return fourier.top_mask(1 / waiting_BHFM, k_B, width)


def _weighted(settings, spectrum_BHFC, k_B, keys_B, width):
  """k coefficients without replacement, drawn by magnitude. k or k + 1, and ties.

  A conjugate pair is one lot, as likely to be drawn as a self-conjugate coefficient of the same
  magnitude. The lots whose exponential waiting times at rate |F| end first are such a sample
  (Efraimidis and Spirakis, Information Processing Letters 97(5), 2006; the Gumbel top-k trick).
  """
  magnitude_BHFM = fourier.ranking_magnitude(spectrum_BHFC, width, settings.ranking)
  waiting_BHFM = _waiting_times(settings, spectrum_BHFC, keys_B, width)
  return fourier.top_mask(magnitude_BHFM / waiting_BHFM, k_B, width)


def _block(settings, spectrum_BHFC, k_B, keys_B, width):
  """A square block of the shifted spectrum, anywhere in it, with its mirror image.

  The block grows by one row or column at a time, its mirror image with it, until the two cover k:
  at most k + 2 sqrt(k) + 1. What grows over an edge comes in at the opposite one.
  """
  height = spectrum_BHFC.shape[1]
  rows_H, columns_F = _frequencies(height, width)
  channels = _mask_channels(settings, spectrum_BHFC)

  def distance(key: jax.Array) -> jax.Array:
    """Of each coefficient from the nearer block's centre, int32 [H, F, M]."""
    row_key, column_key = jax.random.split(key)
    row_M = jax.random.randint(row_key, (channels,), 0, height)
    column_M = jax.random.randint(column_key, (channels,), 0, width)
    # In eighths, and off the lattice by 1 and 3 of them: no two sides are reached at once.
    return jnp.minimum(
      *(
        jnp.maximum(
          _around(rows_H, sign * (8 * row_M + 1), height)[:, None],
          _around(columns_F, sign * (8 * column_M + 3), width)[None],
        )
        for sign in (1, -1)
      )
    )

  nearness_BHFM = 8 * (height + width) - jax.vmap(distance)(keys_B)
  # Whole numbers far below 2 ** 24 stay what they are.
  return fourier.top_mask(nearness_BHFM.astype(jnp.float32), k_B, width)


def _band(settings, spectrum_BHFC, k_B, keys_B, width):
  """A band of radii: the ranks from u to u + k by distance from the lowest frequency. k to k + 2.

  u is uniform. Coefficients of one radius rank in a fixed order, so that the count is kept.
  """
  height = spectrum_BHFC.shape[1]
  first_HF, end_HF = _radial_ranks(height, width)
  channels = _mask_channels(settings, spectrum_BHFC)

  def band(key: jax.Array, k: jax.Array) -> jax.Array:
    start_M = jax.random.randint(key, (channels,), 0, height * width - k + 1)
    return (end_HF[..., None] > start_M) & (first_HF[..., None] < start_M + k)

  return jax.vmap(band)(keys_B, k_B)


def _gabor(settings, spectrum_BHFC, k_B, keys_B, width):
  """The Gabor bands of largest mean magnitude; of the last one the strongest. k or k + 1, and ties."""
  del keys_B
  magnitude_BHFM = fourier.ranking_magnitude(spectrum_BHFC, width, settings.ranking)
  partition = bands.gabor_bands(spectrum_BHFC.shape[1], width)
  score_BKM = bands.means(partition, magnitude_BHFM, width)
  return bands.cover(partition, score_BKM, magnitude_BHFM, k_B, width)


def _gabor_random(settings, spectrum_BHFC, k_B, keys_B, width):
  """Gabor bands in random order, of the last one random coefficients. k or k + 1."""
  strength_keys_B, score_keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
  waiting_BHFM = _waiting_times(settings, spectrum_BHFC, strength_keys_B, width)
  partition = bands.gabor_bands(spectrum_BHFC.shape[1], width)
  channels = _mask_channels(settings, spectrum_BHFC)
  score_BKM = bands.waiting_times(score_keys_B, (partition.sizes_K.size, channels))
  return bands.cover(partition, score_BKM, 1 / waiting_BHFM, k_B, width)


def _wavelet(settings, image_BHWC, k_B, keep_B, keys_B):
  """Haar sub-bands by their energy a coefficient; of the last one the strongest. k, and ties."""
  del keys_B
  return _of_wavelets(settings, image_BHWC, k_B, keep_B, None)


def _wavelet_random(settings, image_BHWC, k_B, keep_B, keys_B):
  """Haar sub-bands in random order, of the last one random coefficients. k."""
  return _of_wavelets(settings, image_BHWC, k_B, keep_B, keys_B)


def _of_wavelets(settings, image_BHWC, k_B, keep_B, keys_B):
  filtered_BHWC = bands.wavelet_filter(image_BHWC, k_B, keep_B, settings.ranking, keys_B)
  batch, height, width, _ = image_BHWC.shape
  return fourier.Filtered(filtered_BHWC, jnp.zeros((batch, height, width // 2 + 1, 1), bool))


def squared_radius(height: int, width: int) -> np.ndarray:
  """Squared distance from the lowest frequency, in coefficients: int64 [H, F].

  MFM's (x - W // 2) ** 2 + (y - H // 2) ** 2 of the shifted spectrum, at the half-spectrum's places.
  """
  rows_H, columns_F = _frequencies(height, width)
  return rows_H[:, None] ** 2 + columns_F**2


def _frequencies(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """The half-spectrum's frequencies in cycles an image: int64 [H], from -(H // 2), and [F]."""
  rows_H = np.arange(height)
  return np.where(rows_H < -(-height // 2), rows_H, rows_H - height), np.arange(width // 2 + 1)


def _radial_ranks(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Each pair's first rank by radius in the full spectrum, and the one after its last: [H, F]."""
  lots_HF = bands.symmetric(np.arange(height * (width // 2 + 1)).reshape(height, -1, 1), width)
  lots_N, places_N, count_N = np.unique(lots_HF, return_inverse=True, return_counts=True)
  # Two of a half-spectrum, or one that stands for two.
  columns_N = lots_N % (width // 2 + 1)
  count_N = np.maximum(count_N, fourier.hermitian_weights(width)[columns_N])
  order_N = np.argsort(squared_radius(height, width).reshape(-1)[lots_N], kind='stable')
  end_N = np.empty_like(count_N)
  end_N[order_N] = np.cumsum(count_N[order_N])
  shape = height, width // 2 + 1
  first_N = end_N - count_N
  return tuple(rank_N[places_N].reshape(shape).astype(np.int32) for rank_N in (first_N, end_N))


def _around(frequencies_N: np.ndarray, centre_M: jax.Array, size: int) -> jax.Array:
  """The distance in eighths, the shorter way around the spectrum: int32 [N, M]."""
  distance_NM = jnp.abs(8 * frequencies_N[:, None] - centre_M) % (8 * size)
  return jnp.minimum(distance_NM, 8 * size - distance_NM)


def _mask_channels(settings: Filter, spectrum_BHFC: jax.Array) -> int:
  return 1 if settings.ranking == 'shared' else spectrum_BHFC.shape[-1]


def _waiting_times(
  settings: Filter, spectrum_BHFC: jax.Array, keys_B: jax.Array, width: int
) -> jax.Array:
  """Exponential waiting times, equal for the two of a conjugate pair: float32 [B, H, F, M]."""
  shape = *spectrum_BHFC.shape[1:3], _mask_channels(settings, spectrum_BHFC)
  return bands.symmetric(bands.waiting_times(keys_B, shape), width)


FILTERS: Mapping[str, Kind] = types.MappingProxyType({
  'com_rcom': Kind(_fourier(_strongest), informed=True),
  'com': Kind(_fourier(_strongest), informed=True, keep=True),
  'rcom': Kind(_fourier(_strongest), informed=True, keep=False),
  'magnitude_weighted': Kind(_fourier(_weighted), informed=True),
  'gabor': Kind(_fourier(_gabor), informed=True),
  'wavelet': Kind(_wavelet, informed=True),
  'radial': Kind(_fourier(_disk), informed=False, sized_by='radius'),
  'low_pass': Kind(_fourier(_disk), informed=False, keep=True, sized_by='radius'),
  'high_pass': Kind(_fourier(_disk), informed=False, keep=False, sized_by='radius'),
  'random': Kind(_fourier(_uniform), informed=False),
  'random_block': Kind(_fourier(_block), informed=False),
  'random_band': Kind(_fourier(_band), informed=False),
  'gabor_random': Kind(_fourier(_gabor_random), informed=False),
  'wavelet_random': Kind(_wavelet_random, informed=False),
})  # fmt: skip
