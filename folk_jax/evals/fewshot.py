"""Low-shot classification: L2-regularised logistic regression on frozen features and few labels.

Protocol: 1, 2, 5 or 10 labelled images a class, or 1 % or 10 % of the labels; several draws of them; C by
cross-validation inside the labelled images; mean accuracy on the test set and its 95 % confidence interval over the
draws. Logistic regression on unit vectors is how MSN judges few labels (arXiv 2204.07141; its
logistic_eval.py). Test labels are read for one thing, to count right answers once everything is chosen: `fit_draw`
isn't given them.

Shape letters: N training images, M labelled ones among them, Q test images, D features, K classes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from folk_jax.errors import UserError
from folk_jax.evals import logistic

REGULARISERS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
# For one image a class, which leaves none to cross-validate with: MSN's strength, on unit vectors.
FIXED_REGULARISER = 4000.0
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class DrawResult:
  """What one draw of labels gave.

  Attributes:
    labelled_M: int64, rows of the training set, rising.
    regulariser: the C that was used.
    cross_validated: accuracy of each candidate C in cross-validation, float32 [candidates], NaN for those larger ones
      that it left out (`logistic.cross_validate`); None where C is fixed.
    prediction_Q: int32, a class for each test image.
    converged: whether every fit reached its tolerance.
  """

  labelled_M: np.ndarray
  regulariser: float
  cross_validated: np.ndarray | None
  prediction_Q: np.ndarray
  converged: bool


@dataclasses.dataclass(frozen=True)
class LowShotResult:
  """Accuracy with few labels.

  Attributes:
    mean: of the draws' accuracies, in [0, 1].
    interval: half the width of its 95 % confidence interval (Student's t); NaN for one draw.
    accuracies: one a draw.
    draws: the draws.
  """

  mean: float
  interval: float
  accuracies: tuple[float, ...]
  draws: tuple[DrawResult, ...]


def low_shot(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  classes: int,
  amount: int | float,
  draws: int = 5,
  seed: int = 0,
  preprocess: str = 'unit',
  regularisers: Sequence[float] = REGULARISERS,
  fixed_regulariser: float = FIXED_REGULARISER,
  folds: int = FOLDS,
) -> LowShotResult:
  """The protocol for one amount of labels.

  Args:
    train_features: float [N, D].
    train_labels: integers [N] in [0, classes).
    test_features: float [Q, D].
    test_labels: integers [Q] in [0, classes).
    classes: K.
    amount: an int is images a class, a float in (0, 1) a share of each class's images (see `draw_labels`).
    draws: how many times labels are drawn.
    seed: of the draws; a smaller amount's images are among a larger one's of the same seed and draw.
    preprocess: a key of `PREPROCESS`.
    regularisers: candidates for C, the inverse strength of the penalty on the sum of losses.
    fixed_regulariser: C where no class has two labelled images.
    folds: of the cross-validation, at least 2.

  Returns:
    The result. A fit that has not converged is said in a warning.

  Raises:
    UserError: for a class without images or with fewer than the shots, labels outside the range, or an amount, a number
      of draws or folds, or a preprocessing that makes no sense.
    ValueError: for shapes that don't fit, and features that aren't finite.
  """
  train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
  train_features, test_features = (
    np.asarray(features, np.float32) for features in (train_features, test_features)
  )
  for name, features, labels in (
    ('train', train_features, train_labels),
    ('test', test_features, test_labels),
  ):
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
      raise ValueError(
        f'{name} features have shape {features.shape} and labels {labels.shape}, expected [N, D] and [N] with N > 0'
      )
    if labels.min() < 0 or labels.max() >= classes:
      raise UserError(
        f'{name} labels lie in {labels.min()}..{labels.max()}, low-shot expects 0..{classes - 1}: '
        'evaluate on a labelled data set, or switch the evaluation off.'
      )
  if draws < 1 or folds < 2:
    raise UserError(f'low-shot needs at least 1 draw and 2 folds, found {draws} and {folds}.')

  found = tuple(
    fit_draw(
      train_features,
      train_labels,
      test_features,
      labelled_M=draw_labels(train_labels, classes, amount, seed, draw),
      classes=classes,
      fold_seed=(seed, draw),
      preprocess=preprocess,
      regularisers=regularisers,
      fixed_regulariser=fixed_regulariser,
      folds=folds,
    )
    for draw in range(draws)
  )
  if not all(draw.converged for draw in found):
    logging.warning('low-shot with %s labels: a logistic regression has not converged', amount)
  accuracies = tuple(float(np.mean(draw.prediction_Q == test_labels)) for draw in found)
  return LowShotResult(*confidence(accuracies), accuracies, found)


def linear_classifier(
  train_ND: np.ndarray,
  label_N: np.ndarray,
  *,
  classes: int,
  regularisers: Sequence[float],
  folds: int,
  seed: int,
) -> tuple[logistic.Classifier, float]:
  """Logistic regression on all labels, of features of length 1, its C by cross-validation among them.

  Args:
    train_ND: float [N, D].
    label_N: integers [N] in [0, classes).
    classes: K.
    regularisers: candidates for C.
    folds: of the cross-validation.
    seed: of the folds.

  Returns:
    The classifier, for `logistic.predict` on features of length 1 too (`unit_length`), and its C.
  """
  unit_ND = unit_length(train_ND)
  fold_N = assign_folds(label_N, folds, (seed,))
  accuracy, likelihood, _ = logistic.cross_validate(
    unit_ND, label_N, fold_N, regularisers, classes=classes
  )
  c = logistic.best(regularisers, accuracy, likelihood)
  return logistic.fit(unit_ND, label_N, [c], classes=classes), c


def unit_length(feature_ND: np.ndarray) -> np.ndarray:
  """Features of length 1; those of length 0 stay."""
  return feature_ND / np.maximum(np.linalg.norm(feature_ND, axis=1, keepdims=True), 1e-12)


def draw_labels(
  label_N: np.ndarray, classes: int, amount: int | float, seed: int, draw: int
) -> np.ndarray:
  """The images whose labels are used: as many of each class, or a share of each class.

  Args:
    label_N: integers in [0, classes).
    classes: K.
    amount: an int is images a class; a float in (0, 1) is a share, rounded to the nearest number of images of each
      class, at least one.
    seed: of the protocol.
    draw: the number of the draw.

  Returns:
    int64 [M], rising.

  Raises:
    UserError: for an amount outside its range, or a class with too few images.
  """
  whole = isinstance(amount, int | np.integer) and not isinstance(amount, bool)
  if not (amount >= 1 if whole else 0 < amount < 1):
    raise UserError(
      f'low-shot amount {amount!r}: give a whole number of images a class, or a share between 0 and 1.'
    )
  chosen = []
  for label in range(classes):
    rows = np.flatnonzero(label_N == label)
    if not len(rows):
      raise UserError(
        f'low-shot: class {label} of {classes} has no training image: give a training set with images of every class.'
      )
    count = amount if whole else max(1, round(amount * len(rows)))
    if count > len(rows):
      raise UserError(
        f'low-shot with {amount} images a class: class {label} has {len(rows)} training images; '
        'use fewer shots or more images.'
      )
    # Keyed on the class: the first images of an order are the same whatever the amount and the other classes.
    order = np.random.default_rng((seed, draw, label)).permutation(rows)
    chosen.append(order[:count])
  return np.sort(np.concatenate(chosen))


def assign_folds(label_M: np.ndarray, folds: int, seed: Sequence[int]) -> np.ndarray:
  """Folds of labelled images, each class spread over them; int64 [M], -1 for the only image of its class.

  No more folds than the largest class has images. Every class keeps an image outside each fold, so that no classifier
  is asked for a class that it has never seen.
  """
  fold_M = np.full(len(label_M), -1)
  rng = np.random.default_rng(tuple(seed))
  labels, counts = np.unique(label_M, return_counts=True)
  folds = min(folds, int(counts.max()))
  start = 0
  for label, count in zip(labels, counts, strict=True):
    if count < 2:
      continue
    rows = rng.permutation(np.flatnonzero(label_M == label))
    fold_M[rows] = (start + np.arange(count)) % folds
    start += count  # The next class goes on where this one ended: folds of equal size.
  return fold_M


def fit_draw(
  train_features: np.ndarray,
  train_labels: np.ndarray,
  test_features: np.ndarray,
  *,
  labelled_M: np.ndarray,
  classes: int,
  fold_seed: Sequence[int],
  preprocess: str,
  regularisers: Sequence[float],
  fixed_regulariser: float,
  folds: int,
) -> DrawResult:
  """Chooses C inside the labelled images, fits on all of them, predicts the test images; their labels it isn't given.

  The C with the highest accuracy in cross-validation wins; between equals the higher likelihood of the held-out labels,
  then the stronger penalty. Arguments are those of `low_shot`; `labelled_M` are the rows whose labels may be read.
  """
  if preprocess not in PREPROCESS:
    raise UserError(f'unknown low-shot preprocess {preprocess!r}. Known: {", ".join(PREPROCESS)}.')
  label_M = train_labels[labelled_M]
  feature_MD, test_QD = PREPROCESS[preprocess](train_features[labelled_M], test_features)
  fold_M = assign_folds(label_M, folds, fold_seed)
  regulariser, accuracy, converged = fixed_regulariser, None, True
  if fold_M.max() >= 1:
    candidates = sorted(regularisers)
    accuracy, likelihood, fine = logistic.cross_validate(
      feature_MD, label_M, fold_M, candidates, classes=classes
    )
    regulariser = logistic.best(candidates, accuracy, likelihood)
    converged = bool(fine.all())
    # In the caller's order.
    accuracy = np.array([accuracy[candidates.index(value)] for value in regularisers])
  fitted = logistic.fit(feature_MD, label_M, [regulariser], classes=classes)
  return DrawResult(
    labelled_M=labelled_M,
    regulariser=float(regulariser),
    cross_validated=accuracy,
    prediction_Q=logistic.predict(fitted, test_QD),
    converged=converged and bool(np.all(fitted.converged)),
  )


def confidence(values: Sequence[float]) -> tuple[float, float]:
  """The mean and half the width of its 95 % confidence interval: t_{0.975, n - 1} * deviation / sqrt(n).

  The deviation is the sample's, with n - 1. The interval is over draws of labels, for this network and these test
  images. NaN for a single value.
  """
  from scipy import stats  # Comes with scikit-learn.

  count, mean = len(values), float(np.mean(values))
  if count < 2:
    return mean, math.nan
  quantile = float(stats.t.ppf(0.975, count - 1))
  return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(count)


def _unit(train_MD: np.ndarray, test_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

  return unit(train_MD), unit(test_QD)


def _standardise(train_MD: np.ndarray, test_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """By the labelled images' mean and deviation; a feature that is the same in all of them is only centred."""
  mean_D, deviation_D = train_MD.mean(axis=0), train_MD.std(axis=0)
  deviation_D = np.where(deviation_D > 1e-6 * np.abs(mean_D), deviation_D, 1.0)
  return tuple(((rows - mean_D) / deviation_D).astype(np.float32) for rows in (train_MD, test_QD))


# How features are brought to one scale, labelled and test images alike. At one image a class a few rows would have to
# give the deviations of 'standardise'; 'unit' needs none, and is what kNN does.
PREPROCESS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
  'unit': _unit,
  'standardise': _standardise,
  'none': lambda train_MD, test_QD: (train_MD, test_QD),
}
