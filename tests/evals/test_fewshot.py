"""Low-shot: which labels are drawn, how C is chosen, and that test labels choose nothing."""

import math

import numpy as np
import pytest
from absl import logging as absl_logging
from sklearn.linear_model import LogisticRegression

from folk_jax.errors import UserError
from folk_jax.evals import fewshot, logistic
from folk_jax.evals.fewshot import assign_folds, confidence, draw_labels, low_shot

CLASSES, WIDTH = 4, 8
REGULARISERS = (0.1, 10.0, 1e3)


def sample(seed, images, noise=1.0):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(CLASSES, WIDTH))
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(images) % CLASSES)
  features = centres[labels] + noise * rng.normal(size=(images, WIDTH))
  return features.astype(np.float32), labels


SETS = (*sample(1, 200), *sample(2, 400))


def run(sets=SETS, amount=5, **options):
  options = {'classes': CLASSES, 'draws': 2, 'regularisers': REGULARISERS, 'folds': 3} | options
  return low_shot(*sets, amount=amount, **options)


@pytest.fixture(scope='module')
def five_shots():
  return run()


def test_shots_of_each_class_and_shares_of_each_class():
  labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 40, 150]))
  for amount, expected in (
    (1, [1, 1, 1]),
    (10, [10, 10, 10]),
    (0.01, [1, 1, 2]),
    (0.1, [1, 4, 15]),
  ):
    rows = draw_labels(labels, 3, amount, seed=0, draw=0)
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(np.bincount(labels[rows]), expected)


def test_a_smaller_draw_lies_within_a_larger_one_and_draws_differ():
  labels = SETS[1]
  draws = {amount: set(draw_labels(labels, CLASSES, amount, 3, 1)) for amount in (1, 2, 5, 0.2)}
  assert draws[1] < draws[2] < draws[5] < draws[0.2]
  others = [draw_labels(labels, CLASSES, 5, seed, draw) for seed, draw in ((3, 1), (3, 2), (4, 1))]
  assert len({tuple(rows) for rows in others}) == 3
  np.testing.assert_array_equal(others[0], draw_labels(labels, CLASSES, 5, 3, 1))


def test_every_image_is_drawn_about_as_often_as_any_other():
  labels = np.arange(40) % 4
  count = np.zeros(40)
  for draw in range(400):
    count[draw_labels(labels, 4, 2, 0, draw)] += 1
  # 400 draws of 2 of 10: 80 +- 8 (binomial); five deviations.
  assert count.sum() == 3200 and np.abs(count - 80).max() < 40


def test_folds_hold_each_class_in_part_and_the_only_image_of_a_class_never():
  labels = np.repeat([0, 1, 2, 3], [1, 2, 7, 10])
  folds = assign_folds(labels, 5, (0, 0))
  assert folds[0] == -1 and set(folds[1:]) == set(range(5))
  sizes = np.bincount(folds[1:])
  assert sizes.max() - sizes.min() <= 1
  for fold in range(5):
    assert set(labels[folds != fold]) == {0, 1, 2, 3}
  assert assign_folds(np.array([0, 1, 0, 1, 1]), 5, (0,)).max() == 2  # The largest class has three.
  assert assign_folds(np.arange(6), 5, (0,)).max() == -1


def test_a_confidence_interval_worked_by_hand():
  """Deviation 0.1, t = 4.302653 with two degrees of freedom: 4.302653 * 0.1 / sqrt(3)."""
  mean, interval = confidence([0.1, 0.2, 0.3])
  assert mean == pytest.approx(0.2) and interval == pytest.approx(0.2484137, rel=1e-6)
  mean, interval = confidence([0.7])
  assert mean == 0.7 and math.isnan(interval)


def test_test_labels_choose_nothing(five_shots):
  shuffled = np.random.default_rng(5).permutation(SETS[3])
  other = run((*SETS[:3], shuffled))
  for ours, theirs in zip(five_shots.draws, other.draws, strict=True):
    assert ours.regulariser == theirs.regulariser
    np.testing.assert_array_equal(ours.cross_validated, theirs.cross_validated)
    np.testing.assert_array_equal(ours.prediction_Q, theirs.prediction_Q)
  assert (
    five_shots.mean > 0.5 and abs(other.mean - 0.25) < 0.1
  )  # Right answers are by chance there.


def test_nor_do_training_labels_that_are_not_drawn(five_shots):
  labels = SETS[1].copy()
  drawn = five_shots.draws[0].labelled_M
  rest = np.setdiff1d(np.arange(200), drawn)
  labels[rest] = (labels[rest] + 1) % CLASSES
  found = fewshot.fit_draw(
    SETS[0],
    labels,
    SETS[2],
    labelled_M=drawn,
    classes=CLASSES,
    fold_seed=(0, 0),
    preprocess='unit',
    regularisers=REGULARISERS,
    fixed_regulariser=1.0,
    folds=3,
  )
  np.testing.assert_array_equal(found.prediction_Q, five_shots.draws[0].prediction_Q)


def test_a_draw_is_scikit_learns_answer(five_shots):
  """Cross-validated accuracies, the C that follows from them, and the predictions."""
  features, labels, test, test_labels = SETS
  unit, test_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, test))
  for number, draw in enumerate(five_shots.draws):
    rows = draw.labelled_M
    assert len(rows) == 20 and draw.converged
    x, y = np.float64(unit[rows]), labels[rows]
    folds = assign_folds(y, 3, (0, number))
    accuracy = []
    for c in REGULARISERS:
      right = 0
      for fold in range(3):
        model = LogisticRegression(C=c, solver='newton-cg', tol=1e-8, max_iter=1000)
        model.fit(x[folds != fold], y[folds != fold])
        right += np.sum(model.predict(x[folds == fold]) == y[folds == fold])
      accuracy.append(right / 20)
    np.testing.assert_allclose(draw.cross_validated, accuracy, rtol=1e-6)
    assert accuracy[REGULARISERS.index(draw.regulariser)] == max(accuracy)
    model = LogisticRegression(C=draw.regulariser, solver='newton-cg', tol=1e-8, max_iter=1000)
    expected = model.fit(x, y).predict(test_unit)
    # An image or two of 400 may lie within rounding of a border: 0.2 points of accuracy are less than one.
    assert np.mean(draw.prediction_Q != expected) <= 0.005
    assert five_shots.accuracies[number] == np.mean(draw.prediction_Q == test_labels)
  assert five_shots.mean == pytest.approx(np.mean(five_shots.accuracies))


@pytest.mark.parametrize(
  'accuracy, likelihood, expected',
  [
    ([0.5, 0.6, 0.4], [0, -1, 0], 10.0),
    ([0.6, 0.6, 0.4], [-2, -1, 0], 10.0),
    ([0.6, 0.6, 0.6], [-1, -1, -1], 0.1),
  ],
)
def test_accuracy_then_likelihood_then_the_stronger_penalty(
  accuracy, likelihood, expected, monkeypatch
):
  def scores(features, labels, folds, candidates, classes):
    assert list(candidates) == [0.1, 10.0, 1e3]
    return np.array(accuracy), np.array(likelihood), np.array([True] * 3)

  monkeypatch.setattr(logistic, 'cross_validate', scores)
  result = run(draws=1, regularisers=(1e3, 0.1, 10.0))
  assert result.draws[0].regulariser == expected
  np.testing.assert_array_equal(
    result.draws[0].cross_validated, [accuracy[2], accuracy[0], accuracy[1]]
  )


def test_one_shot_takes_the_fixed_regulariser(monkeypatch):
  def never(*args, **kwargs):
    raise AssertionError('one image a class leaves none to hold out')

  monkeypatch.setattr(logistic, 'cross_validate', never)
  result = run(amount=1, fixed_regulariser=50.0)
  assert [draw.regulariser for draw in result.draws] == [50.0] * 2
  assert result.draws[0].cross_validated is None and result.mean > 0.3


def test_what_the_preprocessings_are_blind_to():
  """'unit' to the length of each vector; 'standardise' to scale and offset of each feature."""
  rng = np.random.default_rng(0)
  train, test = SETS[0][:30], SETS[2]
  lengths = [np.float32(2.0) ** rng.integers(-3, 4, (len(rows), 1)) for rows in (train, test)]
  for ours, theirs in zip(
    fewshot.PREPROCESS['unit'](train, test),
    fewshot.PREPROCESS['unit'](train * lengths[0], test * lengths[1]),
    strict=True,
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-6)
  scale, offset = np.float32(rng.uniform(0.1, 10, WIDTH)), np.float32(rng.normal(size=WIDTH))
  ours = fewshot.PREPROCESS['standardise'](train, test)
  theirs = fewshot.PREPROCESS['standardise'](train * scale + offset, test * scale + offset)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)  # Offsets up to 30 deviations, in float32.
  np.testing.assert_allclose(ours[0].std(axis=0), 1, rtol=1e-5)
  constant = np.full((5, 2), 3, np.float32)
  np.testing.assert_array_equal(fewshot.PREPROCESS['standardise'](constant, constant)[1], 0)


def test_a_fit_that_does_not_converge_is_said(monkeypatch):
  said = []
  monkeypatch.setattr(absl_logging, 'warning', lambda text, *args: said.append(text % args))
  original = logistic.fit

  def cut(*args, **kwargs):
    fitted = original(*args, **kwargs)
    return fitted._replace(converged=np.zeros_like(fitted.converged))

  monkeypatch.setattr(logistic, 'fit', cut)
  assert not run(amount=1).draws[0].converged
  assert len(said) == 1 and 'has not converged' in said[0]


def changed_label(old, new):
  labels = SETS[1].copy()
  labels[labels == old] = new
  return (SETS[0], labels, *SETS[2:])


@pytest.mark.parametrize(
  'arguments, words',
  [
    ({'sets': changed_label(2, 1)}, 'class 2 of 4 has no training image'),
    ({'amount': 51}, 'class 0 has 50 training images; use fewer shots'),
    ({'sets': changed_label(2, -1)}, 'train labels lie in -1..3'),
    ({'sets': (*SETS[:3], SETS[3] + 1)}, 'test labels lie in 1..4'),
    ({'amount': 0}, 'amount 0: give a whole number'),
    ({'amount': 1.0}, 'amount 1.0: give a whole number'),
    ({'amount': True}, 'amount True'),
    ({'draws': 0}, 'at least 1 draw'),
    ({'folds': 1}, '2 folds'),
    ({'preprocess': 'whiten'}, "unknown low-shot preprocess 'whiten'. Known: unit, standardise"),
  ],
)
def test_mistakes_are_refused_in_words(arguments, words):
  with pytest.raises(UserError, match=words):
    run(**arguments)


def test_features_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='test features'):
    run((*SETS[:2], SETS[2][:5], SETS[3]))
