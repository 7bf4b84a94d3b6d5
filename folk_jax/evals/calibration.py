"""Whether a classifier's confidence is its accuracy: ECE, MCE, negative log-likelihood, Brier score.

Two steps, so that a data set of any size streams through: `sums` adds up a batch on the devices, and
`summarise` turns the total into numbers on the host. Totals of batches are added leaf by leaf.

Shape letters: B images, K classes, M bins.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError

BINS = 15


class CalibrationSums(NamedTuple):
  """Sums over the valid images; float32 from the devices, any float dtype once added up."""

  count_M: jax.Array  # Images whose confidence lies in the bin.
  confidence_M: jax.Array  # Sum of the confidences in it.
  hits_M: jax.Array  # How many of them are right.
  log_likelihood: jax.Array  # Of the true classes, in nats.
  brier: jax.Array


@dataclasses.dataclass(frozen=True)
class Calibration:
  """What `summarise` found.

  Attributes:
    ece: expected calibration error, in [0, 1].
    mce: maximum calibration error over the bins that hold an image, in [0, 1].
    nll: mean negative log-likelihood, in nats.
    brier: mean squared distance of probabilities and one-hot label, summed over classes, in [0, 2].
    accuracy: in [0, 1].
    count: images.
    edges: of the bins, M + 1 numbers from 0 to 1; the diagram's abscissa.
    counts: images a bin.
    confidences: mean confidence a bin, None where it is empty.
    accuracies: accuracy a bin, None where it is empty.
  """

  ece: float
  mce: float
  nll: float
  brier: float
  accuracy: float
  count: int
  edges: tuple[float, ...]
  counts: tuple[int, ...]
  confidences: tuple[float | None, ...]
  accuracies: tuple[float | None, ...]


def sums(
  logits_BK: jax.Array, label_B: jax.Array, valid_B: jax.Array, bins: int = BINS
) -> CalibrationSums:
  """A batch's share of `Calibration`.

  Args:
    logits_BK: floating point, any scale; the probabilities are their softmax, in float32.
    label_B: int in [0, K) where valid; anything elsewhere.
    valid_B: bool, false on rows that are padding; whatever their logits hold, they count nothing.
    bins: M equal bins of confidence, ((m - 1) / M, m / M] as in Guo et al. (arXiv 1706.04599,
      section 2); the class with the largest logit, the first among equals, is the prediction.

  Returns:
    float32 sums.

  Raises:
    UserError: `bins` is below 1.
  """
  chex.assert_rank(logits_BK, 2)
  chex.assert_shape([label_B, valid_B], logits_BK.shape[:1])
  chex.assert_type(valid_B, bool)
  if bins < 1:
    raise UserError(
      f'calibration is asked for {bins} bins: choose at least 1, the usual number is {BINS}'
    )
  logits_BK = jnp.where(valid_B[:, None], logits_BK.astype(jnp.float32), 0)
  classes = logits_BK.shape[1]
  log_probability_BK = jax.nn.log_softmax(logits_BK)
  probability_BK = jnp.exp(log_probability_BK)
  true_BK = jnp.arange(classes) == jnp.clip(label_B, 0, classes - 1)[:, None]
  confidence_B = jnp.max(probability_BK, axis=1)
  hit_B = jnp.argmax(logits_BK, axis=1) == label_B

  inner_edges = np.asarray([m / bins for m in range(1, bins)], np.float32)
  bin_B = jnp.sum(confidence_B[:, None] > inner_edges, axis=1)
  # A product instead of a scatter, whose order of summation is open on GPUs.
  in_bin_BM = (bin_B[:, None] == jnp.arange(bins)) & valid_B[:, None]

  def by_bin(value_B: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(in_bin_BM, value_B[:, None], 0), axis=0, dtype=jnp.float32)

  def total(value_BK: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(valid_B[:, None], value_BK, 0))

  return CalibrationSums(
    count_M=by_bin(jnp.ones_like(confidence_B)),
    confidence_M=by_bin(confidence_B),
    hits_M=by_bin(hit_B.astype(jnp.float32)),
    log_likelihood=total(jnp.where(true_BK, log_probability_BK, 0)),
    brier=total(jnp.square(probability_BK - true_BK)),
  )


def summarise(totals: CalibrationSums) -> Calibration:
  """The measures, from the sums over a data set.

  ECE is the mean over images of |accuracy - confidence| of their bin, MCE its maximum (Guo et al.,
  arXiv 1706.04599, equations 3 and 5; Naeini et al., AAAI 2015); the Brier score is the sum over
  all classes (Brier 1950), so that two classes give twice the one-class form.

  Args:
    totals: of at least one image; float32 holds whole numbers exactly up to 16.7 million.

  Returns:
    `Calibration`.

  Raises:
    UserError: no image was counted.
  """
  count_M, confidence_M, hits_M, log_likelihood, brier = (
    np.asarray(value, np.float64) for value in totals
  )
  count = count_M.sum()
  if not count > 0:
    raise UserError(
      'calibration needs at least one valid image, found none: check the split and its labels'
    )
  filled_M = count_M > 0
  size_M = np.where(filled_M, count_M, 1)
  confidence_M, accuracy_M = confidence_M / size_M, hits_M / size_M
  gap_M = np.where(filled_M, np.abs(accuracy_M - confidence_M), 0)

  def by_bin(value_M: np.ndarray) -> tuple[float | None, ...]:
    return tuple(
      float(value) if filled else None for value, filled in zip(value_M, filled_M, strict=True)
    )

  bins = len(count_M)
  return Calibration(
    ece=float((gap_M * count_M).sum() / count),
    mce=float(gap_M.max()),
    nll=float(-log_likelihood / count),
    brier=float(brier / count),
    accuracy=float(hits_M.sum() / count),
    count=int(count),
    edges=tuple(m / bins for m in range(bins + 1)),
    counts=tuple(int(value) for value in count_M),
    confidences=by_bin(confidence_M),
    accuracies=by_bin(accuracy_M),
  )
