"""Logistic regression: numbers worked by hand, laws, and scikit-learn's answers on the same features."""

import math

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from folk_jax.evals import logistic, newton

REGULARISERS = (1e-3, 0.1, 1.0, 100.0, 1e4)
# One size for nearly all tests: each other one compiles for seconds.
IMAGES, WIDTH, CLASSES = 60, 8, 4


def sample(seed, noise=2.0, images=IMAGES):
  rng = np.random.default_rng(seed)
  labels = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, images - CLASSES)])
  features = rng.normal(size=(CLASSES, WIDTH))[labels] + noise * rng.normal(size=(images, WIDTH))
  return features.astype(np.float32), labels


def fit(features, labels, regularisers=(1.0,), weights=None, **options):
  return logistic.fit(features, labels, regularisers, weights, classes=CLASSES, **options)


def only(fitted, *index):
  """One classifier of many."""
  return jax.tree.map(lambda leaf: np.asarray(leaf)[index], fitted)


def probabilities(classifier, features):
  return np.asarray(jax.nn.softmax(logistic.logits(classifier, features)))


def reference(features, labels, c, weights=None):
  """scikit-learn in float64, to a gradient of 1e-9."""
  model = LogisticRegression(C=c, solver='newton-cg', tol=1e-9, max_iter=1000)
  return model.fit(np.float64(features), labels, weights)


# Where the classes can be separated, the weights would be infinite but for the penalty.
@pytest.mark.parametrize('noise', [2.0, 0.4], ids=['overlap', 'separable'])
def test_scikit_learn_agrees(noise):
  features, labels = sample(0, noise, IMAGES + 1000)
  train, test = (features[:IMAGES], labels[:IMAGES]), (features[IMAGES:], labels[IMAGES:])
  fitted = fit(*train, REGULARISERS)
  assert fitted.kernel.dtype == np.float32 and np.all(fitted.converged)
  accuracies = []
  for row, c in enumerate(REGULARISERS):
    model = reference(*train, c)
    ours, theirs = probabilities(only(fitted, row, 0), test[0]), model.predict_proba(test[0])
    # An objective within 1e-7 of the lowest before the last Newton step: weights within 1e-3. A C of 1e4 makes logits
    # of some hundred, in float32.
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    accuracies.append([np.mean(p.argmax(axis=1) == test[1]) for p in (ours, theirs)])
    assert abs(np.diff(accuracies[-1])) <= 0.002
  assert np.ptp(accuracies) > 0.005  # C makes a difference here.


def test_a_number_worked_by_hand():
  """x = -1 of class 0 and x = +1 of class 1, twice each: weights (-w, w) minimise 4 softplus(-2 w) + w^2 / C.

  So w = 4 C sigmoid(-2 w), and C = 0.5 / (4 * 0.26894142) = 0.46478536 gives w = 1/2.
  """
  features, weights = np.zeros((IMAGES, WIDTH), np.float32), np.zeros((1, IMAGES))
  features[:4, 0], weights[0, :4] = [-1, -1, 1, 1], 1
  labels = np.array([0, 0, 1, 1] + [2] * (IMAGES - 4))
  fitted = only(fit(features, labels, [0.46478536], weights), 0, 0)
  np.testing.assert_allclose(fitted.kernel[0, :2], [-0.5, 0.5], rtol=1e-5)
  np.testing.assert_allclose(fitted.bias[:2], 0, atol=1e-6)


def test_intercepts_alone_give_the_shares_of_the_classes():
  """No penalty pulls them together, however strong it is on the weights."""
  labels = np.repeat([0, 1, 2, 3], [6, 12, 18, 24])
  for features in (np.zeros((IMAGES, WIDTH), np.float32), sample(1)[0]):
    fitted = only(fit(features, labels, [1e-9]), 0, 0)
    np.testing.assert_allclose(probabilities(fitted, features)[0], [0.1, 0.2, 0.3, 0.4], atol=1e-4)


def test_two_classes_are_scikit_learns_with_twice_the_c():
  """And classes without an image are never predicted, nor do they change what is."""
  features, labels = sample(2)
  labels = np.where(labels < 2, 1, 3)
  fitted = only(fit(features, labels, [0.5]), 0, 0)
  assert np.all(fitted.bias[[0, 2]] == -math.inf) and np.all(fitted.kernel[:, [0, 2]] == 0)
  found = probabilities(fitted, features)
  theirs = reference(features, labels, 1.0).predict_proba(features)
  np.testing.assert_allclose(found[:, [1, 3]], theirs, atol=1e-4)
  assert np.all(found[:, [0, 2]] == 0)


def test_weights_repeat_images_and_leave_them_out():
  features, labels = sample(3)
  weights = np.float32(np.resize([0, 1, 2], IMAGES))
  rows = np.repeat(np.arange(IMAGES), np.int64(weights))
  weighted = only(fit(features, labels, weights=weights[None]), 0, 0)
  repeated = only(fit(features[rows], labels[rows]), 0, 0)
  # The same sums in another order, and directions solved to a relative residual, not to the last bit.
  np.testing.assert_allclose(weighted.kernel, repeated.kernel, atol=1e-4)
  np.testing.assert_allclose(weighted.bias, repeated.bias, atol=1e-4)


def test_many_at_once_are_each_alone(monkeypatch):
  features, labels = sample(4)
  weights = np.float32(np.arange(IMAGES) % 3 != np.arange(3)[:, None])
  many = fit(features, labels, REGULARISERS, weights)
  assert many.kernel.shape == (5, 3, WIDTH, CLASSES) and many.converged.shape == (5, 3)
  assert len(set(np.ravel(many.steps))) > 1  # Some ended while others went on.
  for row, fold in ((0, 0), (2, 1), (4, 2)):
    alone = fit(features, labels, [REGULARISERS[row]], weights[fold][None])
    for ours, theirs in zip(only(alone, 0, 0)[:2], only(many, row, fold)[:2], strict=True):
      # Batched products sum in another order; at a C of 1e4 the minimum is flat and weights are near 10.
      np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
  monkeypatch.setattr(
    logistic, '_BUDGET', 1
  )  # One problem at a time; another tolerance, another program.
  grouped = fit(features, labels, REGULARISERS, weights, tolerance=0.9 * logistic.TOLERANCE)
  np.testing.assert_allclose(grouped.kernel, many.kernel, rtol=1e-3, atol=1e-3)


def test_cross_validation_is_a_loop_over_folds():
  features, labels = sample(5)
  folds = np.random.default_rng(0).permutation(np.arange(IMAGES) % 4)
  folds[:4] = -1  # One of each class is never held out.
  accuracy, likelihood, converged = logistic.cross_validate(
    features, labels, folds, (0.01, 1.0), classes=CLASSES
  )
  assert converged.all() and 0.3 < accuracy.min() and accuracy.max() < 0.95
  count = np.sum(folds >= 0)
  for row, c in enumerate((0.01, 1.0)):
    right, log_likelihood = 0, 0.0
    for fold in range(4):
      model = reference(features[folds != fold], labels[folds != fold], c)
      held = folds == fold
      probability = model.predict_proba(features[held])
      right += np.sum(probability.argmax(axis=1) == labels[held])
      log_likelihood += np.log(probability[np.arange(held.sum()), labels[held]]).sum()
    assert accuracy[row] == pytest.approx(right / count, rel=1e-6)
    assert likelihood[row] == pytest.approx(log_likelihood / count, rel=1e-4)


def test_the_same_bits_every_time_and_no_luck_in_converging(monkeypatch):
  features, labels = sample(7)
  first, again = (fit(features, labels) for _ in range(2))
  np.testing.assert_array_equal(first.kernel, again.kernel)
  assert 0 <= first.gap <= logistic.TOLERANCE and first.steps > 2
  monkeypatch.setattr(newton, 'NEWTON_STEPS', 2)
  cut = fit(features, labels, tolerance=1.1 * logistic.TOLERANCE)  # Another program.
  assert not np.any(cut.converged) and cut.steps == 2 and cut.gap > logistic.TOLERANCE


def test_predictions_by_blocks_of_rows():
  features, labels = sample(8)
  fitted = fit(features, labels)
  expected = probabilities(only(fitted, 0, 0), features).argmax(axis=1)
  for rows in (7, IMAGES, 1000):
    np.testing.assert_array_equal(logistic.predict(fitted, features, rows=rows), expected)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'label_N': [0, 1, 3]}, r'labels lie in 0..3, expected 0..2'),
    ({'label_N': [0, 1]}, 'expected \\[N, D\\]'),
    ({'feature_ND': np.float32([[1], [np.nan], [2]])}, 'not finite'),
    ({'regularisers_R': [1.0, 0.0]}, 'positive'),
    ({'regularisers_R': []}, 'one or more'),
    ({'weight_FN': np.zeros((1, 3))}, 'each weighting needs an image'),
    ({'weight_FN': np.ones(3)}, 'expected \\[F, 3\\]'),
  ],
)
def test_bad_input_is_refused_in_words(change, words):
  arguments = {
    'feature_ND': np.ones((3, 1), np.float32),
    'label_N': [0, 1, 2],
    'regularisers_R': [1.0],
  }
  with pytest.raises(ValueError, match=words):
    logistic.fit(**(arguments | change), classes=3)


def test_one_fold_is_none():
  with pytest.raises(ValueError, match='at least two folds, found 1'):
    logistic.cross_validate(np.ones((2, 1)), [0, 1], [0, 0], [1.0], classes=2)
