"""What makes logistic regression quick: principal axes, warm starts, and a path of C that ends where it turns down."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from folk_jax.evals import logistic, newton

CLASSES = 4
# One shape for all compiled tests; above the size up to which problems are padded.
IMAGES, WIDTH = 160, 24


def network_like(images, seed=0):
  """Features whose axes differ a thousandfold in deviation, as those of networks do, on directions of their own."""
  rng = np.random.default_rng(7)
  scale, mean = np.geomspace(1, 1e-3, WIDTH), 0.3 * rng.normal(size=WIDTH)
  turn, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
  centres = rng.normal(size=(CLASSES, WIDTH))
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(images) % CLASSES)
  features = mean + (0.6 * centres[labels] + rng.normal(size=(images, WIDTH))) * scale @ turn
  return features.astype(np.float32), labels.astype(np.int32)


FEATURES, LABELS = network_like(IMAGES)


@pytest.mark.parametrize('images, width, axes', [(40, 6, 6), (6, 40, 5), (8, 8, 7), (1, 3, 1)])
def test_principal_axes_give_the_features_back(images, width, axes):
  features = np.random.default_rng(0).normal(size=(images, width)).astype(np.float32)
  principal_NP, mean_D, axes_DP = logistic.principal(features)
  assert principal_NP.shape == (images, axes) and axes_DP.shape == (width, axes)
  # Sums of up to 40 products near 1, in float32.
  np.testing.assert_allclose(mean_D + principal_NP @ axes_DP.T, features, atol=1e-5)
  if images > 1:
    np.testing.assert_allclose(axes_DP.T @ axes_DP, np.eye(axes), atol=1e-5)
    gram_PP = principal_NP.T @ principal_NP
    np.testing.assert_allclose(gram_PP, np.diag(np.diag(gram_PP)), atol=1e-4)


def test_features_that_do_not_vary_have_one_axis_without_length():
  principal_NP, mean_D, axes_DP = logistic.principal(np.full((5, 3), 0.1, np.float32))
  assert axes_DP.shape == (3, 1) and np.all(np.isfinite(axes_DP))
  # 0.1 isn't a float32 number: its mean in float64 differs from it by rounding.
  np.testing.assert_allclose(principal_NP, 0, atol=1e-7)
  np.testing.assert_allclose(mean_D, 0.1, rtol=1e-6)


@pytest.fixture(scope='module')
def path():
  """Classifiers of three strengths on features like a network's."""
  return logistic.fit(FEATURES, LABELS, (1.0, 100.0, 1e4), classes=CLASSES)


def test_scikit_learn_agrees_on_features_like_a_networks(path):
  test, test_labels = network_like(2000, seed=1)
  assert np.all(path.converged)
  accuracies = []
  for row, c in enumerate((1.0, 100.0, 1e4)):
    model = LogisticRegression(C=c, solver='newton-cg', tol=1e-9, max_iter=2000)
    theirs = model.fit(np.float64(FEATURES), LABELS).predict(test)
    one = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row, 0], path)
    ours = np.argmax(logistic.logits(one, test), axis=1)
    accuracies.append([np.mean(found == test_labels) for found in (ours, theirs)])
    assert abs(np.diff(accuracies[-1])) <= 0.002
    assert np.mean(ours != theirs) <= 0.005
  assert np.ptp(accuracies) > 0.02  # C makes a difference here.


def test_axes_save_steps(path, monkeypatch):
  """The same descent along the features as they come needs many more conjugate gradients: here they run out."""
  monkeypatch.setattr(newton, 'GRADIENT_STEPS', 60)
  centred = FEATURES - FEATURES.mean(axis=0)
  fit = jax.jit(newton.fit_one, static_argnames='classes')
  steps = {}
  for name, features in (
    ('as they come', centred),
    ('along axes', logistic.principal(FEATURES)[0]),
  ):
    found = fit(features, LABELS, np.ones(IMAGES, np.float32), 1e4, classes=CLASSES)
    steps[name] = int(found.steps)
  assert steps['along axes'] < 0.6 * steps['as they come']
  assert path.steps.max() <= 15


def test_a_start_at_the_answer_takes_a_step(path):
  principal_NP, _, axes_DP = logistic.principal(FEATURES)
  fit = jax.jit(newton.fit_one, static_argnames='classes')
  weights = np.ones(IMAGES, np.float32)
  first = fit(principal_NP, LABELS, weights, 100.0, classes=CLASSES)
  again = fit(
    principal_NP, LABELS, weights, 100.0, classes=CLASSES, start=(first.kernel, first.bias)
  )
  assert int(again.steps) == 1 < int(first.steps)
  # Both within 1e-7 of the lowest objective, which is flat along the shortest axes.
  ours, theirs = (logistic.logits(found, principal_NP) for found in (again, first))
  np.testing.assert_allclose(jax.nn.softmax(ours), jax.nn.softmax(theirs), atol=1e-3)
  # And what `fit` returns is that answer, turned back.
  np.testing.assert_allclose(
    np.asarray(path.kernel[1, 0]), axes_DP @ np.asarray(first.kernel), atol=2e-2
  )


def scripted(monkeypatch, accuracy_by_c):
  """Cross-validation whose accuracies are given; the values of C that were tried, in order."""
  tried = []

  def fit(features, labels, c, weights, start, **options):
    tried.append(float(c))
    return newton.Classifier(start[0], start[1], np.array([True] * 2), None, None)

  def held_out(features, labels, fitted, held):
    return 10 * np.array([accuracy_by_c[tried[-1]]] * 2), np.array([-1.0, -2.0])

  monkeypatch.setattr(logistic, '_fit', fit)
  monkeypatch.setattr(logistic, '_held_out', held_out)
  return tried


@pytest.mark.parametrize(
  'accuracies, tried',
  [
    ((0.1, 0.3, 0.5, 0.4, 0.3, 0.9), 5),  # Two below the best: the last is never seen.
    ((0.1, 0.5, 0.4, 0.5, 0.4, 0.4), 6),  # As good as the best isn't below it.
    ((0.5, 0.4, 0.45, 0.9, 0.9, 0.9), 3),  # Below the best, if not the one before.
    ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 6),
  ],
)
def test_a_path_ends_where_accuracy_has_turned_down(monkeypatch, accuracies, tried):
  candidates = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
  seen = scripted(monkeypatch, dict(zip(candidates, accuracies, strict=True)))
  folds = np.arange(20) % 2
  order = [3, 0, 5, 1, 4, 2]
  accuracy, likelihood, converged = logistic.cross_validate(
    FEATURES[:20], LABELS[:20], folds, [candidates[i] for i in order], classes=CLASSES
  )
  assert seen == list(candidates[:tried]) and converged.all()
  expected = [accuracies[i] if i < tried else np.nan for i in order]
  np.testing.assert_allclose(accuracy, expected, rtol=1e-6)
  np.testing.assert_allclose(likelihood, [-0.15 if i < tried else -np.inf for i in order])
  best = logistic.best([candidates[i] for i in order], accuracy, likelihood)
  assert best == candidates[int(np.argmax(accuracies[:tried]))]


def test_patience_tries_more(monkeypatch):
  seen = scripted(monkeypatch, {1.0: 0.5, 2.0: 0.4, 3.0: 0.3, 4.0: 0.6})
  logistic.cross_validate(
    FEATURES[:20], LABELS[:20], np.arange(20) % 2, [1, 2, 3, 4], classes=CLASSES, patience=4
  )
  assert seen == [1, 2, 3, 4]


def test_between_equals_the_likelier_then_the_stronger_penalty():
  accuracy, likelihood = np.array([0.5, 0.6, 0.6, 0.6]), np.array([0.0, -2.0, -1.0, -1.0])
  assert logistic.best([1.0, 10.0, 1e3, 100.0], accuracy, likelihood) == 100.0
  accuracy[2:] = np.nan
  assert logistic.best([1.0, 10.0, 1e3, 100.0], accuracy, likelihood) == 10.0
