"""What a method hides from its student, and what the student puts there.

Shape letters: N images, H, W pixels, F = W // 2 + 1 columns of the half-spectrum, C channels, M mask channels, P patch,
h, w patches a side, T patches, S visible ones, K values of a patch, L levels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax import models
from folk_jax.models.vit import to_patches
from folk_jax.report.networks import Network
from folk_jax.report.spectra import is_fourier, named
from folk_jax.signal import degrade, fourier, patch_masks, wavelet
from folk_jax.signal.augment import normalise
from folk_jax.signal.filters import FILTERS, Filter

_EPSILON = 1e-6  # Beside variances, as in the objectives.

_OWN_MEAN = (
  'A hidden patch is judged by its own mean and contrast, so that it is shown with those of the original: only what '
  "varies inside a patch is the student's."
)
_OWN_LEVELS = (
  'Each level of coefficients, the coarsest among them, is judged by its own mean and deviation, so that it is shown '
  "with those of the original: an image's mean and contrast are not the student's."
)


@dataclasses.dataclass(frozen=True)
class Rebuilt:
  """Images and what became of them, float32 in [0, 1] but for what is signed.

  Attributes:
    what: what was done to the image, in words.
    seen_NHWC: what the student was given.
    rebuilt_NHWC: what it was given, or the original's share of it, with the student's answer in place of the rest.
    target_NHWC, answer_NHWC: where coefficients were removed: those alone, of the original and of the answer.
    bands: where wavelet coefficients are predicted: those of the original, of what was seen and of the rebuilt image,
      laid out as pyramids [N, H, W, 1]; None elsewhere.
    label: of what was rebuilt, where no coefficients are shown alone.
    borrowed: what of the rebuilt image isn't the student's, in a sentence; '' for nothing.
  """

  what: str
  seen_NHWC: np.ndarray
  rebuilt_NHWC: np.ndarray
  target_NHWC: np.ndarray | None = None
  answer_NHWC: np.ndarray | None = None
  bands: tuple[np.ndarray, ...] | None = None
  label: str = 'Rebuilt'
  borrowed: str = ''


Rebuild = Callable[[Network, Mapping[str, Any], Mapping[str, Any], np.ndarray], list[Rebuilt]]


def rebuild(
  network: Network, params: Mapping[str, Any], settings: Mapping[str, Any], image_NHWC: np.ndarray
) -> list[Rebuilt]:
  """What a student makes of images from which something was taken, in each way that its method takes it.

  Args:
    network: the student's backbone, with the BatchNorm statistics of its training.
    params: all of the student's trees: the head that rebuilds is among them.
    settings: `config.objective`.
    image_NHWC: float32 in [0, 1].

  Returns:
    An entry a way; none for a method that rebuilds nothing.
  """
  method = REBUILDERS.get(settings['name'])
  has_head = 'reconstruction' in params or 'decoder' in params
  return method(network, params, settings, image_NHWC) if method and has_head else []


def filter_of(settings: Mapping[str, Any]) -> Filter | None:
  """The frequency filter of `config.objective`, None for a method without one."""
  if 'filter' not in settings:
    return None
  fields = {field: settings[field] for field in ('com_probability', 'ranking', 'radius', 'clamp')}
  return Filter(name=settings['filter'], portions=tuple(settings['portions']), **fields)


def _keys(count: int, seed: int = 0) -> jax.Array:
  return jax.random.split(jax.random.key(seed), count)


def _answer(network: Network, params: Mapping[str, Any], seen_NHWC: jax.Array) -> jax.Array:
  """The reconstruction head's image, in [0, 1] as far as it is right."""
  head = models.ReconstructionHead(network.backbone.stride)

  @jax.jit
  def of(seen_NHWC):
    output = network.encode(seen_NHWC)
    pixels_NHWC = head.apply({'params': params['reconstruction']}, output.patches)
    return pixels_NHWC * np.asarray(network.std, np.float32) + np.asarray(network.mean, np.float32)

  return of(seen_NHWC)


def _filtered(network, params, settings, image_NHWC) -> list[Rebuilt]:
  """Of the middle portion: with the selected coefficients kept, and with them removed.

  Wavelets' filters have no mask of Fourier coefficients: all of the answer is judged, and all of it is shown.
  """
  chosen = filter_of(settings)
  kind, found = FILTERS[chosen.name], []
  middle = chosen.portions[len(chosen.portions) // 2 :][:1]
  for keep in (True, False):
    if kind.keep is not None and kind.keep is not keep:
      continue
    if kind.keep is None and chosen.com_probability == float(not keep):
      continue  # The run never did that.
    one = dataclasses.replace(chosen, portions=middle, com_probability=float(keep))
    seen_NHWC, kept_NHFM = one(jnp.asarray(image_NHWC), _keys(len(image_NHWC)))
    answer_NHWC = _answer(network, params, seen_NHWC)
    if not is_fourier(chosen.name):
      whole = np.asarray(seen_NHWC), np.asarray(answer_NHWC)
      found.append(Rebuilt(named(one, keep), *whole, label="Student's answer"))
      continue
    width = image_NHWC.shape[2]

    def removed_part(image_NHWC, kept_NHFM=kept_NHFM, width=width):
      spectrum_NHFC = fourier.half_spectrum(jnp.asarray(image_NHWC))
      return fourier.inverse(jnp.where(kept_NHFM, 0, spectrum_NHFC), width)

    target_NHWC, part_NHWC = removed_part(image_NHWC), removed_part(answer_NHWC)
    found.append(
      Rebuilt(
        named(one, keep),
        np.asarray(seen_NHWC),
        np.asarray(image_NHWC - target_NHWC + part_NHWC),
        np.asarray(target_NHWC),
        np.asarray(part_NHWC),
      )
    )
  return found


def _degraded(what: str, degradation: Callable[..., jax.Array]) -> Rebuild:
  """The whole image is rebuilt from a degraded one."""

  def of(network, params, settings, image_NHWC):
    seen_NHWC = degradation(settings, jnp.asarray(image_NHWC), _keys(len(image_NHWC)))
    return [Rebuilt(what, np.asarray(seen_NHWC), np.asarray(_answer(network, params, seen_NHWC)))]

  return of


def hidden_patches(
  image_NHWC: np.ndarray, settings: Mapping[str, Any], patch: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
  """Images with the patches grey that a method hides, and which those are: bool [N, h, w]; None for other methods."""
  grid = image_NHWC.shape[1] // patch, image_NHWC.shape[2] // patch
  keys = _keys(len(image_NHWC), seed)
  if settings['name'] == 'ibot':
    ratio, spread = settings['mask_ratio'], settings['mask_ratio_spread']
    masked_Nhw = np.asarray(
      patch_masks.block_masks(keys, grid, 1.0, (ratio - spread, ratio + spread))
    )
  elif 'mask_ratio' in settings:
    _, masked_NT = patch_masks.random_visible(keys, grid[0] * grid[1], settings['mask_ratio'])
    masked_Nhw = np.asarray(masked_NT).reshape(-1, *grid)
  else:
    return None
  masked_NHW1 = masked_Nhw.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
  return np.where(masked_NHW1, np.float32(0.5), image_NHWC), masked_Nhw


def _decoded(
  network: Network,
  params: Mapping[str, Any],
  settings: Mapping[str, Any],
  clean_NHWC: jax.Array,
  layers: tuple[int, ...],
) -> tuple[np.ndarray, list[jax.Array]]:
  """Which patches were hidden, bool [N, h, w], and what the decoder says of all of them, float32 [N, T, K] a level."""
  backbone, decoder = network.backbone, params['decoder']
  n, tokens = len(clean_NHWC), backbone.grid[0] * backbone.grid[1]
  visible_NS, masked_NT = patch_masks.random_visible(_keys(n), tokens, settings['mask_ratio'])
  heads = sorted(name for name in decoder if name.startswith('head_'))
  module = models.MaskedDecoder(
    grid=backbone.grid,
    outputs=tuple(decoder[name]['bias'].shape[-1] for name in heads),
    width=settings['decoder_width'],
    depth=settings['decoder_depth'],
    heads=settings['decoder_heads'],
  )

  @jax.jit
  def of(clean_NHWC, visible_NS):
    output, _ = models.encode(
      backbone, network.params, {}, clean_NHWC,
      visible_NS=visible_NS, layers=layers, normalise_layers=True,
    )  # fmt: skip
    encoded = tuple(output.layers[layer] for layer in layers) or ((output.pooled, output.patches),)
    return module.apply({'params': decoder}, encoded, visible_NS)

  masked_Nhw = np.asarray(masked_NT).reshape(n, *backbone.grid)
  return masked_Nhw, list(of(clean_NHWC, visible_NS))


def _put_in(network: Network, image_NHWC, masked_Nhw, clean_NHWC) -> np.ndarray:
  """The visible patches of the images, the others of normalised ones."""
  patch = network.backbone.stride
  pixels_NHWC = np.asarray(clean_NHWC) * np.asarray(network.std) + np.asarray(network.mean)
  masked_NHW1 = masked_Nhw.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
  return np.where(masked_NHW1, pixels_NHWC, image_NHWC).astype(np.float32)


def _masked_pixels(network, params, settings, image_NHWC) -> list[Rebuilt]:
  """MAE: where a patch is judged by its own mean and deviation, it is shown with those of the original."""
  clean_NHWC = normalise(jnp.asarray(image_NHWC), network.mean, network.std)
  masked_Nhw, (guess_NTK,) = _decoded(network, params, settings, clean_NHWC, ())
  patch = network.backbone.stride
  if settings['normalise_pixels']:
    patch_NTK = to_patches(clean_NHWC, patch).reshape(guess_NTK.shape)
    deviation_NT1 = jnp.sqrt(jnp.var(patch_NTK, axis=-1, keepdims=True, ddof=1) + _EPSILON)
    guess_NTK = guess_NTK * deviation_NT1 + patch_NTK.mean(-1, keepdims=True)
  n, h, w = masked_Nhw.shape
  pixels = np.asarray(guess_NTK).reshape(n, h, w, patch, patch, 3)
  guess_NHWC = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(image_NHWC.shape)
  seen_NHWC, _ = hidden_patches(image_NHWC, settings, patch)
  rebuilt_NHWC = _put_in(network, image_NHWC, masked_Nhw, guess_NHWC)
  what = f'{100 * settings["mask_ratio"]:g} % of the patches hidden'
  borrowed = _OWN_MEAN if settings['normalise_pixels'] else ''
  return [Rebuilt(what, seen_NHWC, rebuilt_NHWC, borrowed=borrowed)]


def _masked_wavelets(network, params, settings, image_NHWC) -> list[Rebuilt]:
  """Wavelet MIM: predicted coefficients, with the original's mean and deviation of each level, transformed back."""
  clean_NHWC = normalise(jnp.asarray(image_NHWC), network.mean, network.std)
  layers = tuple(layer - 1 for layer in settings['layers'])
  masked_Nhw, guesses = _decoded(network, params, settings, clean_NHWC, layers)
  patch, (n, h, w) = network.backbone.stride, masked_Nhw.shape
  original = wavelet.dwt(clean_NHWC, settings['wavelet'], len(layers))
  guess = wavelet.from_patch_coefficients(
    tuple(guess.reshape(n, h, w, -1) for guess in guesses), patch, 3
  )

  def scaled(of_guess, like):
    mean, deviation = like.mean(tuple(range(1, like.ndim)), keepdims=True), None
    deviation = jnp.sqrt(
      jnp.square(like - mean).mean(tuple(range(1, like.ndim)), keepdims=True) + _EPSILON
    )
    return of_guess * deviation + mean

  details = tuple(
    wavelet.Bands(*jnp.moveaxis(scaled(jnp.stack(ours, 1), jnp.stack(theirs, 1)), 1, 0))
    for ours, theirs in zip(guess.details, original.details, strict=True)
  )
  approximation = scaled(guess.approximation_BHWC, original.approximation_BHWC)
  whole = wavelet.Decomposition(approximation, details)
  guess_NHWC = wavelet.idwt(whole, settings['wavelet'], *image_NHWC.shape[1:3])
  rebuilt_NHWC = _put_in(network, image_NHWC, masked_Nhw, guess_NHWC)
  seen_NHWC, _ = hidden_patches(image_NHWC, settings, patch)

  def bands(pixels_NHWC):
    pixels_NHWC = normalise(jnp.asarray(pixels_NHWC), network.mean, network.std)
    return pyramid(wavelet.dwt(pixels_NHWC, settings['wavelet'], len(layers)))

  what = f'{100 * settings["mask_ratio"]:g} % of the patches hidden'
  shown = tuple(map(bands, (image_NHWC, seen_NHWC, rebuilt_NHWC)))
  return [Rebuilt(what, seen_NHWC, rebuilt_NHWC, bands=shown, borrowed=_OWN_LEVELS)]


def pyramid(coefficients: wavelet.Decomposition) -> np.ndarray:
  """Wavelet coefficients as one map, the approximation at the top left, finer levels around it: float32 [N, H, W, 1].

  Root of the magnitude, averaged over channels, each band as a share of its own largest.
  """

  def shown(band_NHWC):
    size_NHW1 = np.sqrt(np.abs(np.asarray(band_NHWC)).mean(-1, keepdims=True))
    return size_NHW1 / np.maximum(size_NHW1.max((1, 2, 3), keepdims=True), 1e-9)

  corner = shown(coefficients.approximation_BHWC)
  for bands in reversed(coefficients.details):
    horizontal, vertical, diagonal = map(shown, bands)
    top = np.concatenate([corner, vertical], axis=2)
    corner = np.concatenate([top, np.concatenate([horizontal, diagonal], axis=2)], axis=1)
  return corner


REBUILDERS: dict[str, Rebuild] = {
  'folk': _filtered,
  'mfm': _filtered,
  'super_resolution': _degraded(
    'a low resolution', lambda s, image, keys: degrade.super_resolve_input(image, s['factor'])
  ),
  'deblur': _degraded(
    'a blur',
    lambda s, image, keys: degrade.blur(image, keys, tuple(s['kernel_sizes']), s['sigma']),
  ),
  'denoise': _degraded('noise', lambda s, image, keys: degrade.add_noise(image, keys, s['sigma'])),
  'mae': _masked_pixels,
  'wavelet_mim': _masked_wavelets,
}
