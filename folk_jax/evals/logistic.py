"""Multinomial logistic regression with an L2 penalty, on frozen features: deterministic, in float32, many at once.

Minimises, over weights W [D, K] and intercepts b [K],

  sum_i s_i * cross_entropy(softmax(x_i W + b), y_i) + |W|^2 / (2 C),

the objective of scikit-learn's `LogisticRegression(C=C)` with three or more classes; C is the inverse strength of the
penalty, s_i weighs the images (0 leaves one out), intercepts aren't penalised. With two classes scikit-learn has one
vector of weights and ours two of opposite sign: its answer for 2 C is ours for C.

Shape letters: N images, D features, P of their principal axes, K classes, F folds or other weightings, R regularisers.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

from folk_jax.evals.newton import TOLERANCE, Classifier, fit_one, logits, product

__all__ = [
  'TOLERANCE',
  'Classifier',
  'best',
  'cross_validate',
  'fit',
  'fit_one',
  'logits',
  'predict',
]

# What cross-validation compares differs by far more; the last step of a descent that stops here went well below it.
_COARSE = 1e-5
# Candidates in a row whose accuracy is below the best before cross-validation leaves out the larger ones.
PATIENCE = 2
# Smaller problems are padded to as many images and axes, so that draws of 1 to 10 images of 10 classes are one program.
_SMALL = 128
# Of the largest variance; below it a direction is rounding of float32 features.
_NO_VARIANCE = 1e-12
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
  features, labels, regularisers, weights = _checked(
    feature_ND, label_N, regularisers_R, weight_FN, classes
  )
  principal_NP, mean_D, axes_DP = principal(features)
  axes = axes_DP.shape[1]
  principal_NP, labels, weights = _padded(principal_NP, labels, weights)
  start = _start(len(weights), principal_NP.shape[1], classes)
  found = [
    _fit(principal_NP, labels, c, weights, start, classes=classes, tolerance=tolerance)
    for c in regularisers
  ]
  fitted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
  kernel_RFDK = product(axes_DP, fitted.kernel[:, :, :axes])
  return fitted._replace(kernel=kernel_RFDK, bias=fitted.bias - product(mean_D, kernel_RFDK))


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
  tolerance: float = _COARSE,
  patience: int = PATIENCE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """How well each C predicts images that it was not fitted on.

  From the smallest C on, each starting from the one before. The larger a C, the longer it takes: once the accuracy of
  `patience` values in a row lies below the best, the rest aren't tried.

  Args:
    feature_ND: float32.
    label_N: integers in [0, classes).
    fold_N: integers; fold f >= 0 is predicted by a classifier fitted on all other images; -1 is never predicted.
    regularisers_R: values of C, positive, in any order.
    classes: K.
    tolerance: see `fit_one`.
    patience: at least 1; as many as there are values of C tries them all.

  Returns:
    For each C, over all images of a fold: share predicted right float32 [R], mean log-likelihood float32 [R] (-inf
    where an image's class has no other image), and whether all its fits converged, bool [R]. Of a C that wasn't tried:
    NaN, -inf and True.

  Raises:
    ValueError: as `fit`, or fewer than two folds.
  """
  fold_N = np.asarray(fold_N)
  folds = int(fold_N.max()) + 1
  if folds < 2:
    raise ValueError(f'cross-validation needs at least two folds, found {folds}')
  weight_FN = np.float32(fold_N != np.arange(folds)[:, None])
  features, labels, regularisers, weights = _checked(
    feature_ND, label_N, regularisers_R, weight_FN, classes
  )
  principal_NP, labels, weights = _padded(principal(features)[0], labels, weights)
  held_FN = np.zeros_like(weights)
  held_FN[:, : len(fold_N)] = fold_N == np.arange(folds)[:, None]
  count = np.sum(fold_N >= 0)
  accuracy_R = np.full(len(regularisers), np.nan, np.float32)
  likelihood_R = np.full(len(regularisers), -np.inf, np.float32)
  converged_R = np.ones(len(regularisers), bool)
  start, highest, below = _start(folds, principal_NP.shape[1], classes), -1.0, 0
  for place in np.argsort(regularisers, kind='stable'):
    c = regularisers[place]
    fitted = _fit(principal_NP, labels, c, weights, start, classes=classes, tolerance=tolerance)
    right_F, likelihood_F = _held_out(principal_NP, labels, fitted, held_FN)
    accuracy_R[place] = np.sum(right_F) / count
    likelihood_R[place] = np.sum(likelihood_F) / count
    converged_R[place] = np.all(fitted.converged)
    below = below + 1 if accuracy_R[place] < highest else 0
    if below == patience:
      break
    highest = max(highest, accuracy_R[place])
    # Through the host: arrays that lie on a mesh would compile the program once more.
    kernel_FPK, bias_FK = np.asarray(fitted.kernel), np.asarray(fitted.bias)
    # A class without an image has no intercept to start from.
    start = kernel_FPK, np.where(np.isfinite(bias_FK), bias_FK, np.float32(0))
  return accuracy_R, likelihood_R, converged_R


def best(
  regularisers_R: Sequence[float], accuracy_R: np.ndarray, likelihood_R: np.ndarray
) -> float:
  """The C of the highest accuracy; between equals of the higher likelihood, then the stronger penalty.

  Args are those of `cross_validate` and what it returned; what it didn't try is never taken.
  """
  tried = [place for place in range(len(regularisers_R)) if not np.isnan(accuracy_R[place])]
  place = max(tried, key=lambda i: (accuracy_R[i], likelihood_R[i], -regularisers_R[i]))
  return float(regularisers_R[place])


def principal(feature_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Features along their principal axes, without those in which they don't vary.

  No answer changes: intercepts take up a mean without a penalty, the penalty is blind to rotations, and no weight lies
  outside the span of the features. What changes is the work. With no more axes than images, few labels make small
  problems; and at weights of 0 the Hessian is diagonal along the axes, so that its diagonal, the preconditioner of
  `newton`, is all of it. Features of neural networks vary a thousand times more along some axes than along others:
  without the rotation conjugate gradients took 50 times as many steps.

  Args:
    feature_ND: float32.

  Returns:
    The features there, float32 [N, P] with P <= min(N, D), at least 1; their mean, float32 [D]; and the axes, float32
    [D, P] of orthonormal columns: feature = mean + principal @ axes.T.
  """
  mean_D = feature_ND.mean(axis=0, dtype=np.float64)
  centred_ND = feature_ND - mean_D  # float64: products square the range of scales.
  images, width = centred_ND.shape
  wide = width > images
  variance_P, axis_PP = np.linalg.eigh(
    centred_ND @ centred_ND.T if wide else centred_ND.T @ centred_ND
  )
  kept = variance_P > _NO_VARIANCE * max(variance_P[-1], 0)
  kept[-1] = True
  axes_DP = axis_PP[:, kept]
  if wide:
    axes_DP = centred_ND.T @ axes_DP / np.sqrt(np.maximum(variance_P[kept], 1e-300))
  principal_NP = centred_ND @ axes_DP
  return np.float32(principal_NP), np.float32(mean_D), np.float32(axes_DP)


def _padded(feature_NP, label_N, weight_FN):
  """Small problems with axes of zeros, and with images that weigh nothing."""
  images, axes = feature_NP.shape
  if images > _SMALL:
    return feature_NP, label_N, weight_FN
  more = (0, _SMALL - images)
  return (
    np.pad(feature_NP, (more, (0, _SMALL - axes))),
    np.pad(label_N, more),
    np.pad(weight_FN, ((0, 0), more)),
  )


def _start(folds: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
  return np.zeros((folds, width, classes), np.float32), np.zeros((folds, classes), np.float32)


@functools.partial(jax.jit, static_argnames=('classes', 'tolerance'))
def _fit(feature_NP, label_N, c, weight_FN, start_F, *, classes, tolerance):
  """Classifiers of one C with leading axis [F], from `start_F`.

  A loop under `vmap` goes on until the slowest has ended, and a large C takes many times the steps of a small one: one
  C at a time, its weightings together, or as many of them as fit into memory.
  """

  def of_one(problem):
    weight_N, start = problem
    return fit_one(
      feature_NP, label_N, weight_N, c, classes=classes, tolerance=tolerance, start=start
    )

  images, width = feature_NP.shape
  bytes_each = 4 * classes * (_LOGITS_ALIVE * images + _WEIGHTS_ALIVE * width)
  at_once = max(1, min(len(weight_FN), _BUDGET // bytes_each))
  return jax.lax.map(of_one, (weight_FN, start_F), batch_size=at_once)


@jax.jit
def _held_out(feature_NP, label_N, fitted_F, held_FN):
  """Right answers and log-likelihood, summed over each fold's own images, [F] each."""

  def of_one(fold):
    fitted, held_N = fold
    logit_NK = logits(fitted, feature_NP)
    own_N = jnp.take_along_axis(jax.nn.log_softmax(logit_NK), label_N[:, None], axis=1)[:, 0]
    right = jnp.sum(held_N * (jnp.argmax(logit_NK, axis=1) == label_N))
    return right, jnp.sum(jnp.where(held_N > 0, own_N, 0.0))

  return jax.lax.map(of_one, (fitted_F, held_FN))


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
  return features, labels.astype(np.int32), regularisers, np.float32(weights)
