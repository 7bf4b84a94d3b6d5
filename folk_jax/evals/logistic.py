"""Multinomial logistic regression with an L2 penalty, on frozen features: deterministic, in float32, many at once.

Minimises, over weights W [D, K] and intercepts b [K],

  sum_i s_i * cross_entropy(softmax(x_i W + b), y_i) + |W|^2 / (2 C),

the objective of scikit-learn's `LogisticRegression(C=C)` with three or more classes; C is the inverse strength of the
penalty, s_i weighs the images (0 leaves one out), intercepts aren't penalised. With two classes scikit-learn has one
vector of weights and ours two of opposite sign: its answer for 2 C is ours for C.

Shape letters: N images, D features, K classes, F folds, R regularisers, P problems = R * F.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

from folk_jax.evals.newton import TOLERANCE, Classifier, fit_one, logits, product

__all__ = ['TOLERANCE', 'Classifier', 'cross_validate', 'fit', 'fit_one', 'logits', 'predict']

# Bytes of arrays of a problem's own that are alive at once: logits-sized and weights-sized ones.
_LOGITS_ALIVE, _WEIGHTS_ALIVE, _BUDGET = 6, 10, 2**30


def fit(
  feature_ND: np.ndarray,
  label_N: np.ndarray,
  regularisers_R: Sequence[float],
  weight_FN: np.ndarray | None = None,
  *,
  classes: int,
  tolerance: float = TOLERANCE,
) -> Classifier:
  """Classifiers for every C and every weighting: the weightings of a C at once, as far as a gigabyte holds them.

  Args:
    feature_ND: float32.
    label_N: integers in [0, classes).
    regularisers_R: values of C, positive.
    weight_FN: a row a weighting, as `fit_one` takes it; by default one row of ones.
    classes: K.
    tolerance: see `fit_one`.

  Returns:
    A classifier with leading axes [R, F].

  Raises:
    ValueError: if shapes do not fit, a label or a C lies outside its range, a weighting is empty, or a feature is not
      finite.
  """
  features, mean_D, labels, regularisers, weights = _checked(
    feature_ND, label_N, regularisers_R, weight_FN, classes
  )
  fitted = _fit(
    features, labels, *_problems(regularisers, weights), classes=classes, tolerance=tolerance
  )
  fitted = fitted._replace(bias=fitted.bias - product(mean_D, fitted.kernel))
  shape = len(regularisers), len(weights)
  return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), fitted)


def predict(fitted: Classifier, feature_ND: np.ndarray, *, rows: int = 16384) -> np.ndarray:
  """The class with the highest logit of each image, int32 [N], `rows` at a time, from the only classifier of `fit`."""
  only = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[2:]), fitted)
  found = [
    np.asarray(_predict(only, feature_ND[first : first + rows]))
    for first in range(0, len(feature_ND), rows)
  ]
  return np.concatenate(found)


@jax.jit
def _predict(classifier, feature_ND):
  return jnp.argmax(logits(classifier, feature_ND), axis=1).astype(jnp.int32)


def cross_validate(
  feature_ND: np.ndarray,
  label_N: np.ndarray,
  fold_N: np.ndarray,
  regularisers_R: Sequence[float],
  *,
  classes: int,
  tolerance: float = TOLERANCE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """How well each C predicts images that it was not fitted on.

  Args:
    feature_ND: float32.
    label_N: integers in [0, classes).
    fold_N: integers; fold f >= 0 is predicted by a classifier fitted on all other images; -1 is never predicted.
    regularisers_R: values of C, positive.
    classes: K.
    tolerance: see `fit_one`.

  Returns:
    For each C, over all images of a fold: share predicted right float32 [R], mean log-likelihood float32 [R] (-inf
    where an image's class has no other image), and whether all its fits converged, bool [R].

  Raises:
    ValueError: as `fit`, or fewer than two folds.
  """
  fold_N = np.asarray(fold_N)
  folds = int(fold_N.max()) + 1
  if folds < 2:
    raise ValueError(f'cross-validation needs at least two folds, found {folds}')
  weight_FN = np.float32(fold_N != np.arange(folds)[:, None])
  features, _, labels, regularisers, weights = _checked(
    feature_ND, label_N, regularisers_R, weight_FN, classes
  )
  scores_P3 = _score(
    features,
    labels,
    *_problems(regularisers, weights),
    np.float32(fold_N == np.arange(folds)[:, None]),
    classes=classes,
    tolerance=tolerance,
  )
  right_RF, likelihood_RF, converged_RF = (
    np.asarray(score).reshape(len(regularisers), folds) for score in scores_P3
  )
  count = np.sum(fold_N >= 0)
  return right_RF.sum(1) / count, likelihood_RF.sum(1) / count, converged_RF.all(1)


@functools.partial(jax.jit, static_argnames=('classes', 'tolerance'))
def _fit(feature_ND, label_N, c_P, weight_FN, fold_P, *, classes, tolerance):
  def of_one(problem):
    c, fold = problem
    return fit_one(feature_ND, label_N, weight_FN[fold], c, classes=classes, tolerance=tolerance)

  return _map(of_one, (c_P, fold_P), len(weight_FN), feature_ND, classes)


@functools.partial(jax.jit, static_argnames=('classes', 'tolerance'))
def _score(feature_ND, label_N, c_P, weight_FN, fold_P, held_FN, *, classes, tolerance):
  """Right answers and log-likelihood, summed over a problem's held-out images, and whether it converged."""

  def of_one(problem):
    c, fold = problem
    fitted = fit_one(feature_ND, label_N, weight_FN[fold], c, classes=classes, tolerance=tolerance)
    logit_NK = logits(fitted, feature_ND)
    own_N = jnp.take_along_axis(jax.nn.log_softmax(logit_NK), label_N[:, None], axis=1)[:, 0]
    held_N = held_FN[fold]
    right = jnp.sum(held_N * (jnp.argmax(logit_NK, axis=1) == label_N))
    return right, jnp.sum(jnp.where(held_N > 0, own_N, 0.0)), fitted.converged

  return _map(of_one, (c_P, fold_P), len(weight_FN), feature_ND, classes)


def _map(of_one, problems, folds, feature_ND, classes):
  """`vmap` over the folds of one C, or as many of them as fit into memory; one such group after the other.

  A loop under `vmap` goes on until the slowest has ended, and a large C takes many times the steps of a small one.
  """
  images, width = feature_ND.shape
  bytes_each = 4 * classes * (_LOGITS_ALIVE * images + _WEIGHTS_ALIVE * width)
  return jax.lax.map(of_one, problems, batch_size=max(1, min(folds, _BUDGET // bytes_each)))


def _problems(regularisers_R, weight_FN):
  """C of each problem, the weightings, and which of them each problem has."""
  folds = len(weight_FN)
  return (
    np.repeat(regularisers_R, folds),
    weight_FN,
    np.tile(np.arange(folds, dtype=np.int32), len(regularisers_R)),
  )


def _checked(features, labels, regularisers, weights, classes):
  features, labels = np.asarray(features, np.float32), np.asarray(labels)
  regularisers = np.asarray(regularisers, np.float32)
  weights = np.ones((1, len(labels))) if weights is None else np.asarray(weights)
  if features.ndim != 2 or labels.shape != features.shape[:1]:
    raise ValueError(
      f'features have shape {features.shape} and labels {labels.shape}, expected [N, D] and [N]'
    )
  if weights.ndim != 2 or weights.shape[1] != len(labels):
    raise ValueError(f'weights have shape {weights.shape}, expected [F, {len(labels)}]')
  if (weights < 0).any() or not (weights.sum(axis=1) > 0).all():
    raise ValueError('weights must not be negative, and each weighting needs an image')
  if regularisers.ndim != 1 or not len(regularisers) or not (regularisers > 0).all():
    raise ValueError(f'C is {regularisers}, expected one or more positive numbers')
  if not np.isfinite(features.sum(dtype=np.float64)):
    raise ValueError('features hold values that are not finite: the network has diverged')
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(f'labels lie in {labels.min()}..{labels.max()}, expected 0..{classes - 1}')
  # Intercepts take up a mean without a penalty, so that taking it out changes no answer, and saves steps.
  mean_D = features.mean(axis=0, dtype=np.float64).astype(np.float32)
  return features - mean_D, mean_D, labels.astype(np.int32), regularisers, np.float32(weights)
