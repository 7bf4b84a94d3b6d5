"""Rebuilding what was taken from an image, judged by the frequency distance: the half that FOLK and MFM share.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, F = W//2+1 stored frequencies, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.models import BackboneOutput, ReconstructionHead
from folk_jax.objectives import losses
from folk_jax.objectives.base import Batch, Params, Parts, sample_keys, statistics_of
from folk_jax.objectives.views import FILTER, augmented, fold, to_float
from folk_jax.signal import fourier
from folk_jax.signal.augment import normalise
from folk_jax.signal.filters import Filter
from folk_jax.signal.shard import over_batch

# (images [B, H, W, C] in [0, 1], keys [B]) -> (corrupted images, which coefficients to rebuild, bool [B, H, F, 1 or C])
Corruption = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def filter_corruption(frequency_filter: Filter) -> Corruption:
  """A frequency filter as a corruption: what it did not keep has to be rebuilt."""

  def corrupt(image_BHWC: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    filtered_BHWC, kept_BHFC = frequency_filter(image_BHWC, fold(keys_B, FILTER))
    return filtered_BHWC, ~kept_BHFC

  return corrupt


class Corrupted(NamedTuple):
  """Views as the student sees them, as they were, and which coefficients of their half-spectra it has to rebuild."""

  corrupted_NHWC: jax.Array  # Normalised.
  clean_NHWC: jax.Array  # Normalised.
  masked_NHFC: jax.Array


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """MFM's reconstruction (arXiv 2206.07706, sections 3.2 and 3.3), for any corruption.

  Attributes:
    parts: backbone, views, normalisation.
    corrupt: takes something from images in [0, 1].
    gamma: exponent of the frequency distance, above 0.
    reduce: 'per_image' (each image's own mean first) or 'pooled' (one mean over the batch).
  """

  parts: Parts
  corrupt: Corruption
  gamma: float
  reduce: str

  def __post_init__(self):
    if self.reduce not in losses.REDUCTIONS:
      raise UserError(
        f'unknown config.objective.reduce {self.reduce!r}. Known: {", ".join(losses.REDUCTIONS)}.'
      )
    if not self.gamma > 0:
      raise UserError(f'config.objective.gamma {self.gamma} must be positive.')

  @property
  def _head(self) -> ReconstructionHead:
    return ReconstructionHead(self.parts.patch, dtype=self.parts.dtype)

  def init(self, rng: jax.Array, output: BackboneOutput) -> Any:
    """Fresh parameters of the head, for what the backbone returns."""
    return self._head.init(rng, output.patches)['params']

  def views(self, batch: Batch, keys_BV: jax.Array) -> Corrupted:
    """The batch's views, augmented and corrupted, where the images are: one augmentation, one spectrum."""

    def prepare(view_BVHWC, keys_BV):
      return self._corrupted(augmented(self.parts, view_BVHWC, keys_BV), keys_BV.reshape(-1))

    return over_batch(prepare, batch['views'], keys_BV)

  def loss(self, params: Params, output: BackboneOutput, views: Corrupted) -> jax.Array:
    """Mean frequency distance on the coefficients that were taken, of the student's `output` on the views."""
    with jax.named_scope('student'):
      guess_NHWC = self._predict(params, output)
    with jax.named_scope('reconstruction_loss'):
      return losses.reduce_frequency(*self._distance(guess_NHWC, views), self.reduce)

  def held_out(
    self, params: Params, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """The student's distance on held-out images beside that of the mean colour. See `Objective.evaluate`."""
    valid_B = batch['valid'].astype(jnp.float32)

    def prepare(image_BHWC, keys_B):
      return self._corrupted(to_float(image_BHWC), keys_B)

    keys_B = sample_keys(rng, batch['index'], 0)
    views = over_batch(prepare, batch['views'][:, 0], keys_B)
    statistics = statistics_of(extra, 'student')
    output, _ = self.parts.encode(params['backbone'], statistics, views.corrupted_NHWC)
    prediction_BHWC = self._predict(params, output)
    sums = {'count': jnp.sum(valid_B)}
    for name, guess_BHWC in (('', prediction_BHWC), ('_of_mean', jnp.zeros_like(prediction_BHWC))):
      sum_B, count_B = self._distance(guess_BHWC, views)
      sums[f'reconstruction{name}'] = jnp.sum(valid_B * sum_B / jnp.maximum(count_B, 1))
    return sums

  def _corrupted(self, image_NHWC: jax.Array, keys_N: jax.Array) -> Corrupted:
    with jax.named_scope('filter'):
      corrupted_NHWC, masked_NHFC = self.corrupt(image_NHWC, keys_N)
    mean, std = self.parts.mean, self.parts.std
    return Corrupted(
      normalise(corrupted_NHWC, mean, std), normalise(image_NHWC, mean, std), masked_NHFC
    )

  def _predict(self, params: Params, output: BackboneOutput) -> jax.Array:
    return self._head.apply({'params': params['reconstruction']}, output.patches)

  def _distance(self, guess_NHWC: jax.Array, views: Corrupted) -> tuple[jax.Array, jax.Array]:
    """(sum [N], number of terms [N])."""

    def distance(guess_NHWC, target_NHWC, masked_NHFC):
      return fourier.frequency_distance(
        guess_NHWC, target_NHWC, masked_NHFC, self.gamma, self.parts.spectral_backend
      )

    return over_batch(distance, guess_NHWC, views.clean_NHWC, views.masked_NHFC)
