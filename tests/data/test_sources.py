"""The sources that need no preparation: folder, embedded, synthetic; and what is said when one is
not there.
"""

import dataclasses
import itertools
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import DataSettings, make_source
from folk_jax.data.embedded import PHOTOGRAPHS, EmbeddedSource, region
from folk_jax.data.sources import Source, evenly_spread, held_out
from folk_jax.errors import UserError


def save(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (8, 6), (value, 0, 0)).save(path)


def folder(path, split='train', **fields):
  return make_source(DataSettings(source='folder', path=str(path), image_size=8, **fields), split)


def listing(source, root):
  names = [os.path.relpath(source.name(i), root) for i in range(len(source))]
  return list(zip(names, (source.label(i) for i in range(len(source))), strict=True))


def test_class_folders_nested_sorted_and_filtered(tmp_path):
  for name in ('train/dog/b.png', 'train/dog/a.jpg', 'train/cat/2020/x.JPEG', 'train/cat/0.webp'):
    save(tmp_path / name)
  (tmp_path / 'train/dog/notes.txt').write_text('not listed')
  (tmp_path / 'train/dog/._a.jpg').write_text('a file manager left this')
  (tmp_path / 'train/.cache').mkdir()
  source = folder(tmp_path)
  assert source.class_names == ('cat', 'dog')
  assert listing(source, tmp_path / 'train') == [
    ('cat/0.webp', 0),
    ('cat/2020/x.JPEG', 0),
    ('dog/a.jpg', 1),
    ('dog/b.png', 1),
  ]
  assert source.fetch(2) == (tmp_path / 'train/dog/a.jpg').read_bytes()
  assert source.read(2) == (source.fetch(2), 1)


def test_path_itself_may_hold_the_class_folders(tmp_path):
  save(tmp_path / 'a/1.png')
  save(tmp_path / 'b/1.png')
  assert listing(folder(tmp_path), tmp_path) == [('a/1.png', 0), ('b/1.png', 1)]


def test_flat_folder_is_unlabelled(tmp_path):
  save(tmp_path / 'z.png')
  save(tmp_path / 'é.png')
  source = folder(tmp_path)
  assert source.class_names == ()
  assert listing(source, tmp_path) == [('z.png', -1), ('é.png', -1)]


def test_test_split_is_found_and_numbered_as_in_training(tmp_path):
  for name in ('train/a/1.png', 'train/b/1.png', 'train/c/1.png', 'test/c/1.png', 'val/b/9.png'):
    save(tmp_path / name)
  source = folder(tmp_path, 'test')
  assert listing(source, tmp_path) == [('val/b/9.png', 1)]
  assert source.class_names == ('a', 'b', 'c')
  assert listing(folder(tmp_path, 'test', test_split='test'), tmp_path) == [('test/c/1.png', 2)]


def test_a_class_unknown_to_training_is_refused(tmp_path):
  for name in ('train/a/1.png', 'val/b/1.png'):
    save(tmp_path / name)
  with pytest.raises(UserError, match="class folder 'b'"):
    folder(tmp_path, 'test')


def test_links_are_followed_but_not_in_circles(tmp_path):
  save(tmp_path / 'elsewhere/1.png')
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set/a').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'elsewhere/back').symlink_to(tmp_path / 'set/a')
  assert listing(folder(tmp_path / 'set'), tmp_path / 'set') == [('a/1.png', 0)]


def test_limit_is_spread_over_the_classes(tmp_path):
  for label, number in itertools.product('abcd', range(5)):
    save(tmp_path / label / f'{number}.png')
  source = folder(tmp_path, limit=4)
  assert [label for _, label in listing(source, tmp_path)] == [0, 1, 2, 3]
  assert len(folder(tmp_path, limit=100)) == 20


@pytest.mark.parametrize(
  ('fields', 'make', 'split', 'message'),
  [
    ({'path': ''}, (), 'train', 'data.path is empty'),
    ({'path': 'gone'}, (), 'train', "'.*gone' does not exist"),
    ({'path': 'a.png'}, ('a.png',), 'train', 'is a file'),
    ({'path': 'empty'}, ('empty/x.txt',), 'train', 'no images under'),
    ({'path': '.'}, ('a/1.png',), 'test', "no folder 'validation', 'val' or 'test'"),
    ({'path': '.'}, ('val/a/1.png',), 'train', "holds 'val' but no 'train' folder"),
    ({'path': '.', 'train_split': 'big'}, ('a/1.png',), 'train', "no folder 'big'"),
  ],
)
def test_missing_folders_are_one_clear_line(tmp_path, monkeypatch, fields, make, split, message):
  monkeypatch.chdir(tmp_path)
  for name in make:
    if name.endswith('.png'):
      save(tmp_path / name)
    else:
      (tmp_path / name).parent.mkdir(parents=True)
      (tmp_path / name).write_text('no image')
  with pytest.raises(UserError, match=message) as caught:
    folder(split=split, **fields)
  assert '\n' not in str(caught.value)


def test_unknown_names_list_the_known():
  settings = DataSettings(source='folders', image_size=8)
  with pytest.raises(UserError, match=r"'folders'; known: embedded, .*did you mean 'folder'\?"):
    make_source(settings, 'train')
  with pytest.raises(UserError, match="unknown split 'val'; known: train, validation, test"):
    make_source(DataSettings(source='synthetic', image_size=8), 'val')


@pytest.mark.parametrize(
  'fields',
  [{'image_size': 0}, {'views': ()}, {'interpolation': 'cubic'}, {'test_resize': 7}]
  + [{'workers': -1}, {'threads': 0}, {'prefetch': 0}, {'max_bad_share': 2}, {'limit': -1}],
)
def test_impossible_settings_are_refused(fields):
  with pytest.raises(UserError, match=next(iter(fields))):
    DataSettings(**{'source': 'synthetic', 'image_size': 8, **fields})


def test_short_side_is_256_for_224():
  sides = [DataSettings(source='synthetic', image_size=s).short_side for s in (224, 32)]
  assert sides == [256, 36]
  assert DataSettings(source='synthetic', image_size=8, test_resize=9).short_side == 9


def embedded(split):
  return make_source(DataSettings(source='embedded', image_size=32), split)


def test_embedded_counts_are_balanced():
  for split, count in (('train', 5760), ('test', 720)):
    source = embedded(split)
    labels = [source.label(i) for i in range(len(source))]
    assert np.bincount(labels).tolist() == [count // 10] * 10
  assert len(PHOTOGRAPHS) == len(source.class_names) == 10


def test_embedded_train_and_test_share_no_pixel():
  for number in range(len(PHOTOGRAPHS)):
    assert region(number, 'train')[1] == region(number, 'test')[0]
  for split in ('train', 'test'):
    source = embedded(split)
    assert isinstance(source, EmbeddedSource)
    boxes = [source.box(i) for i in range(len(source))]
    assert len(set(boxes)) == len(boxes)
    for number, top, left, side in boxes:
      start, stop = region(number, split)
      assert start <= left
      assert left + side <= stop
      assert 0 <= top <= 320 - side


def test_embedded_crops_are_the_photographs_pixels():
  source = embedded('test')
  for index in (0, 371, 719):
    number, top, left, side = source.box(index)
    image_HWC, label = source.read(index)
    assert image_HWC.shape == (side, side, 3)
    assert image_HWC.dtype == np.uint8
    assert label == number == source.label(index)
    assert (
      source.name(index)
      == f'{source.class_names[number]}[{top}:{top + side}, {left}:{left + side}]'
    )
  colour = {n: source.fetch(next(i for i in range(720) if source.label(i) == n)) for n in range(10)}
  # Grey would mean that the wrong file was found: every photograph is in colour.
  assert all(np.ptp(crop.astype(int), axis=2).max() > 3 for crop in colour.values())


def test_embedded_without_its_packages_says_what_to_install(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install --upgrade scikit-image'):
    embedded('train')


def test_synthetic_is_deterministic_and_its_spectrum_falls():
  settings = DataSettings(source='synthetic', image_size=56)
  source, again = (make_source(settings, 'train') for _ in range(2))
  image_HWC, label = source.read(123)
  np.testing.assert_array_equal(image_HWC, again.fetch(123))
  assert (label, source.label(123)) == (123 % 16, 123 % 16)
  assert image_HWC.shape == (64, 64, 3)
  assert not np.array_equal(image_HWC, source.fetch(123 + 16))
  power = np.abs(np.fft.fft2(image_HWC[:, :, 1].astype(float))) ** 2
  radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(64, 1 / 64)] * 2))
  low, high = (power[(radius >= r) & (radius < r + 4)].mean() for r in (2, 16))
  # 1/f amplitude is 1/f^2 power: (18 / 4)^2 = 20 in expectation, and a factor of two for the draw.
  assert 10 < low / high < 40


@pytest.mark.parametrize('name', ['folder', 'embedded', 'synthetic'])
def test_sources_travel_to_workers(name, tmp_path):
  save(tmp_path / 'a/1.png')
  settings = DataSettings(source=name, path=str(tmp_path), image_size=16)
  source = make_source(settings, 'train')
  copy = pickle.loads(pickle.dumps(source))
  assert (len(copy), copy.name(0), copy.label(0)) == (len(source), source.name(0), source.label(0))
  np.testing.assert_array_equal(copy.fetch(0), source.fetch(0))


def test_a_validation_split_and_the_rest_make_the_training_split():
  """Of a sorted source both parts keep every class; the test split and its size stay."""
  plain = DataSettings(source='synthetic', image_size=8)
  held = dataclasses.replace(plain, validation=0.25)
  whole, train, validation = (
    make_source(settings, split)
    for settings, split in ((plain, 'train'), (held, 'train'), (held, 'validation'))
  )
  assert len(validation) == round(0.25 * len(whole)) and len(train) + len(validation) == len(whole)
  names = [source.name(i) for source in (train, validation) for i in range(len(source))]
  assert sorted(names) == sorted(whole.name(i) for i in range(len(whole)))
  assert len(set(names)) == len(whole)
  assert len(make_source(held, 'test')) == len(make_source(plain, 'test'))
  # Evenly spread: one in each stretch of four.
  chosen = np.array([int(validation._indices[i]) for i in range(len(validation))])
  np.testing.assert_array_equal(chosen // 4, np.arange(len(validation)))
  # A limit takes its share of what is left.
  limited = make_source(dataclasses.replace(held, limit=10), 'train')
  assert len(limited) == 10 and {limited.name(i) for i in range(10)} <= set(names[: len(train)])


@pytest.mark.parametrize('share, split', [(0.0, 'validation'), (1e-6, 'train')])
def test_a_validation_split_without_images_is_refused(share, split):
  settings = DataSettings(source='synthetic', image_size=8, validation=share)
  with pytest.raises(UserError, match='leaves 0 to validate on'):
    make_source(settings, split)


@pytest.mark.parametrize('order', ['sorted', 'alternating'])
def test_a_limit_and_a_validation_split_keep_every_class(tmp_path, order):
  """Whether the source lists class after class, or each class in turn."""

  class Labelled(Source):
    def __len__(self):
      return 1000

    def read(self, index):
      return b'', index // 100 if order == 'sorted' else index % 10

  for subset in (evenly_spread(Labelled(), 200), held_out(Labelled(), 0.2, 'validation')):
    counts = np.bincount([subset.label(i) for i in range(len(subset))], minlength=10)
    # 20 of each on average; sorted data give that exactly, alternating ones by chance.
    assert len(subset) == 200 and counts.min() >= (20 if order == 'sorted' else 8)
