"""The watchdog speaks when a run waits, ever less often, with stacks; it ends a hang where it is told to."""

import io
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from folk_jax.errors import UserError
from folk_jax.train import watchdog
from folk_jax.train.watchdog import Watchdog

ROOT = pathlib.Path(__file__).resolve().parents[2]


def until(condition, seconds=30):
  """Waits for a thread; on a machine that is busy it comes late."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'the watchdog did not speak'
    time.sleep(0.005)


def test_it_says_what_the_run_waits_for_ever_less_often(tmp_path):
  said = io.StringIO()
  with Watchdog(0.05, workdir=str(tmp_path), process=3, stream=said) as waits:
    waits('the batch of step 7', lambda: "worker 2 (process 99) reads 'x.jpg' for 40 s")
    until(lambda: said.getvalue().count('waiting for') == 4)
    lines = said.getvalue().splitlines()
    waits.idle()
    time.sleep(0.2)
    quiet = said.getvalue().splitlines()
  notices = [line for line in lines if 'waiting for' in line]
  wanted = "(worker 2 (process 99) reads 'x.jpg' for 40 s)"
  assert all(line.startswith('process 3: waiting for the batch of step 7: ') for line in notices)
  assert all(line.endswith(wanted) for line in notices)
  stacks = (tmp_path / 'stacks-3.txt').read_text()
  # Of this thread, which waits, once; named in the line after the second notice.
  assert stacks.count('waiting for the batch of step 7') == 1
  assert 'test_it_says_what_the_run_waits_for' in stacks
  place = [i for i, line in enumerate(lines) if 'stacks of all threads are in' in line]
  assert place == [2]
  assert len(quiet) <= len(lines) + 1  # One may have been under way.


def test_the_times_double_and_are_an_hour_apart_at_most(monkeypatch):
  """The clock is the test's: 0.2 seconds a look, the most that a look counts."""
  monkeypatch.setattr(watchdog, '_MOST_BETWEEN', 4.0)
  said = io.StringIO()
  dog = Watchdog(0.0, stream=said)  # No thread: the test looks.
  dog._seconds, dog._every = 1.0, 0.1
  clock, looks = iter(range(1000)), iter(range(100))
  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: float(next(clock)))
  monkeypatch.setattr(dog._ended, 'wait', lambda _: next(looks, None) is None)
  monkeypatch.setattr(dog, '_dump', lambda what: None)
  dog('a step')
  dog._watch()
  notices = [line for line in said.getvalue().splitlines() if line.startswith('waiting')]
  # 100 looks count 20 seconds, though the clock went on by 100: at 1, 2, 4, 8, and every 4 from there.
  assert [line.split(': ')[1] for line in notices] == [
    f'{seconds} s so far' for seconds in (1, 2, 4, 8, 12, 16, 20)[: len(notices)]
  ]
  assert len(notices) >= 6


def test_progress_keeps_it_silent_and_compiling_has_time():
  said = io.StringIO()
  with Watchdog(0.8, stream=said) as waits:
    for step in range(60):
      waits(f'step {step}')
      time.sleep(0.02)
    waits.compiling('the train step')
    time.sleep(1.2)
    assert said.getvalue() == ''
    waits('the other processes', lambda: 1 / 0)
    until(lambda: said.getvalue())
  # A question that fails is no reason to fall silent.
  assert 'waiting for the other processes' in said.getvalue()
  assert '(ZeroDivisionError: division by zero)' in said.getvalue()


def test_off_means_off():
  with Watchdog(0.0) as waits:
    waits('a step')
    assert waits._thread is None


@pytest.mark.parametrize(('seconds', 'limit'), [(-1, 0), (0, -1), (10, 5), (float('nan'), 0)])
def test_settings_that_make_no_sense(seconds, limit):
  with pytest.raises(UserError, match='config.watchdog'):
    Watchdog(seconds, limit)


def test_a_hang_ends_with_a_status_and_takes_its_children_along(tmp_path):
  script = tmp_path / 'hangs.py'
  script.write_text(
    textwrap.dedent("""
      import multiprocessing, sys, threading, time
      from folk_jax.train.watchdog import Watchdog

      if __name__ == '__main__':
        child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))
        child.start()
        print(child.pid, flush=True)
        with Watchdog(0.1, 0.3, workdir=sys.argv[1]) as waits:
          waits('step 5 on the device')
          threading.Event().wait()
    """)
  )
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, str(script), str(tmp_path / 'not_there')],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == watchdog.STATUS == 75, done.stderr
  assert 'stopped: waited' in done.stderr
  assert 'for step 5 on the device' in done.stderr
  assert 'goes on from what was saved last' in done.stderr
  # No folder to write to: the stacks are on stderr.
  assert 'hangs.py' in done.stderr
  until(lambda: not os.path.exists(f'/proc/{done.stdout.strip()}'))
