"""Shards that are damaged and tars with tricks: refused or passed over, by file, shard and record."""

import gzip
import io
import json
import os
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import (
  DataSettings,
  eval_batches,
  make_source,
  plans,
  prepare,
  records,
  train_batches,
)
from folk_jax.errors import UserError

COUNT = 24


def jpeg(value):
  buffer = io.BytesIO()
  Image.new('RGB', (12, 10), (value, 0, 0)).save(buffer, 'JPEG')
  return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
  """Four shards of six records each."""
  folder = tmp_path / 'photos' / 'train' / 'ant'
  folder.mkdir(parents=True)
  for number in range(COUNT):
    (folder / f'{number:02d}.jpg').write_bytes(jpeg(number) + bytes(30_000))
  prepare.write_plans(
    plans.plan_folder(str(tmp_path / 'photos'), 6), str(tmp_path / 'out'), quiet=True
  )
  return tmp_path / 'out'


def of_records(path, **fields):
  return DataSettings(source='array_record', path=str(path), image_size=8, threads=1, **fields)


def test_a_damaged_record_is_named_by_shard_and_number_and_passed_over(shards):
  shard = shards / 'train-00001-of-00004.array_record'
  data = bytearray(shard.read_bytes())
  at = data.index(bytes(20_000)) + 10_000
  data[at : at + 8] = b'damaged!'
  shard.write_bytes(data)
  settings = of_records(shards, max_bad_share=0.05)
  source = make_source(settings, 'train')
  with eval_batches(source, settings, batch_size=6) as batches:
    valid = np.concatenate([batch['valid'] for batch in batches])
    names = batches.bad_names
  assert np.flatnonzero(~valid).tolist() == [6]
  assert names == [f'{shard}, record 0']
  assert source.name(7).startswith(f'{shard}, record 1: ')
  with train_batches(source, settings, seed=3, step=0, batch_size=8) as batches:
    for _ in range(3):
      next(batches)
    assert batches.bad_names == names


@pytest.mark.parametrize('how', ['cut', 'gone', 'empty', 'zeros'])
def test_a_bad_shard_stops_the_run_by_its_name(shards, how):
  shard = shards / 'train-00002-of-00004.array_record'
  settings = of_records(shards, max_bad_share=0.2)
  source = make_source(settings, 'train')
  size = shard.stat().st_size
  if how == 'gone':
    shard.unlink()
  elif how == 'zeros':
    shard.write_bytes(bytes(size))
  else:
    os.truncate(shard, {'cut': size // 2, 'empty': 0}[how])
  with (
    pytest.raises(UserError) as caught,
    train_batches(source, settings, seed=3, step=0, batch_size=24) as batches,
  ):
    next(batches)
  message = str(caught.value)
  assert '6 of 24 samples do not decode' in message or '5 of 24' in message
  assert str(shard) in message
  assert 'the shard cannot be read: 6 records expected, 0 found' in message
  if how == 'gone':
    with pytest.raises(UserError, match='is missing'):
      make_source(settings, 'train')


def test_an_index_that_leads_outside_and_a_record_that_is_none(shards):
  with pytest.raises(struct.error):
    records.unpack(b'abc')
  index = json.loads((shards / 'index.json').read_text())
  index['splits']['train']['shards'][0]['file'] = '../../secret.array_record'
  (shards / 'index.json').write_text(json.dumps(index))
  with pytest.raises(UserError, match='outside its folder'):
    make_source(of_records(shards), 'train')


def tar(path, *members, mode='w'):
  """Writes a tar of (TarInfo or name, bytes)."""
  with tarfile.open(path, mode) as made:
    for info, data in members:
      if isinstance(info, str):
        info = tarfile.TarInfo(info)
        info.size = len(data)
      made.addfile(info, io.BytesIO(data))


def odd(name, kind=tarfile.REGTYPE, size=0, **fields):
  info = tarfile.TarInfo(name)
  info.type, info.size = kind, size
  for field, value in fields.items():
    setattr(info, field, value)
  return info


@pytest.mark.parametrize(
  ('member', 'message'),
  [
    (odd('/etc/n01.tar'), 'leads out of its folder'),
    (odd('a/../../n01.tar'), 'leads out of its folder'),
    (odd('n01.tar', tarfile.SYMTYPE, linkname='/etc/passwd'), "a link to '/etc/passwd'"),
    (odd('n01.tar', tarfile.LNKTYPE, linkname='n02.tar'), "a link to 'n02.tar'"),
    (odd('n01.tar', tarfile.CHRTYPE), 'a device or a pipe'),
    (odd('n01.tar', tarfile.FIFOTYPE), 'a device or a pipe'),
  ],
)
def test_tars_with_tricks_are_refused_in_words(member, message, tmp_path):
  tar(tmp_path / plans.TRAIN_TAR, (member, b''))
  with pytest.raises(UserError) as caught:
    plans.plan_imagenet_tars(str(tmp_path), 3)
  assert message in str(caught.value)
  assert plans.TRAIN_TAR in str(caught.value)
  assert member.name in str(caught.value)


def written(tmp_path):
  prepare.write_plans(plans.plan_imagenet_tars(str(tmp_path), 3), str(tmp_path / 'out'), quiet=True)


def test_tars_inside_tars_are_looked_at_alike(tmp_path):
  inner = tmp_path / 'n01.tar'
  tar(inner, ('good.jpg', jpeg(1)), (odd('../bad.jpg'), b''))
  tar(tmp_path / plans.TRAIN_TAR, ('n01.tar', inner.read_bytes()))
  with pytest.raises(UserError, match=r"n01.tar' holds '../bad.jpg', whose name leads out"):
    written(tmp_path)
  assert not (tmp_path / 'bad.jpg').exists()
  tar(tmp_path / plans.TRAIN_TAR, ('n02.tar', b'no tar' * 1000))
  shutil.rmtree(tmp_path / 'out')
  with pytest.raises(UserError, match=r'n02.tar. cannot be read as a tar'):
    written(tmp_path)


def test_sizes_that_tars_only_declare_are_not_allocated(tmp_path):
  # A file of sixteen gigabytes, with a kilobyte behind it; then one that claims a little more than there is.
  for size, message in (
    (1 << 35, 'of 34359738368 bytes, more than'),
    (1 << 20, 'cannot be read as a tar'),
  ):
    head = odd('n01.tar', size=size).tobuf()
    (tmp_path / plans.TRAIN_TAR).write_bytes(head + bytes(1024))
    with pytest.raises(UserError, match=message):
      written(tmp_path)
  # A few bytes of a sparse file may claim any size.
  sparse = {'major': '1', 'minor': '0', 'name': 'n01.tar', 'realsize': str(1 << 40)}
  headers = {f'GNU.sparse.{key}': value for key, value in sparse.items()}
  sparse = odd('n01.tar', size=512, pax_headers=headers)
  tar(tmp_path / plans.TRAIN_TAR, (sparse, b'0\n' + bytes(510)))
  with pytest.raises(UserError, match='a file with holes of 1099511627776 bytes'):
    written(tmp_path)


def test_a_compressed_tar_that_is_a_bomb(tmp_path):
  """Half a megabyte that unpacks to more than a gigabyte is given up before it is unpacked."""
  tar(tmp_path / plans.TRAIN_TAR, ('n01.tar', b''))
  tar(tmp_path / plans.VAL_TAR, ('a.jpg', jpeg(1)))
  with gzip.open(tmp_path / plans.DEVKIT_TAR, 'wb', compresslevel=1) as file:
    file.write(odd('zeros', size=(1 << 30) + 1).tobuf() + bytes(1 << 20))
  with pytest.raises(UserError, match="'zeros', of 1073741825 bytes, more than"):
    plans.plan_imagenet_tars(str(tmp_path), 3)


def test_a_file_that_cannot_be_read_stops_preparing_by_its_name(tmp_path):
  (tmp_path / 'photos' / 'a').mkdir(parents=True)
  os.mkfifo(tmp_path / 'photos' / 'a' / 'pipe.jpg')
  with pytest.raises(UserError, match=r'a/pipe.jpg. cannot be read .not a regular file'):
    prepare.write_plans(
      plans.plan_folder(str(tmp_path / 'photos'), 6), str(tmp_path / 'out'), quiet=True
    )
