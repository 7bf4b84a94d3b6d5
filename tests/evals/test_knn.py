"""kNN against DINO's numbers, a slow NumPy twin, and cases where the answer is known."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.evals.knn import knn, votes

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden' / 'knn.npz'


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


def twin(train, train_labels, test, test_labels, ks, temperature):
  """One image at a time, in float64, with dictionaries for the votes."""
  train, test = (
    x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    for x in (np.float64(train), np.float64(test))
  )
  hits = {k: [0, 0] for k in ks}
  for query, label in zip(test, test_labels, strict=True):
    similarity = train @ query
    order = sorted(range(len(train)), key=lambda i: (-similarity[i], i))
    for k in ks:
      vote = {}
      for i in order[:k]:
        vote[train_labels[i]] = vote.get(train_labels[i], 0.0) + np.exp(similarity[i] / temperature)
      ranking = sorted(vote, key=lambda c: (-vote[c], c))
      hits[k][0] += label in ranking[:1]
      hits[k][1] += label in ranking[:5]
  return {k: (one / len(test), five / len(test)) for k, (one, five) in hits.items()}


def sample(seed, bank, images, width, classes):
  """Features with a class-dependent mean, so that the accuracy is neither 0 nor 1."""
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(classes, width))
  labels = rng.integers(0, classes, bank + images)
  features = centres[labels] + 1.5 * rng.normal(size=(bank + images, width))
  features = features.astype(np.float32)
  return features[:bank], labels[:bank], features[bank:], labels[bank:]


def test_official_accuracies(golden):
  classes, temperature = int(golden['cfg'][0]), float(golden['cfg'][1])
  arrays = [
    golden[f'{split}_{what}'] for split in ('train', 'test') for what in ('features', 'labels')
  ]
  result = knn(
    *arrays,
    ks=(1, 10, 20),
    temperature=temperature,
    classes=classes,
    bank_block=128,
    query_block=32,
  )
  for k, (top1, top5) in result.items():
    assert 100 * top1 == pytest.approx(golden[f'k{k}.top1'], rel=1e-9)
    assert 100 * top5 == pytest.approx(golden[f'k{k}.top5_voted'], rel=1e-9)


def test_official_votes(golden):
  similarity = golden['test_features'] @ golden['train_features'].T
  order = np.argsort(-similarity, axis=1, kind='stable')[:, :20]
  nearest = np.take_along_axis(similarity, order, axis=1)
  labels = golden['train_labels'][order].astype(np.int32)
  ours = jax.vmap(lambda s, y: votes(s, y, (1, 10, 20), 0.07, 12))(nearest, labels)
  # exp(s / 0.07) multiplies the 6e-8 rounding of a similarity by 14, twice; then a sum of 20 votes.
  scale = np.exp(nearest[:, :1] / 0.07)
  for vote, k in zip(np.moveaxis(np.asarray(ours), 1, 0), (1, 10, 20), strict=True):
    np.testing.assert_allclose(vote * scale, golden[f'k{k}.probs'], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(vote.argmax(axis=1), golden[f'k{k}.pred'])


@pytest.mark.parametrize(
  'bank, images, bank_block, query_block',
  [(1, 1, 16, 8), (7, 3, 4, 2), (97, 40, 16, 8), (97, 40, 10_000, 256)],
)
def test_a_slow_twin_over_odd_sizes(bank, images, bank_block, query_block):
  arrays = sample(bank + images, bank, images, 8, 7)
  ks = (1, 3, 20, 60)
  expected = twin(*arrays, ks=ks, temperature=0.07)
  result = knn(*arrays, ks=ks, classes=7, bank_block=bank_block, query_block=query_block)
  # The twin, too, uses all of the bank where k is above its size.
  assert result == expected and list(result) == list(ks)


def test_ties_do_not_depend_on_blocks():
  # {-1, 1}^4 has 16 directions, all of length 2: unit vectors and similarities are exact.
  train, train_labels, test, test_labels = sample(5, 90, 30, 4, 6)
  arrays = np.sign(train), train_labels, np.sign(test), test_labels
  whole, blocks = (
    knn(*arrays, ks=(1, 5, 30), classes=6, bank_block=bank_block, query_block=query_block)
    for bank_block, query_block in ((90, 30), (7, 4))
  )
  assert whole == blocks == twin(*arrays, ks=(1, 5, 30), temperature=0.07)


def test_equal_similarities_rank_by_place_and_equal_votes_by_class():
  bank, query = np.ones((4, 4), np.float32), np.ones((1, 4), np.float32)
  labels = np.array([2, 1, 1, 2])
  for block in (1, 3):
    # k = 1: the first of the bank, class 2. k = 2, 4: one vote, two votes each: the smaller class.
    result = knn(bank, labels, query, [2], ks=(1, 2, 3, 4), classes=3, bank_block=block)
    assert [top1 for top1, _ in result.values()] == [1.0, 0.0, 0.0, 0.0]
    result = knn(bank, labels, query, [1], ks=(1, 2, 3, 4), classes=3, bank_block=block)
    assert [top1 for top1, _ in result.values()] == [0.0, 1.0, 1.0, 1.0]


def test_padding_never_votes():
  # Every real similarity is -1; a row of padding would offer 0, and its number, past the end of the
  # bank, would be read as the last label.
  bank, query = np.ones((5, 4), np.float32), -np.ones((3, 4), np.float32)
  labels = [3, 3, 3, 3, 1]
  for label, expected in ((3, [(1, 1), (1, 1), (1, 1)]), (1, [(0, 0), (0, 1), (0, 1)])):
    result = knn(
      bank, labels, query, [label] * 3, ks=(1, 5, 8), classes=4, bank_block=4, query_block=2
    )
    assert list(result.values()) == expected


def test_top5_counts_only_classes_with_a_vote():
  bank = np.eye(6, dtype=np.float32)
  query = np.float32([[6, 5, 4, 3, 2, 1]])
  # The nearest vote for classes 0 to 5 in this order: class 5 has a vote if k is 6, and is sixth.
  for label, ranks in ((0, [1, 1, 1]), (4, [0, 1, 1]), (5, [0, 0, 0]), (6, [0, 0, 0])):
    result = knn(bank, range(6), query, [label], ks=(2, 5, 6), classes=7)
    assert [top5 for _, top5 in result.values()] == ranks


def test_small_temperatures_neither_overflow_nor_lose_votes():
  bank = np.float32([[1, 0], [0, 1], [0, 1]])
  query = np.float32([[1, 0.01]])
  # exp(1 / 0.005) is past float32; the far class still has a vote, and still loses.
  for label, expected in ((0, (1.0, 1.0)), (1, (0.0, 1.0))):
    assert knn(bank, [0, 1, 1], query, [label], ks=(3,), temperature=0.005, classes=2) == {
      3: expected
    }


def test_scale_and_order_of_the_images_do_not_matter():
  train, train_labels, test, test_labels = sample(2, 60, 40, 8, 5)
  order = np.random.default_rng(0).permutation(40)
  scale = np.float32(2.0) ** np.random.default_rng(1).integers(-20, 20, (60, 1))
  expected = knn(train, train_labels, test, test_labels, ks=(5, 20), classes=5)
  result = knn(train * scale, train_labels, test[order], test_labels[order], ks=(20, 5), classes=5)
  assert result == expected and list(result) == [20, 5]


_EIGHT_DEVICES = """
import json
import jax, numpy as np
from folk_jax.evals.knn import knn
rng = np.random.default_rng(3)
train, test = rng.normal(size=(75, 8)), rng.normal(size=(43, 8))
labels = rng.integers(0, 6, 118)
def run():
  blocks = {'bank_block': 32, 'query_block': 4}
  return knn(train, labels[:75], test, labels[75:], ks=(5, 20), classes=6, **blocks)
alone = run()
mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
  print(json.dumps([jax.device_count(), alone == run(), alone[5]]))
"""


def test_one_device_equals_eight(run_with_devices):
  devices, equal, (top1, _) = json.loads(run_with_devices(_EIGHT_DEVICES))
  assert devices == 8 and equal and 0 < top1 < 1


@pytest.mark.parametrize(
  'change, error, words',
  [
    ({'train_labels': [0, -1, 1]}, UserError, 'train labels lie in -1..1'),
    ({'test_labels': [2, 2]}, UserError, 'kNN expects 0..1'),
    ({'train_labels': [0, 1]}, ValueError, 'expected'),
    ({'test_features': np.zeros((0, 2)), 'test_labels': []}, ValueError, 'N > 0'),
    ({'test_features': np.ones((2, 3))}, ValueError, '2 dimensions'),
    ({'train_features': np.float32([[1, 2], [np.nan, 0], [0, 1]])}, ValueError, 'not finite'),
    ({'ks': (0, 5)}, ValueError, 'at least 1'),
    ({'ks': ()}, ValueError, 'at least one'),
    ({'temperature': 0.0}, ValueError, 'temperature is 0.0'),
  ],
)
def test_bad_input_is_refused_in_words(change, error, words):
  arguments = {
    'train_features': np.ones((3, 2)),
    'train_labels': [0, 1, 1],
    'test_features': np.ones((2, 2)),
    'test_labels': [0, 1],
    'classes': 2,
  }
  with pytest.raises(error, match=words):
    knn(**(arguments | change))
