"""Array records: written from folders and tars like ImageNet's, resumed, and read back."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy import io as scipy_io

from folk_jax.data import DataSettings, make_source, prepare, records
from folk_jax.data.plans import DEVKIT_TAR, TRAIN_TAR, VAL_TAR, plan_folder, plan_imagenet_tars
from folk_jax.data.prepare import write_plans
from folk_jax.errors import UserError


def jpeg(value: int) -> bytes:
  buffer = io.BytesIO()
  Image.new('RGB', (12, 10), (value, 0, 0)).save(buffer, 'JPEG')
  return buffer.getvalue()


def read(path, split='train', **fields):
  settings = DataSettings(source='array_record', path=str(path), image_size=8, **fields)
  return make_source(settings, split)


def samples(source):
  return [source.read(i) for i in range(len(source))]


@pytest.fixture
def photos(tmp_path):
  """A folder with two classes in training (5 and 3 images) and one of them in 'val' (2)."""
  counts = {'train/ant': 5, 'train/bee': 3, 'val/bee': 2}
  for name, count in counts.items():
    (tmp_path / 'photos' / name).mkdir(parents=True)
    for number in range(count):
      (tmp_path / 'photos' / name / f'{number}.jpg').write_bytes(jpeg(len(name) * 10 + number))
  return tmp_path / 'photos'


def test_a_record_round_trips():
  for label, name, data in ((7, 'a/é.jpg', b'\x00\xff'), (-1, '', b''), (999, 'x' * 70_000, b'1')):
    assert records.unpack(records.pack(label, name, data)) == (label, name[:65_535], data)


def test_a_folder_comes_back_as_it_was(photos, tmp_path):
  out = tmp_path / 'out'
  assert write_plans(plan_folder(str(photos), 3), str(out), quiet=True) == []
  for split in ('train', 'test'):
    wanted = make_source(DataSettings(source='folder', path=str(photos), image_size=8), split)
    found = read(out, split)
    assert samples(found) == samples(wanted)
    assert found.class_names == ('ant', 'bee')
    assert str(photos) in found.name(0)
  index = json.loads((out / 'index.json').read_text())
  assert [shard['samples'] for shard in index['splits']['train']['shards']] == [3, 3, 2]
  assert sorted(os.listdir(out)) == [
    'index.json',
    'train-00000-of-00003.array_record',
    'train-00001-of-00003.array_record',
    'train-00002-of-00003.array_record',
    'val-00000-of-00001.array_record',
  ]


def test_the_source_travels_after_it_was_read(photos, tmp_path):
  write_plans(plan_folder(str(photos), 3), str(tmp_path / 'out'), quiet=True)
  source = read(tmp_path / 'out')
  wanted = samples(source)
  assert samples(pickle.loads(pickle.dumps(source))) == wanted


def test_a_stopped_run_goes_on_and_keeps_finished_shards(photos, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  written = []
  write_shard = prepare._write_shard

  def stops_at_the_third(path, shard, check, bar):
    if len(written) == 2:
      with open(path + '.part', 'wb') as half:
        half.write(b'half a shard')
      raise KeyboardInterrupt
    written.append(path)
    return write_shard(path, shard, check, bar)

  monkeypatch.setattr(prepare, '_write_shard', stops_at_the_third)
  with pytest.raises(KeyboardInterrupt):
    write_plans(plan_folder(str(photos), 2), str(out), quiet=True)
  with pytest.raises(UserError, match="split 'train' of .* is not finished"):
    read(out)
  before = {path: os.stat(path).st_mtime_ns for path in written}

  monkeypatch.setattr(prepare, '_write_shard', write_shard)
  write_plans(plan_folder(str(photos), 2), str(out), quiet=True)
  assert {path: os.stat(path).st_mtime_ns for path in written} == before
  wanted = make_source(DataSettings(source='folder', path=str(photos), image_size=8), 'train')
  assert samples(read(out)) == samples(wanted)
  assert not [name for name in os.listdir(out) if name.endswith('.part')]


def test_another_data_set_is_not_mixed_in(photos, tmp_path):
  out = tmp_path / 'out'
  write_plans(plan_folder(str(photos), 3), str(out), quiet=True)
  (photos / 'train/ant/9.jpg').write_bytes(jpeg(1))
  with pytest.raises(UserError, match='holds another data set'):
    write_plans(plan_folder(str(photos), 3), str(out), quiet=True)


def test_check_leaves_bad_files_out(photos, tmp_path):
  (photos / 'train/ant/1.jpg').write_bytes(b'')
  bad = write_plans(plan_folder(str(photos), 3), str(tmp_path / 'out'), check=True, quiet=True)
  assert bad == [f'{photos}/train/ant/1.jpg (empty file)']
  assert len(read(tmp_path / 'out')) == 7


def tar_of(files: dict[str, bytes], mode='w') -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


@pytest.fixture
def tars(tmp_path):
  """ImageNet's three downloads in small: 3 classes of 2 images, 4 validation images."""
  root = tmp_path / 'tars'
  root.mkdir()
  wnids = ['n03', 'n01', 'n02']  # out of order: labels follow the sorted ids
  images = {w: {f'{w}_{i}.JPEG': jpeg(int(w[1:]) * 10 + i) for i in range(2)} for w in wnids}
  classes = {f'{wnid}.tar': tar_of(files) for wnid, files in images.items()}
  (root / TRAIN_TAR).write_bytes(tar_of(classes))
  val = {f'ILSVRC2012_val_{i:08d}.JPEG': jpeg(200 + i) for i in (2, 1, 4, 3)}
  (root / VAL_TAR).write_bytes(tar_of(val))
  # The devkit numbers its classes in an order of its own: 1 is n02, 2 is n03, 3 is n01.
  synsets = np.array(
    [(1, 'n02'), (2, 'n03'), (3, 'n01')], dtype=[('ILSVRC2012_ID', object), ('WNID', object)]
  )
  mat = io.BytesIO()
  scipy_io.savemat(mat, {'synsets': synsets})
  data = 'ILSVRC2012_devkit_t12/data/'
  truth = {data + 'ILSVRC2012_validation_ground_truth.txt': b'3\n1\n2\n1\n'}
  devkit = tar_of({**truth, data + 'meta.mat': mat.getvalue()}, 'w:gz')
  (root / DEVKIT_TAR).write_bytes(devkit)
  return root


def test_imagenets_tars(tars, tmp_path):
  out = tmp_path / 'out'
  write_plans(plan_imagenet_tars(str(tars), 3), str(out), quiet=True)
  train, test = read(out), read(out, 'test')
  assert train.class_names == ('n01', 'n02', 'n03')
  assert samples(train) == [(jpeg(c * 10 + i), c - 1) for c in (1, 2, 3) for i in range(2)]
  # Ground truth 3, 1, 2, 1 is n01, n02, n03, n02, for the images in the order of their names.
  assert samples(test) == [(jpeg(200 + i), c) for i, c in ((1, 0), (2, 1), (3, 2), (4, 1))]
  assert train.name(0).endswith('n01_0.JPEG')


def test_tars_that_are_not_there_or_not_whole(tars, tmp_path):
  with pytest.raises(UserError, match=f'no {TRAIN_TAR}'):
    plan_imagenet_tars(str(tmp_path), 3)
  devkit = (tars / DEVKIT_TAR).read_bytes()
  (tars / DEVKIT_TAR).write_bytes(devkit[: len(devkit) // 2])
  with pytest.raises(UserError, match='is not the ILSVRC2012 devkit'):
    plan_imagenet_tars(str(tars), 3)
  (tars / DEVKIT_TAR).unlink()
  with pytest.raises(UserError, match=f'{VAL_TAR} needs {DEVKIT_TAR}'):
    plan_imagenet_tars(str(tars), 3)
  (tars / VAL_TAR).unlink()
  assert [plan.split for plan in plan_imagenet_tars(str(tars), 3)] == ['train']
  (tars / TRAIN_TAR).write_bytes(b'no tar at all')
  with pytest.raises(UserError, match='cannot be read as a tar'):
    plan_imagenet_tars(str(tars), 3)


@pytest.mark.parametrize(
  ('index', 'fields', 'message'),
  [
    (None, {}, 'no index.json in .*prepare_data.sh'),
    ('{', {}, 'is not JSON'),
    ('[]', {}, 'prepare the data set again'),
    ({'format': 'folk_jax', 'version': 2}, {}, 'prepare the data set again'),
    ({}, {'test_split': 'dev'}, "no split 'dev'; known: train"),
    ({}, {}, "no split 'validation / val / test'; known: train"),
  ],
)
def test_a_folder_that_is_none_of_ours(tmp_path, index, fields, message):
  ours = {'format': 'folk_jax', 'version': 1, 'class_names': [], 'splits': {'train': {}}}
  if index is not None:
    text = index if isinstance(index, str) else json.dumps({**ours, **index})
    (tmp_path / 'index.json').write_text(text)
  with pytest.raises(UserError, match=message):
    read(tmp_path, 'test', **fields)


def test_a_missing_shard_and_no_path(photos, tmp_path):
  write_plans(plan_folder(str(photos), 3), str(tmp_path / 'out'), quiet=True)
  (tmp_path / 'out/train-00001-of-00003.array_record').unlink()
  with pytest.raises(UserError, match="shard 'train-00001-of-00003.array_record' .* is missing"):
    read(tmp_path / 'out')
  with pytest.raises(UserError, match='data.path is empty'):
    read('')


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'folk_jax.data.prepare', *arguments],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_the_command(photos, tmp_path):
  out = tmp_path / 'out'
  done = command('--from=folder', f'--source={photos}', f'--out={out}')
  assert (done.returncode, done.stdout) == (
    0,
    f'{out} is ready: 8 train, 2 val images, 2 classes\n',
  )
  assert len(read(out)) == 8
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/file').touch()
  for arguments, message in (
    (('--from=folder', '--source=/gone', f'--out={out}'), "'/gone' does not exist"),
    (('--from=folder', f'--source={photos}'), 'needs --source=DIR and --out=DIR'),
    (('--from=folder', f'--source={photos}', f'--out={tmp_path}/other'), 'is not empty'),
    (('--from=folder', f'--source={photos}', f'--out={photos}/val/bee/0.jpg/x'), 'cannot be'),
  ):
    failed = command(*arguments)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert failed.stderr.count('\n') == 1
