"""The cache of features: found again bit for bit, keyed on all that matters, and never trusted when damaged."""

import pathlib

import numpy as np
import pytest
from absl import logging

from folk_jax.evals.cache import cache_key, load_or_extract

FEATURES = {
  'pooled': np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32),
  'concat': np.random.default_rng(1).normal(size=(50, 16)).astype(np.float32),
}
LABELS = np.arange(50, dtype=np.int32) % 7
WEIGHTS = {'backbone': {'kernel': np.ones((2, 3), np.float32), 'bias': np.zeros(3, np.float32)}}
ABOUT = {'data': 'cifar10', 'split': 'test', 'resize': 36, 'features': ['pooled', 'concat']}


class Counted:
  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    return FEATURES, LABELS


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
  return said


def check(found):
  features, labels = found
  assert set(features) == set(FEATURES)
  for name, array in FEATURES.items():
    assert features[name].dtype == np.float32
    np.testing.assert_array_equal(features[name], array)
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(labels, LABELS)


def test_found_again_bit_for_bit_and_computed_once(tmp_path, warnings):
  path, compute = str(tmp_path / 'new' / 'features.npz'), Counted()
  for _ in range(3):
    check(load_or_extract(path, 'a', compute))
  assert compute.calls == 1 and warnings == []
  assert [file.name for file in (tmp_path / 'new').iterdir()] == ['features.npz']


def damage_flip(file: pathlib.Path):
  content = bytearray(file.read_bytes())
  content[content.index(FEATURES['pooled'].tobytes()[:16]) + 100] ^= 1
  file.write_bytes(content)


def damage_pickle(file: pathlib.Path):
  np.savez(file, key=np.array('a', dtype=object), labels=LABELS)


@pytest.mark.parametrize(
  'damage',
  [
    damage_flip,
    damage_pickle,
    lambda file: file.write_bytes(file.read_bytes()[:-200]),
    lambda file: file.write_bytes(b''),
    lambda file: file.write_text('not an archive'),
    lambda file: np.savez(file, labels=LABELS),
    lambda file: np.savez(file, key=np.array('a')),
    lambda file: load_or_extract(str(file), 'b', lambda: ({}, LABELS)),
  ],
  ids=['flip', 'pickle', 'cut', 'empty', 'text', 'no key', 'no labels', 'other key'],
)
def test_a_damaged_or_foreign_file_is_replaced_with_one_line(damage, tmp_path, warnings):
  file, compute = tmp_path / 'features.npz', Counted()
  load_or_extract(str(file), 'a', compute)
  damage(file)
  warnings.clear()
  check(load_or_extract(str(file), 'a', compute))
  assert compute.calls == 2
  assert len(warnings) == 1 and 'extracted again' in warnings[0] and '\n' not in warnings[0]
  check(load_or_extract(str(file), 'a', compute))
  assert compute.calls == 2 and len(warnings) == 1


def test_a_write_that_fails_leaves_the_old_file_and_costs_only_the_cache(
  tmp_path, warnings, monkeypatch
):
  file = tmp_path / 'features.npz'
  load_or_extract(str(file), 'a', Counted())
  before = file.read_bytes()

  def disk_full(opened, **arrays):
    opened.write(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(np, 'savez', disk_full)
  check(load_or_extract(str(file), 'b', Counted()))
  assert file.read_bytes() == before
  assert 'No space left' in warnings[-1]


def test_a_folder_that_cannot_be_made_costs_only_the_cache(tmp_path, warnings):
  (tmp_path / 'taken').write_text('')
  check(load_or_extract(str(tmp_path / 'taken' / 'features.npz'), 'a', Counted()))
  assert len(warnings) == 1 and 'not kept' in warnings[0]


def test_the_key_is_one_for_equal_inputs():
  again = {'backbone': {'bias': np.zeros(3, np.float32), 'kernel': np.ones((2, 3), np.float32)}}
  about = dict(reversed(list(ABOUT.items())))
  assert cache_key(again, about) == cache_key(WEIGHTS, ABOUT)
  assert len(cache_key(WEIGHTS, ABOUT)) == 64


def test_the_key_changes_with_everything():
  kernel, bias = WEIGHTS['backbone'].values()
  next_up = kernel.copy()
  next_up[1, 2] = np.nextafter(np.float32(1), np.float32(2))

  def weights(kernel=kernel, bias=bias, name='kernel'):
    return {'backbone': {name: kernel, 'bias': bias}}

  keys = [
    cache_key(tree, about)
    for tree, about in [
      (WEIGHTS, ABOUT),
      (weights(next_up), ABOUT),
      (weights(kernel.reshape(3, 2)), ABOUT),
      (weights(kernel.view(np.int32)), ABOUT),
      (weights(name='weight'), ABOUT),
      (weights() | {'batch_stats': np.zeros(1)}, ABOUT),
      (WEIGHTS, ABOUT | {'split': 'train'}),
      (WEIGHTS, ABOUT | {'resize': 256}),
      (WEIGHTS, ABOUT | {'features': ['concat', 'pooled']}),
    ]
  ]
  assert len(set(keys)) == len(keys)
