"""Few labels and no labels: which images a draw keeps, what it refuses, and unlabelled images in batches."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import DataSettings, MissingLabel, eval_batches, make_source, train_batches
from folk_jax.data.labels import draw_labelled
from folk_jax.data.records import WRITER_OPTIONS, pack
from folk_jax.data.sources import Source, Subset
from folk_jax.errors import UserError

SIZES = {'ant': 10, 'bee': 3, 'cow': 1}
LABELS = np.repeat(np.arange(3), list(SIZES.values()))


class Fake(Source):
  """Labels without images; counts how many were read."""

  def __init__(self, labels, class_names=tuple(SIZES)):
    self.class_names, self._labels, self.read_labels = class_names, labels, 0

  def __len__(self):
    return len(self._labels)

  def label(self, index):
    self.read_labels += 1
    return int(self._labels[index])

  def name(self, index):
    return f'fake {index}'


def draw(source, images_a_class=0, share=0.0, seed=0):
  return draw_labelled(
    source.labels,
    source.name,
    source.class_names,
    len(source),
    images_a_class=images_a_class,
    share=share,
    seed=seed,
  )


def counts(indices, labels=LABELS, classes=3):
  return np.bincount(labels[indices], minlength=classes).tolist()


def test_shots_are_of_every_class_and_shares_are_rounded_with_one_at_least():
  source = Fake(LABELS)
  assert counts(draw(source, 1)) == [1, 1, 1]
  assert counts(draw(source, share=0.1)) == [1, 1, 1]  # 1, 0.3 and 0.1
  assert counts(draw(source, share=0.5)) == [5, 2, 1]  # 5, 1.5 and 0.5
  assert counts(draw(source, share=0.25)) == [2, 1, 1]  # 2.5 to the even 2, 0.75
  np.testing.assert_array_equal(draw(source, share=1.0), np.arange(14))


def test_draws_of_one_seed_are_nested_and_rise():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 40))
  source = Fake(labels, tuple('abcdefg'))
  draws = [draw(source, n, seed=3) for n in (1, 2, 5, 10)] + [draw(source, share=0.5, seed=3)]
  for smaller, larger in zip(draws, draws[1:], strict=False):
    assert set(smaller) < set(larger)
    assert (np.diff(larger) > 0).all()
  assert counts(draws[2], labels, 7) == [5] * 7
  np.testing.assert_array_equal(draw(source, 5, seed=3), draws[2])
  others = [draw(source, 5, seed=seed) for seed in range(8)]
  assert len({tuple(other) for other in others}) == 8


def test_every_image_of_a_class_is_drawn_alike():
  # 2 of 5 in 2,000 draws: each image in 800 of them, give or take 4 deviations of 22.
  hits, labels = np.zeros(15), np.repeat(np.arange(3), 5)
  for seed in range(2000):
    how = {'images_a_class': 2, 'share': 0.0, 'seed': seed}
    hits[draw_labelled(labels.__getitem__, str, 'abc', 15, **how)] += 1
  assert hits.sum() == 2000 * 6 and np.abs(hits - 800).max() < 88


def test_shots_of_a_large_set_read_few_labels():
  source = Fake(np.arange(50_000) % 3)
  assert counts(draw(source, 5), np.arange(50_000) % 3) == [5, 5, 5]
  assert source.read_labels < 5000
  draw(source, share=0.001)
  assert source.read_labels >= 50_000


@pytest.mark.parametrize(
  'labels, how, words',
  [
    (LABELS, {'images_a_class': 2}, "asks for 2 of every class, and class 'cow' has 1 of the 14"),
    (LABELS, {'images_a_class': 5}, "class 'bee' has 3 of the 14 training images (1 more have"),
    (LABELS[:13], {'images_a_class': 1}, "fewer labels than shots: .* class 'cow' has 0 of the 13"),
    (LABELS[:13], {'share': 0.5}, "label_share asks for at least 1 of .* class 'cow' has 0"),
    (np.array([0, 1, -1, 2]), {'share': 0.5}, "image 'fake 2' has no label"),
    (np.array([0, 1, 3, 2]), {'share': 0.5}, "image 'fake 2' has the label 3, .* (0..2)"),
  ],
)
def test_too_few_labels_are_refused_by_name(labels, how, words):
  with pytest.raises(UserError) as refused:
    draw(Fake(labels), **how)
  for part in words.split('.*'):
    assert part.strip() in str(refused.value)
  assert '\n' not in str(refused.value)


def test_data_without_labels_and_settings_that_contradict_are_refused(tmp_path):
  Image.new('RGB', (8, 8)).save(tmp_path / '1.png')
  settings = {'source': 'folder', 'path': str(tmp_path), 'image_size': 8}
  with pytest.raises(UserError, match='data.images_a_class is set and the data have no labels'):
    make_source(DataSettings(**settings, images_a_class=1), 'train')
  masks = {'classes': 2, 'ignore': 255, 'height': 8, 'width': 8}
  for fields, words in (
    ({'images_a_class': 1, 'label_share': 0.1}, 'set one of them'),
    ({'images_a_class': -1}, 'data.images_a_class is -1'),
    ({'label_share': 1.5}, r'data.label_share is 1.5; give a share in \(0, 1\]'),
    ({'label_share': 0.1, 'label_seed': -1}, 'data.label_seed is -1'),
    ({'images_a_class': 1, 'source': 'mask_folder', 'masks': masks}, 'with data.masks'),
  ):
    if 'masks' in fields:
      fields |= {'masks': masks | {'short_side': 0, 'scale': (1, 1), 'category_max_ratio': 1.0}}
    with pytest.raises(UserError, match=words):
      DataSettings(**settings | fields)


def test_validation_is_held_out_first_then_the_limit_then_the_draw():
  def source(split='train', **fields):
    return make_source(DataSettings(source='embedded', image_size=8, **fields), split)

  def names(found):
    return {found.name(index) for index in range(len(found))}

  held = names(source('validation', validation=0.25))
  assert len(held) == 1440
  few = source(validation=0.25, limit=300, images_a_class=4)
  assert np.bincount(few.labels(np.arange(len(few)))).tolist() == [4] * 10
  within = names(source(validation=0.25, limit=300))
  assert len(within) == 300 and names(few) < within and not names(few) & held
  # What is judged by is never made smaller by the draw.
  assert names(source('validation', validation=0.25, images_a_class=4)) == held
  assert len(source('test', images_a_class=4)) == 720


@pytest.mark.parametrize('name', ['embedded', 'synthetic', 'folder', 'subset', 'default'])
def test_labels_of_several_samples_are_those_of_each(name, tmp_path):
  for number, kind in enumerate('abcab'):
    (tmp_path / kind).mkdir(exist_ok=True)
    Image.new('RGB', (8, 8)).save(tmp_path / kind / f'{number}.png')
  if name == 'default':
    source = Fake(LABELS)
  elif name == 'subset':
    source = Subset(Fake(LABELS), np.array([13, 0, 11, 5, 10]))
  else:
    settings = DataSettings(source=name, path=str(tmp_path), image_size=8)
    source = make_source(settings, 'train')
  chosen = np.array([4, 0, 3])
  assert source.labels(chosen).tolist() == [source.label(index) for index in (4, 0, 3)]
  assert source.labels(chosen[:0]).tolist() == []


def records(path, labels, broken=()):
  """An array_record set of plain images, some of which don't decode."""
  from array_record.python import array_record_module

  buffer = io.BytesIO()
  Image.new('RGB', (8, 8), (90, 0, 0)).save(buffer, 'png')
  writer = array_record_module.ArrayRecordWriter(str(path / 'a.array_record'), WRITER_OPTIONS)
  for number, label in enumerate(labels):
    data = b'broken' if number in broken else buffer.getvalue()
    writer.write(pack(label, f'photo {number}', data))
  writer.close()
  shards = [{'file': 'a.array_record', 'samples': len(labels)}]
  split = {'complete': True, 'samples': len(labels), 'fingerprint': '', 'shards': shards}
  index = {'format': 'folk_jax', 'version': 1, 'class_names': ['cat', 'dog']}
  (path / 'index.json').write_text(json.dumps(index | {'splits': {'train': split}}))
  return DataSettings(
    source='array_record', path=str(path), image_size=8, threads=1, max_bad_share=1.0
  )


@pytest.mark.parametrize('wrong, words', [(-1, 'has no label'), (2, 'has the label 2')])
def test_a_stray_label_stops_training_and_evaluation_by_name(tmp_path, wrong, words):
  settings = records(tmp_path, [0, 1, 0, wrong, 1, 1], broken=(0,))
  source = make_source(settings, 'train')
  for make in (
    lambda classes: train_batches(source, settings, seed=0, step=0, batch_size=6, classes=classes),
    lambda classes: eval_batches(source, settings, batch_size=4, classes=classes),
  ):
    with make(2) as batches, pytest.raises(MissingLabel, match=f'photo 3.*{words}.*0..1'):
      for _ in range(3):
        next(batches)
    with make(0) as batches:  # Nobody asked for labels.
      assert wrong in next(batches)['label']


def test_padding_and_undecodable_images_need_no_label(tmp_path):
  settings = records(tmp_path, [0, 1, -1], broken=(2,))
  source = make_source(settings, 'train')
  with eval_batches(source, settings, batch_size=4, classes=2) as batches:
    (batch,) = batches
  assert batch['valid'].tolist() == [True, True, False, False]
  assert batch['label'].tolist() == [0, 1, -1, -1]
