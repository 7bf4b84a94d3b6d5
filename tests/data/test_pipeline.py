"""The stream's laws, in this process: exact epochs, resume by slicing, processes, bad files,
padding.
"""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import DataSettings, ViewSettings, eval_batches, make_source, train_batches
from folk_jax.data.sources import Source
from folk_jax.errors import UserError

SIZE = 16


class Numbered(Source):
  """Small random pictures whose top left pixel is the sample's number; some are bad, some fail."""

  def __init__(self, count, bad=(), failing=()):
    self._count = count
    self._bad = frozenset(bad)
    self._failing = frozenset(failing)

  def __len__(self):
    return self._count

  def read(self, index):
    if index in self._failing:
      raise KeyError(f'the index of sample {index} is broken')
    if index in self._bad:
      return b'broken', index % 5
    rng = np.random.default_rng(index)
    image_HWC = rng.integers(0, 256, (20, 24, 3), np.uint8)
    return image_HWC, index % 5

  def name(self, index):
    return f'sample {index}'


def settings(**fields):
  return DataSettings(**{'source': 'synthetic', 'image_size': SIZE, 'threads': 2, **fields})


def take(
  source, count, *, seed=1, step=0, batch_size=4, process_index=0, process_count=1, **fields
):
  with train_batches(
    source,
    settings(**fields),
    seed=seed,
    step=step,
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  ) as batches:
    return list(itertools.islice(batches, count))


def assert_same(found, wanted):
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_batch_has_the_contracts_keys_shapes_and_types():
  views = (ViewSettings(), ViewSettings(scale=(0.5, 1.0)), ViewSettings(flip=0.0))
  (batch,) = take(Numbered(9), 1, views=views)
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
    'views': ((4, 3, SIZE, SIZE, 3), np.uint8),
    'label': ((4,), np.int32),
    'index': ((4,), np.int64),
    'valid': ((4,), np.bool_),
  }
  assert batch['valid'].all()
  np.testing.assert_array_equal(batch['label'], batch['index'] % 5)


def test_every_epoch_visits_each_sample_once_in_a_new_order():
  # 10 samples in batches of 4: epochs end inside a batch, and 5 batches are 2 epochs.
  order = np.concatenate([batch['index'] for batch in take(Numbered(10), 10)]).reshape(4, 10)
  for epoch in order:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in order}) == 4


def test_resume_is_the_uninterrupted_stream():
  source = Numbered(10)
  assert_same(take(source, 4, step=5), take(source, 9)[5:])


def test_a_seed_is_a_stream():
  source = Numbered(50)
  assert_same(take(source, 3, seed=7), take(source, 3, seed=7))
  first, second = (take(source, 1, seed=seed)[0]['index'] for seed in (7, 8))
  assert (first != second).any()
  assert len(take(source, 1, seed=-1)) == len(take(source, 1, seed=2**40)) == 1


def test_the_stream_does_not_depend_on_threads_or_prefetch():
  source = Numbered(10)
  assert_same(take(source, 6, threads=1, prefetch=1), take(source, 6, threads=4, prefetch=8))


def test_views_of_a_sample_differ_and_change_every_epoch():
  batches = take(Numbered(2), 20, batch_size=2)
  seen = collections.defaultdict(set)
  for batch in batches:
    for index, views_VHWC in zip(batch['index'], batch['views'], strict=True):
      seen[int(index)] |= {view.tobytes() for view in views_VHWC}
  # 20 epochs of two views: whole-image crops may coincide, but not often.
  assert min(len(views) for views in seen.values()) > 30


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_out_the_rows_of_the_one_process_batch(processes):
  source = Numbered(11)
  whole = take(source, 5, batch_size=8)
  parts = [
    take(source, 5, batch_size=8, process_index=p, process_count=processes)
    for p in range(processes)
  ]
  for batch, *shares in zip(whole, *parts, strict=True):
    rows = {key: np.concatenate([share[key] for share in shares]) for key in batch}
    assert all(len(share['index']) == 8 // processes for share in shares)
    # By sample and crop: two rows may hold the same sample when the data set is this small.
    assert sorted(keyed(rows)) == sorted(keyed(batch))


def keyed(batch):
  """The rows of a batch as comparable tuples."""
  rows = zip(batch['index'], batch['views'], batch['label'], strict=True)
  return [(int(index), views.tobytes(), int(label)) for index, views, label in rows]


def test_a_batch_may_exceed_the_data_set():
  (batch,) = take(Numbered(3), 1, batch_size=8)
  assert np.bincount(batch['index']).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
  (batch,) = take(Numbered(1), 1, batch_size=4)
  assert batch['index'].tolist() == [0] * 4


def test_a_batch_that_processes_do_not_divide_is_refused():
  for make in (lambda **k: train_batches(seed=0, step=0, **k), eval_batches):
    with pytest.raises(UserError, match='batch_size 6 is not a multiple of the 4 processes'):
      make(source=Numbered(3), settings=settings(), batch_size=6, process_count=4)


def test_bad_samples_are_replaced_by_the_next_that_decodes_and_reported_once(caplog):
  source = Numbered(100, bad=(3, 4, 99))
  with train_batches(
    source, settings(max_bad_share=0.03), seed=0, step=0, batch_size=20
  ) as batches:
    with caplog.at_level('WARNING', 'absl'):
      epochs = [next(batches) for _ in range(15)]
    assert sorted(batches.bad_names) == ['sample 3', 'sample 4', 'sample 99']
    assert batches.bad_count == 3
  counts = np.bincount(np.concatenate([batch['index'] for batch in epochs]), minlength=100)
  wanted = np.full(100, 3)
  wanted[[3, 4, 99]] = 0
  wanted[5] = 9  # itself, and in place of 3 and of 4
  wanted[0] = 6  # itself, and in place of 99
  np.testing.assert_array_equal(counts, wanted)
  assert all(batch['valid'].all() for batch in epochs)
  assert set(epochs[0]) == {'views', 'label', 'index', 'valid'}
  messages = [record.getMessage() for record in caplog.records]
  assert sorted(messages) == [f'skipping a bad file: sample {i} (not an image)' for i in (3, 4, 99)]


def test_bad_samples_do_not_move_the_others():
  good, bad = (take(source, 5, max_bad_share=1.0) for source in (Numbered(20), Numbered(20, [6])))
  for a, b in zip(good, bad, strict=True):
    kept = a['index'] != 6
    np.testing.assert_array_equal(a['views'][kept], b['views'][kept])
    assert (b['index'][~kept] == 7).all()


def test_past_the_share_the_run_stops_in_one_line():
  source = Numbered(50, bad=(10, 11))
  with pytest.raises(UserError) as caught:
    take(source, 100, max_bad_share=0.03)
  message = str(caught.value)
  assert '2 of 50 samples do not decode, more than data.max_bad_share=0.03' in message
  assert 'sample 10' in message or 'sample 11' in message
  assert '\n' not in message


@pytest.mark.parametrize('count', [5, 200])
def test_a_data_set_of_bad_files_alone_stops(count):
  with pytest.raises(UserError, match='samples in a row do not decode'):
    take(Numbered(count, bad=range(count)), 1, max_bad_share=1.0)


def test_files_that_vanish_are_bad(tmp_path):
  for number in range(40):
    Image.new('RGB', (9, 9)).save(tmp_path / f'{number:02d}.png')
  source = make_source(settings(source='folder', path=str(tmp_path)), 'train')
  (tmp_path / '07.png').unlink()
  (tmp_path / '08.png').write_bytes(b'')
  with train_batches(
    source, settings(max_bad_share=0.05), seed=0, step=0, batch_size=40
  ) as batches:
    next(batches)
    assert sorted(batches.bad_names) == [str(tmp_path / '07.png'), str(tmp_path / '08.png')]


def test_an_error_of_the_source_surfaces_as_itself():
  with pytest.raises(KeyError, match='the index of sample 2 is broken'):
    take(Numbered(4, failing=[2]), 4)


def test_closed_batches_say_so():
  batches = train_batches(Numbered(4), settings(), seed=0, step=0, batch_size=2)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match='closed'):
    next(batches)


def evaluate(source, *, batch_size, process_index=0, process_count=1, **fields):
  share = {'process_index': process_index, 'process_count': process_count}
  with eval_batches(source, settings(**fields), batch_size=batch_size, **share) as batches:
    return list(batches), batches


def test_evaluation_goes_once_in_order_and_pads_the_last_batch():
  batches, _ = evaluate(Numbered(10), batch_size=4)
  assert [batch['index'].tolist() for batch in batches] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9, -1, -1],
  ]
  assert [batch['valid'].tolist() for batch in batches[:2]] == [[True] * 4] * 2
  assert batches[2]['valid'].tolist() == [True, True, False, False]
  assert batches[2]['label'].tolist() == [3, 4, -1, -1]
  assert batches[0]['views'].shape == (4, 1, SIZE, SIZE, 3)
  assert not batches[2]['views'][2:].any()


@pytest.mark.parametrize('count', [8, 9, 1])
def test_evaluation_gives_every_process_as_many_batches(count):
  parts = [
    evaluate(Numbered(count), batch_size=4, process_index=p, process_count=2)[0] for p in (0, 1)
  ]
  assert len(parts[0]) == len(parts[1]) == -(-count // 4)
  seen = np.concatenate([b['index'][b['valid']] for part in parts for b in part])
  assert sorted(seen) == list(range(count))


def test_evaluation_leaves_bad_samples_out_and_counts_them():
  batches, iterator = evaluate(Numbered(10, bad=[0, 9]), batch_size=4, max_bad_share=0.2)
  valid = np.concatenate([batch['valid'] for batch in batches])
  assert valid.tolist() == [False] + [True] * 8 + [False] * 3
  assert iterator.bad_names == ['sample 0', 'sample 9']
  with pytest.raises(UserError, match='2 of 10 samples do not decode'):
    evaluate(Numbered(10, bad=[0, 9]), batch_size=4, max_bad_share=0.1)


def test_the_recipes_sources_stream(tmp_path):
  for number in range(4):
    path = tmp_path / f'class{number % 2}' / f'{number}.png'
    path.parent.mkdir(exist_ok=True)
    Image.new('RGB', (30, 20), (number, 0, 0)).save(path)
  for name in ('embedded', 'synthetic', 'folder'):
    source = make_source(settings(source=name, path=str(tmp_path)), 'train')
    (batch,) = take(source, 1)
    assert batch['views'].shape == (4, 2, SIZE, SIZE, 3)
    labels = [source.label(int(index)) for index in batch['index']]
    assert batch['label'].tolist() == labels
