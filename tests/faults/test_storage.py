"""Storage that fails: full disks, damage, two runs in a workdir, a clock that jumps; real files, real processes.

benchmarks/faults/storage.py tries more of each.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import storage  # noqa: E402  # Tests and trials share the faults.
import storage_runs  # noqa: E402

from folk_jax import checkpoint  # noqa: E402
from folk_jax.errors import UserError  # noqa: E402
from folk_jax.train import lock, metrics, workdir  # noqa: E402
from folk_jax.train.best import Best  # noqa: E402

NOISE = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)  # Does not compress.


def state_of(step: int) -> dict:
  return {'a': NOISE * step, 'b': np.arange(3) + step}


def here(tree):
  sharding = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Steps 1, 2 and 3, to copy."""
  path = tmp_path_factory.mktemp('saved')
  with checkpoint.Checkpoints(str(path), 1, 9) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_of(step), {'step': step})
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'copy'))


def resumed(path: pathlib.Path, caplog) -> tuple[int, list[str]]:
  """The step that is gone on from, compared with what was saved, and the warnings."""
  caplog.clear()
  with checkpoint.Checkpoints(str(path), 1, 9) as checkpoints:
    state, meta = checkpoints.restore(here(state_of(0)))
  for name, array in state_of(meta['step']).items():
    np.testing.assert_array_equal(state[name], array)
  return meta['step'], [one.getMessage() for one in caplog.records if one.levelname == 'WARNING']


@pytest.mark.parametrize('asynchronous', [True, False])
def test_every_file_of_a_step_has_a_checksum_before_the_step_has_its_name(tmp_path, asynchronous):
  with checkpoint.Checkpoints(str(tmp_path), 1, 9, asynchronous=asynchronous) as checkpoints:
    checkpoints.save(1, state_of(1), {})
  folder = tmp_path / '1'
  digests = json.loads((folder / 'digests.json').read_text())['files']
  files = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
  # Orbax's own marks of the step, outside of its items.
  assert files - set(digests) == {'digests.json', '_CHECKPOINT_METADATA', 'commit_success.txt'}
  assert all(size == (folder / name).stat().st_size for name, (size, _) in digests.items())


def test_whole_checkpoints_warn_of_nothing(copy, caplog):
  assert resumed(copy, caplog) == (3, [])


@pytest.mark.parametrize('kind', storage.DAMAGE)
def test_a_damaged_step_is_passed_over_loudly_and_kept_aside(kind, copy, caplog):
  for step in (3, 2):
    storage.DAMAGE[kind](copy / str(step), random.Random(step))
  found, warnings = resumed(copy, caplog)
  assert found == 1 and len(warnings) == 2
  for step, warning in zip((3, 2), warnings, strict=True):
    assert warning.startswith(f'step {step} in {copy} is damaged (')
    assert warning.endswith(f'kept aside as {step}.damaged, going on from step 1')
  assert sorted(path.name for path in copy.iterdir()) == ['1', '2.damaged', '3.damaged']
  # Said once; and a step of the same number may be saved, and damaged, again.
  assert resumed(copy, caplog) == (1, [])
  shutil.copytree(copy / '1', copy / '3')
  storage.DAMAGE[kind](copy / '3', random.Random(0))
  assert resumed(copy, caplog)[0] == 1
  assert (copy / '3.damaged.2').is_dir()


def test_any_flipped_bit_is_found(copy):
  """Also those that Orbax does not look at, and in the digests themselves."""
  draws = random.Random(0)
  files = [path for item in ('state', 'meta') for path in (copy / '3' / item).rglob('*')]
  files = [path for path in files if path.is_file()] + [copy / '3' / 'digests.json']
  for file in files:
    whole = file.read_bytes()
    storage._flip(file, draws)
    with pytest.raises(checkpoint.Damaged, match='step 3 in'):
      checkpoint.read_subtree(str(copy), ('b',))
    file.write_bytes(whole)
  assert checkpoint.read_subtree(str(copy), ('b',))[2] == 3


def test_where_none_is_whole_nothing_is_begun_or_moved(copy):
  for step in (1, 2, 3):
    storage._flip(storage._array_file(copy / str(step)), random.Random(step))
  with checkpoint.Checkpoints(str(copy), 1, 9) as checkpoints:
    with pytest.raises(UserError, match='no whole checkpoint is left in .*step 3: .*step 1: '):
      checkpoints.restore(here(state_of(0)))
    assert checkpoints.all_steps() == [1, 2, 3]


def test_a_step_from_before_there_were_digests_is_read(copy, caplog):
  (copy / '3' / 'digests.json').unlink()
  assert resumed(copy, caplog) == (3, [])


def test_storage_that_fails_for_the_moment_condemns_no_checkpoint(copy, monkeypatch):
  def refuse(*_):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(checkpoint.digests, 'problem', refuse)
  with checkpoint.Checkpoints(str(copy), 1, 9) as checkpoints:
    with pytest.raises(UserError, match='step 3 .* could not be read this time .* start again'):
      checkpoints.restore(here(state_of(0)))
    assert checkpoints.all_steps() == [1, 2, 3]


def test_who_reads_only_moves_nothing(copy):
  storage._flip(storage._array_file(copy / '3'), random.Random(0))
  (copy / '4.orbax-checkpoint-tmp').mkdir()
  with checkpoint.Checkpoints(str(copy), 0, 1, read_only=True) as checkpoints:
    with pytest.raises(checkpoint.Damaged):
      checkpoints.restore(here(state_of(0)))
  assert sorted(one.name for one in copy.iterdir()) == ['1', '2', '3', '4.orbax-checkpoint-tmp']


def test_a_damaged_best_is_kept_aside_and_the_next_evaluation_takes_its_place(tmp_path, caplog):
  about = {'config': {'evaluation': {'knn': 5}}}
  with Best('eval/top1', str(tmp_path), about, False) as best:
    assert best.offer(2, {'eval/top1': 0.9}, state_of(2))
  storage._flip(storage._array_file(tmp_path / 'best' / '2'), random.Random(0))
  with Best('eval/top1', str(tmp_path), about, False) as best:
    assert 'kept aside as 2.damaged, going on without it' in caplog.text
    assert best.offer(4, {'eval/top1': 0.1}, state_of(4))
  assert sorted(path.name for path in (tmp_path / 'best').iterdir()) == ['2.damaged', '4']


def test_metrics_that_end_in_anything_are_read_and_go_on(tmp_path):
  lines = b'{"step": 1, "a": 1.0}\n{"step": 2, "a": "nan"}\n'
  for end in (b'', b'{"step": 3, "a"', bytes(40), b'\xff\xfe{', b'3\n[1]\nnull\n', b'[' * 100_000):
    (tmp_path / 'metrics.jsonl').write_bytes(lines + end)
    assert [line['step'] for line in metrics.read_metrics(str(tmp_path))] == [1, 2]
    with metrics.MetricWriter(str(tmp_path), tensorboard=False, start_step=1) as writer:
      writer.write(2, {'a': 5})
    assert metrics.read_metrics(str(tmp_path)) == [{'step': 1, 'a': 1}, {'step': 2, 'a': 5}]


def test_metrics_on_a_full_disk_are_one_line(tmp_path):
  """/dev/full is a disk that always is."""
  (tmp_path / 'metrics.jsonl').symlink_to('/dev/full')
  writer = metrics.MetricWriter.__new__(metrics.MetricWriter)
  writer._workdir, writer._failed, writer._events, writer._wandb = str(tmp_path), False, None, None
  writer._lines = metrics._Lines.__new__(metrics._Lines)
  writer._lines._file = open('/dev/full', 'a', encoding='utf-8')
  words = (
    f'cannot write the metrics of step 7 to {tmp_path}: the disk is full .* are free.*: free some'
  )
  with pytest.raises(UserError, match=words):
    with writer:
      writer.write(7, {'a': 1.0})


NO_ROOM_FOR_EVENTS = """
import resource, sys
from folk_jax import cli
from folk_jax.train import metrics

def main(argv):
  with metrics.MetricWriter(argv[0] + '.metrics') as writer:
    writer._lines._file = open('/dev/null', 'a')  # TensorBoard's file is the one that may not grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    for step in range(1000):
      writer.write(step, {'train/loss': 1.0})

sys.argv = sys.argv[1:]
cli.run(main)
"""


def test_tensorboard_without_room_is_one_line_too(tmp_path):
  """Its thread would print a traceback of its own."""
  done = subprocess.run(
    [sys.executable, '-c', NO_ROOM_FOR_EVENTS, str(tmp_path / 'run')],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: cannot write the metrics of step ') and 'File too large' in line


HOLDER = """
import sys, time
from folk_jax.train import workdir
with workdir.held(sys.argv[1]):
  print('held', flush=True)
  time.sleep(600)
"""


def test_a_held_workdir_is_refused_and_a_killed_holder_leaves_nothing(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    words = rf'another run trains in workdir .* \(process {holder.pid} on '
    with pytest.raises(UserError, match=words), workdir.held(tmp_path):
      pass
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
  assert (tmp_path / 'lock').exists()
  with workdir.held(tmp_path):
    # Not from the same process either, nor by another name of the folder.
    with pytest.raises(UserError, match='another run trains'), workdir.held(f'{tmp_path}/.'):
      pass
  assert list(tmp_path.iterdir()) == []


def test_on_shared_storage_the_newest_start_owns_the_workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'on_this_machine', lambda path: False)
  with workdir.held(tmp_path) as first:
    first()
    with workdir.held(tmp_path) as second:
      second()
      with pytest.raises(UserError, match='another run was started in workdir .* this one ends'):
        first()
    # Ended before the first looked again: what it has saved is not to be written over.
    with pytest.raises(UserError, match='another run was started in workdir .*ended since.* ends'):
      first()
  assert list(tmp_path.iterdir()) == []
  with workdir.held(tmp_path) as alone:
    monkeypatch.setattr(checkpoint, 'read_json', lambda _: 1 / 0)  # A bucket's client fails.
    alone()


def test_file_systems_are_told_apart(tmp_path):
  mounts = tmp_path / 'mounts'
  mounts.write_text(
    'disk / ext4 rw 0 0\nserver:/x /mnt/shared nfs4 rw 0 0\ntmpfs /mnt/shared/fast tmpfs rw 0 0\n'
  )
  for path, local in {
    '/home/me': True,
    '/mnt/sharedlike': True,
    '/mnt/shared/run': False,
    '/mnt/shared/fast/run': True,
    'gs://bucket/run': False,
  }.items():
    assert lock.on_this_machine(epath.Path(path), str(mounts)) is local


def test_the_lock_asks_no_clock(tmp_path, monkeypatch):
  monkeypatch.setattr(time, 'time', lambda: -1e9)
  with workdir.held(tmp_path) as check:
    check()


def test_throughput_asks_no_clock_that_jumps(monkeypatch):
  now = [1e9]

  def jumping() -> float:
    now[0] -= 1e6
    return now[0]

  monkeypatch.setattr(time, 'time', jumping)
  timer = metrics.StepTimer()
  for _ in range(3):
    with timer.waiting():
      pass
    timer.tick(8)
  scalars = timer.scalars()
  assert 0 < scalars['train/images_per_second'] and 0 <= scalars['train/goodput'] <= 1


ONE_OF_TWO = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.train import lock, workdir

folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f'127.0.0.1:{port}', 2, index)
mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec('data'))

def state(step):
  return {'x': jax.make_array_from_callback((8,), sharding, lambda part: np.arange(8.0)[part] + step)}

with workdir.held(folder) as check, checkpoint.Checkpoints(str(folder / 'steps'), 1, 9, before_save=check) as kept:
  for step in (1, 2):
    kept.save(step, state(step), {'step': step})
  kept.wait()
  if index == 0:
    file = max((folder / 'steps' / '2' / 'state').rglob('d/*'), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
  restored, meta = kept.restore(state(0))
  assert meta['step'] == 1 and kept.all_steps() == [1], (meta, kept.all_steps())
  for shard in restored['x'].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index] + 1)
  kept.save(2, state(2), {'step': 2})
if index == 0:
  lock.locked = lambda *_: (_ for _ in ()).throw(UserError('taken by another'))
try:
  with workdir.held(folder):
    print('held')
except UserError as error:
  print('refused:', error)
"""


def test_two_processes_agree_on_what_is_whole_and_on_whose_the_workdir_is(tmp_path):
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  both = [
    subprocess.Popen(
      [sys.executable, '-c', ONE_OF_TWO, str(tmp_path), str(port), str(index)],
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = []
  for process in both:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert 'step 2 in' in errors and 'kept aside as 2.damaged, going on from step 1' in errors
    said.append(out)
  assert said[0].splitlines()[-1] == 'refused: taken by another'  # Gloo says that it is connected.
  refused = f'refused: cannot use workdir {tmp_path}: process 0 says why'
  assert said[1].splitlines()[-1] == refused
  assert sorted(path.name for path in (tmp_path / 'steps').iterdir()) == ['1', '2', '2.damaged']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  made = storage_runs.Runs(tmp_path_factory.mktemp('runs'))
  made.prepare()
  return made


@pytest.mark.slow
def test_a_run_without_room_ends_in_a_line_and_goes_on_to_the_same_end(runs):
  """Room as a limit on files, which needs no right to mount anything."""
  assert storage.file_limit(runs, 0) == ''


@pytest.mark.slow
def test_a_run_goes_on_from_the_step_before_the_damaged_one(runs):
  assert storage.damaged(runs, 0, 'a bit of a large array flipped') == ''
