"""How a process starts alone, sees that others share its workdir, is told to end, and ends before its time."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from jax.experimental import multihost_utils

from folk_jax import distributed
from folk_jax.distributed import leaving
from folk_jax.errors import UserError


class MissingLabel(UserError):
  """As some rooms have their own."""


def test_a_single_process_loads_no_jax():
  code = (
    'import sys\n'
    'from folk_jax import distributed\n'
    'for one in (distributed.detect({}), distributed.from_flags("h:1", 1, 0)):\n'
    '  with distributed.joined(one) as several:\n'
    '    assert several is False\n'
    'assert not [name for name in sys.modules if name.split(".")[0] in ("jax", "numpy")]\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False
  )
  assert done.returncode == 0, done.stderr


def test_a_silent_process_still_says_what_it_finds_in_its_data():
  code = (
    'from absl import logging\n'
    'from folk_jax.data import notices\n'
    'from folk_jax.distributed import leaving\n'
    'leaving.hush()\n'
    'print("hidden")\n'
    'logging.warning("hidden")\n'
    'notices.warn(3, "a bad file: 100% of it")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False
  )
  assert done.returncode == 0 and not done.stdout
  assert done.stderr.rstrip().endswith('process 3: a bad file: 100% of it')
  assert 'hidden' not in done.stderr


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks(number, status):
  before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
  with distributed.joined(None):
    assert not distributed.preempted(1)
    os.kill(os.getpid(), number)
    assert distributed.preempted(2) and distributed.preempted(3)
    assert distributed.Preempted('').status == status
  assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
  with distributed.joined(None):
    assert not distributed.preempted(1)


def test_a_person_among_those_who_told_it_is_obeyed():
  """At once, as a launcher that passes Ctrl-C on as SIGTERM sends both: no second signal."""
  with distributed.joined(None):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert distributed.Preempted('').status == 130


def test_signals_kill_where_nobody_would_look():
  before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
  with distributed.joined(None, heed_signals=False):
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert not distributed.preempted(1)


@pytest.mark.parametrize(
  'error, status',
  [
    (SystemExit(), 0),
    (SystemExit(0), 0),
    (SystemExit(143), 143),
    (SystemExit('text'), 1),
    (UserError('x'), 2),
    (MissingLabel('x'), 2),
    (KeyboardInterrupt(), 130),
    (ValueError('x'), 1),
  ],
)
def test_how_an_error_ends_a_process(error, status):
  assert leaving._status(error) == status


def test_a_failed_process_leaves_at_once_with_its_words_and_status(tmp_path):
  """Its own clean-up, which would wait for the others, is passed over, and its children end, whatever they ignore."""
  code = (
    'import atexit, multiprocessing, signal, sys, time\n'
    'from folk_jax.distributed import leaving\n'
    'from folk_jax.errors import UserError\n'
    'if __name__ == "__main__":\n'
    '  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'  # A new program keeps what is ignored.
    '  child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)\n'
    '  child.start()\n'
    '  print(child.pid, flush=True)\n'
    '  atexit.register(time.sleep, 600)\n'
    '  with leaving.together(1):\n'
    '    raise UserError("wrong")\n'
  )
  script = tmp_path / 'fails.py'
  script.write_text(code)
  done = subprocess.run(
    [sys.executable, str(script)],
    env={**os.environ, 'PYTHONPATH': os.getcwd()},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2 and done.stderr.rstrip().endswith('UserError: wrong')
  child = int(done.stdout)
  assert leaving.within(5, lambda: not _is_running(child))


def _is_running(pid: int) -> bool:
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8') as stat:
      return stat.read().rsplit(')', 1)[1].split()[0] != 'Z'
  except OSError:
    return False


@pytest.fixture
def told_by_others(monkeypatch):
  """Of processes that see this one's files, and of others that see nothing, as `seen` says of each."""

  def say(seen: list[bool]):
    monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', lambda value: value)
    monkeypatch.setattr(multihost_utils, 'sync_global_devices', lambda name: None)
    monkeypatch.setattr(
      multihost_utils, 'process_allgather', lambda own: np.array([own, *seen[1:]])
    )

  return say


def test_a_workdir_that_some_do_not_see(told_by_others, tmp_path):
  told_by_others([True, True, True])
  distributed.check_shared(str(tmp_path / 'run'))
  assert list((tmp_path / 'run').iterdir()) == []
  told_by_others([True, False, True, False])
  with pytest.raises(
    UserError, match='is not shared: processes 1, 3 cannot see what process 0 writes there; give'
  ):
    distributed.check_shared(str(tmp_path / 'new'))
  assert not (tmp_path / 'new').exists()
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='process 0 cannot write there'):
    distributed.check_shared(str(tmp_path / 'file' / 'run'))
  distributed.check_shared('gs://bucket/run')  # Nothing is asked: a bucket is shared.


def test_within():
  calls = []
  assert leaving.within(5, lambda: calls.append(0) or len(calls) == 2)
  assert not leaving.within(0, lambda: False)
