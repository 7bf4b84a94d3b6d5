"""Reads that fail: what shows damage, what may pass, and that no whole checkpoint is given up for either."""

import errno
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from folk_jax import checkpoint
from folk_jax.checkpoint import digests, files, manager, reading
from folk_jax.errors import UserError

STATE = {'a': np.arange(12, dtype=np.float32)}
# Disks, NFS, FUSE (gcsfuse), Lustre, iSCSI.
PASSING = (
  errno.EIO,
  errno.ESTALE,
  errno.ETIMEDOUT,
  errno.ENOTCONN,
  errno.EREMOTEIO,
  errno.EHOSTDOWN,
)


def here():
  sharding = SingleDeviceSharding(jax.devices()[0])
  return {'a': jax.ShapeDtypeStruct((12,), np.float32, sharding=sharding)}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('saved')
  with checkpoint.Checkpoints(str(path), 1, 9) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, STATE, {'step': step})
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'copy'))


def refused(path: pathlib.Path) -> UserError:
  """What a resume says; nothing may have been moved."""
  with checkpoint.Checkpoints(str(path), 1, 9) as checkpoints:
    with pytest.raises(UserError) as error:
      checkpoints.restore(here())
    assert checkpoints.all_steps() == [1, 2]
  return error.value


def assert_passing(error: UserError) -> None:
  assert not isinstance(error, checkpoint.Damaged)
  assert 'step 2 in' in str(error) and 'could not be read this time' in str(error)
  assert str(error).endswith(': start again') and 'remove' not in str(error)


def fail(number: int):
  def raise_it(*_, **__):
    raise OSError(number, os.strerror(number))

  return raise_it


def without_digests(path: pathlib.Path) -> pathlib.Path:
  for step in ('1', '2'):
    (path / step / digests.NAME).unlink()
  return path


@pytest.mark.parametrize('number', PASSING)
@pytest.mark.parametrize('place', ['a digest', 'a list of files', 'meta', 'the arrays'])
def test_a_moment_of_failing_storage_condemns_no_step(copy, monkeypatch, number, place):
  if place == 'a digest':
    monkeypatch.setattr(digests, '_digest', fail(number))
  elif place == 'a list of files':
    scandir = os.scandir
    monkeypatch.setattr(
      os,
      'scandir',
      lambda top: fail(number)() if str(top).endswith('2/state') else scandir(top),
    )
  elif place == 'meta':
    without_digests(copy)
    monkeypatch.setattr(files, 'read_json', fail(number))
  else:
    without_digests(copy)
    monkeypatch.setattr(ocp.CheckpointManager, 'restore', fail(number))
  error = refused(copy)
  assert_passing(error)
  assert os.strerror(number) in str(error)
  monkeypatch.undo()
  with checkpoint.Checkpoints(str(copy), 1, 9) as checkpoints:
    np.testing.assert_array_equal(checkpoints.restore(here())[0]['a'], STATE['a'])


@pytest.mark.parametrize('raised', [ValueError('no such axis'), FileNotFoundError(2, 'gone')])
def test_a_step_whose_digests_match_is_never_damaged_whatever_fails_after(
  copy, monkeypatch, raised
):
  """A mistake of ours, or of Orbax's, costs no checkpoint."""

  def raise_it(*_, **__):
    raise raised

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', raise_it)
  error = refused(copy)
  assert_passing(error)
  assert 'its files are those that were written' in str(error) and error.__cause__ is raised


@pytest.mark.parametrize(
  ('words', 'passing'),
  [
    ("UNKNOWN: Error reading file [os_error_code='107']", True),
    ("NOT_FOUND: Error reading file [os_error_code='2']", False),
    ('UNAVAILABLE: HTTP 503', True),
    ('DATA_LOSS: CRC-32C checksum', False),
  ],
)
def test_without_digests_what_tensorstore_says_decides(words, passing):
  """Where it says damage, nobody is told to remove a step that no digest has condemned."""
  kind = UserError if passing else checkpoint.Damaged
  with pytest.raises(kind) as error, reading.reading(epath.Path('/steps'), 2):
    raise ValueError(words)
  assert type(error.value) is kind and 'remove' not in str(error.value)
  # Buckets have checksums of their own.
  with pytest.raises(UserError) as error, reading.reading(epath.Path('gs://run/steps'), 2):
    raise ValueError(words)
  assert_passing(error.value)


def test_damage_that_the_format_shows_is_damage_without_digests(copy):
  without_digests(copy)
  (copy / '2' / 'meta' / 'metadata').write_text('{"format_version": "one"}')
  with pytest.raises(checkpoint.Damaged, match=rf"version is 'one'\); remove {copy}/2 to go on"):
    checkpoint.read_subtree(str(copy), ())
  with checkpoint.Checkpoints(str(copy), 1, 9) as checkpoints:
    assert checkpoints.restore(here())[1]['step'] == 1
  assert (copy / '2.damaged').is_dir()


def test_what_takes_too_long_to_read_back_has_no_digests_where_others_wait(
  copy, monkeypatch, caplog
):
  caplog.set_level('INFO')
  unnamed = copy / '3.orbax-checkpoint-tmp'
  with checkpoint.Checkpoints(str(copy), 1, 9) as checkpoints:
    shutil.copytree(copy / '2', unnamed, ignore=shutil.ignore_patterns(digests.NAME))
    checkpoints._last_saved, checkpoints._bytes = 3, digests.MOST_BYTES_OF_SEVERAL + 1
    with monkeypatch.context() as patch:
      patch.setattr(manager.jax, 'process_count', lambda: 2)
      checkpoints._write_digests()
      assert not digests.exist(unnamed) and 'step 3 has no digests' in caplog.text
      checkpoints._bytes -= 1
      checkpoints._write_digests()
      assert digests.exist(unnamed)
      (unnamed / digests.NAME).unlink()
    checkpoints._bytes += 1
    checkpoints._write_digests()  # Alone, nobody waits.
    assert digests.problem(unnamed, reading.ITEMS) == '' and digests.exist(unnamed)


def test_a_small_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
  file = tmp_path / 'deep' / 'file.json'
  checkpoint.replace_text(file, 'old')
  monkeypatch.setattr(os, 'fsync', fail(errno.ENOSPC))
  with pytest.raises(OSError, match='No space left'):
    checkpoint.replace_text(file, 'new')
  assert file.read_text() == 'old'
  monkeypatch.undo()
  checkpoint.replace_text(file, 'new é')
  assert file.read_text(encoding='utf-8') == 'new é'
  assert [path.name for path in file.parent.iterdir()] == ['file.json']
