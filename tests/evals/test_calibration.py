"""Calibration: worked by hand, a slow twin, padding that never counts."""

import math

import jax
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.evals import calibration

sums = jax.jit(calibration.sums, static_argnums=3)


def twin(logits, labels, bins):
  """One image at a time, in float64."""
  members = [[] for _ in range(bins)]
  nll = brier = 0.0
  for row, label in zip(np.float64(logits), labels, strict=True):
    p = np.exp(row - row.max())
    p /= p.sum()
    nll -= math.log(p[label]) / len(labels)
    brier += sum((q - (k == label)) ** 2 for k, q in enumerate(p)) / len(labels)
    m = next(m for m in range(bins) if p.max() <= (m + 1) / bins)
    members[m].append((p.max(), float(p.argmax() == label)))
  gaps = [abs(np.mean(cell, axis=0) @ [1, -1]) if cell else 0.0 for cell in members]
  ece = sum(gap * len(cell) for gap, cell in zip(gaps, members, strict=True)) / len(labels)
  return ece, max(gaps), nll, brier


def measured(logits, labels, valid=None, bins=calibration.BINS):
  valid = np.ones(len(labels), bool) if valid is None else valid
  return calibration.summarise(sums(np.float32(logits), np.int32(labels), valid, bins))


def test_worked_by_hand():
  # Two classes: confidences 0.8, 0.8, 0.6, 0.6 in the bins (0.6, 0.8] and (0.4, 0.6] of five...
  p = np.array([[0.79, 0.21], [0.79, 0.21], [0.41, 0.59], [0.59, 0.41]])
  found = measured(np.log(p), [0, 1, 1, 1], bins=5)
  assert found.counts == (0, 0, 2, 2, 0)
  assert found.confidences == (None, None, pytest.approx(0.59), pytest.approx(0.79), None)
  assert found.accuracies == (None, None, 0.5, 0.5, None)
  # ... which are right half the time: gaps 0.09 and 0.29, of two images each.
  assert found.ece == pytest.approx((2 * 0.09 + 2 * 0.29) / 4, abs=1e-6)
  assert found.mce == pytest.approx(0.29, abs=1e-6)
  nll = -(math.log(0.79) + math.log(0.21) + math.log(0.59) + math.log(0.41)) / 4
  assert found.nll == pytest.approx(nll, abs=1e-6)
  # Over both classes: twice the squared shortfall.
  brier = 2 * (0.21**2 + 0.79**2 + 0.41**2 + 0.59**2) / 4
  assert found.brier == pytest.approx(brier, abs=1e-6)
  assert found.accuracy == 0.5 and found.count == 4
  assert found.edges == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_a_bin_holds_its_upper_edge():
  # Equal logits of two and of four classes: confidences of exactly 1 / 2 and 1 / 4.
  assert measured(np.zeros((1, 2)), [0], bins=4).counts == (0, 1, 0, 0)
  assert measured(np.zeros((1, 4)), [0], bins=4).counts == (1, 0, 0, 0)
  # Certainty is in the last bin, and the first of equals is the prediction.
  assert measured([[50.0, 0.0]], [0], bins=4).counts == (0, 0, 0, 1)
  assert measured(np.zeros((2, 2)), [0, 1], bins=4).accuracy == 0.5


@pytest.mark.parametrize(('images', 'classes', 'bins'), [(1, 2, 1), (60, 3, 15), (200, 10, 7)])
def test_the_slow_twins_numbers(images, classes, bins):
  random = np.random.default_rng(images)
  logits = np.float32(2 * random.normal(size=(images, classes)))
  labels = random.integers(0, classes, images)
  found = measured(logits, labels, bins=bins)
  # Sums of up to 200 float32 terms near 1.
  ours = found.ece, found.mce, found.nll, found.brier
  assert ours == pytest.approx(twin(logits, labels, bins), rel=2e-5, abs=1e-6)
  assert 0 <= found.ece <= found.mce <= 1


def test_padding_never_counts_and_batches_add_up():
  random = np.random.default_rng(5)
  logits, labels = np.float32(random.normal(size=(12, 4))), random.integers(0, 4, 12)
  expected = measured(logits, labels)
  padded, padded_labels = np.full((20, 4), np.nan, np.float32), np.full(20, -1)
  rows = np.arange(12) + 3
  padded[rows], padded_labels[rows] = logits, labels
  valid = np.isin(np.arange(20), rows)
  found = measured(padded, padded_labels, valid)
  halves = [
    sums(padded[i : i + 10], np.int32(padded_labels[i : i + 10]), valid[i : i + 10], 15)
    for i in (0, 10)
  ]
  total = calibration.summarise(jax.tree.map(lambda a, b: a + b, *halves))
  for other in (found, total):
    assert other.counts == expected.counts and other.accuracies == expected.accuracies
    for name in ('ece', 'mce', 'nll', 'brier'):
      # The same terms in another order.
      assert getattr(other, name) == pytest.approx(getattr(expected, name), rel=1e-5, abs=1e-6)


def test_great_logits_stay_finite():
  found = measured([[1e4, 0.0], [0.0, 1e4]], [0, 0])
  assert found.nll == pytest.approx(5e3) and found.brier == pytest.approx(1.0)


def test_mistakes_are_refused_in_words():
  with pytest.raises(UserError, match='at least one valid image'):
    measured(np.zeros((2, 3)), [0, 1], np.zeros(2, bool))
  with pytest.raises(UserError, match='0 bins'):
    measured(np.zeros((2, 3)), [0, 1], bins=0)
