"""TFDS through ArrayRecord, with a builder of our own: no TensorFlow, no network."""

import importlib.resources
import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from folk_jax.data import DataSettings, eval_batches, make_source
from folk_jax.data.decode import decode
from folk_jax.errors import UserError


def png(value: int) -> bytes:
  buffer = io.BytesIO()
  Image.new('RGB', (12, 10), (value, 0, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


def prepare(data_dir, file_format='array_record'):
  """Writes a data set 'tinted' with 10 training and 4 validation images; returns its builder."""

  class Tinted(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = data_dir

    def _info(self):
      features = {
        'id': tfds.features.Scalar(np.int64),
        'photo': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
        'kind': tfds.features.ClassLabel(names=['even', 'odd']),
      }
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {
        'train': self._generate_examples(0, 10),
        'validation': self._generate_examples(100, 104),
      }

    def _generate_examples(self, start, stop):
      for number in range(start, stop):
        yield number, {'id': number, 'photo': io.BytesIO(png(number)), 'kind': number % 2}

  builder = Tinted(data_dir=data_dir, file_format=file_format)
  builder.download_and_prepare()
  return builder


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp('tfds')
  with pytest.MonkeyPatch.context() as patch:
    # TFDS writes a set only with this backport, which it does not declare; it reads without.
    patch.setitem(sys.modules, 'importlib_resources', importlib.resources)
    prepare(path)
  return path


def settings(**fields):
  return DataSettings(**{'source': 'tfds', 'image_size': 8, **fields})


def test_raw_bytes_labels_names_and_no_tensorflow(data_dir):
  source = make_source(settings(name='tinted', path=str(data_dir)), 'train')
  assert len(source) == 10
  assert source.class_names == ('even', 'odd')
  samples = [source.read(i) for i in range(10)]
  # TFDS writes samples in an order of its own: the red level tells which is which.
  reds = [int(decode(data)[0, 0, 0]) for data, _ in samples]
  assert sorted(reds) == list(range(10))
  assert [label for _, label in samples] == [red % 2 for red in reds]
  assert samples[3][0] == png(reds[3])
  assert source.name(3) == 'tinted/1.0.0/train[3]'
  assert 'tensorflow' not in sys.modules


def test_the_validation_split_and_sub_splits(data_dir):
  one = settings(name='tinted', path=str(data_dir))
  assert len(make_source(one, 'test')) == 4
  half = settings(name='tinted', path=str(data_dir), train_split='train[:50%]')
  assert len(make_source(half, 'train')) == 5


def test_a_prepared_folder_needs_no_name_and_travels_to_workers(data_dir):
  source = make_source(settings(path=str(data_dir / 'tinted' / '1.0.0')), 'test')
  copy = pickle.loads(pickle.dumps(source))
  assert [copy.read(i) for i in range(4)] == [source.read(i) for i in range(4)]
  with eval_batches(copy, settings(), batch_size=4) as batches:
    (batch,) = batches
  assert sorted(batch['views'][:, 0, 0, 0, 0]) == [100, 101, 102, 103]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({}, 'data.name is empty'),
    ({'name': 'cifar11'}, "unknown TFDS set 'cifar11'.*did you mean .*cifar10"),
    ({'name': 'tinted', 'train_split': 'trian'}, "no split 'trian'; known: train, validation"),
    ({'name': 'tinted:9.9.9'}, "TFDS set 'tinted:9.9.9'"),
  ],
)
def test_mistakes_are_one_clear_line(data_dir, fields, message):
  with pytest.raises(UserError, match=message) as caught:
    make_source(settings(**{'path': str(data_dir), **fields}), 'train')
  assert '\n' not in str(caught.value)


def test_a_set_that_is_not_prepared_says_how(tmp_path, monkeypatch):
  # As on a machine without TensorFlow, whether or not this one has it.
  def refuse(self, **kwargs):
    raise ModuleNotFoundError("No module named 'tensorflow'")

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', refuse)
  for name, cure in (
    ('cifar10', 'from=tfds --name=cifar10'),
    ('imagenet2012', 'from=imagenet_tars'),
  ):
    with pytest.raises(UserError, match=f'is not prepared .*folk_jax.prepare.*--{cure}') as caught:
      make_source(settings(name=name, path=str(tmp_path)), 'train')
    assert '\n' not in str(caught.value)


def test_files_to_fetch_by_hand_and_failed_downloads_are_said(tmp_path, monkeypatch):
  # Where the extra `prepare` is installed; without it TFDS isn't asked at all.
  monkeypatch.setitem(sys.modules, 'importlib_resources', importlib.resources)
  for error, words in ((AssertionError('Fetch\nby hand'), 'by hand'), (OSError('down'), 'failed')):

    def refuse(self, error=error, **kwargs):
      raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', refuse)
    with pytest.raises(UserError, match=f'is not prepared.*{words}') as caught:
      make_source(settings(name='imagenet2012', path=str(tmp_path)), 'train')
    assert '\n' not in str(caught.value)
