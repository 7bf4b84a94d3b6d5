"""Workers that are killed, crash, hang, are dropped or told to end while they start: real processes."""

import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from folk_jax.data import transport

ROOT = pathlib.Path(__file__).resolve().parents[2]

# In a process of its own: workers are started by importing the script that holds the source.
WORKERS = """
  import os, signal, sys, time, ctypes
  import multiprocessing
  import numpy as np
  from absl import logging
  from folk_jax.data import DataSettings, train_batches
  from folk_jax.data import tasks
  from folk_jax.data.sources import Source

  class Pictures(Source):
    def __init__(self, kind, sample=5):
      self.kind, self.sample = kind, sample
    def __len__(self):
      return 24
    def read(self, index):
      if multiprocessing.parent_process() and index == self.sample:
        if self.kind == 'crash':
          ctypes.string_at(0)  # A signal sent to oneself comes later, at another sample.
        if self.kind == 'stuck':
          return b'stuck', 0
      return np.full((9, 9, 3), index, np.uint8), 0
    def name(self, index):
      return f'picture {index}'

  def decode(data):
    if isinstance(data, bytes):
      ctypes.PyDLL(None).sleep(600)  # Holds the interpreter: no thread of the worker can look at the clock.
    return data

  if __name__ == '__mp_main__':
    tasks.decode = decode

  def run(kind, workers, kill_at=None, **fields):
    settings = DataSettings(source='synthetic', image_size=8, workers=workers, threads=1, max_bad_share=0.1, **fields)
    with train_batches(Pictures(kind), settings, seed=1, step=0, batch_size=8) as batches:
      found = []
      for step in range(9):
        found.append(next(batches))
        if step == kill_at:
          for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
      return found, batches.bad_names

  def same(a, b, but=()):
    for x, y in zip(a, b, strict=True):
      rows = ~np.isin(y['index'], but)
      assert (x['index'][rows] == y['index'][rows]).all()
      assert (x['views'][rows] == y['views'][rows]).all()
      assert (x['index'][~rows] == y['index'][~rows] + 1).all()

  if __name__ == '__main__':
    wanted, bad = run('', 0)
    assert not bad
    what = sys.argv[1]
    if what == 'killed':
      found, bad = run('', 2, kill_at=3)
      same(found, wanted)
      assert not bad, bad
    if what == 'crash':
      found, bad = run('crash', 1)
      same(found, wanted, but=5)
      assert bad == ['picture 5'], bad
    if what == 'stuck':
      found, bad = run('stuck', 1, decode_seconds=0.5)
      same(found, wanted, but=5)
      assert bad == ['picture 5'], bad
    if what == 'dropped':
      settings = DataSettings(source='synthetic', image_size=8, workers=1, threads=1)
      batches = train_batches(Pictures(''), settings, seed=1, step=0, batch_size=8)
      next(batches)
      pid = multiprocessing.active_children()[0].pid
      began = time.monotonic()
      del batches
      # Grain's own way takes 25 seconds for a worker that waits for its reader.
      assert time.monotonic() - began < 15, time.monotonic() - began
      assert not multiprocessing.active_children()
      kept = train_batches(Pictures(''), settings, seed=1, step=0, batch_size=8)
      next(kept)  # And one that is only dropped by the end of the process.
      print('ends', time.monotonic(), flush=True)
      sys.exit()
    print('whole', flush=True)
"""


def child(tmp_path, *arguments, timeout=400):
  script = tmp_path / 'workers.py'
  script.write_text(textwrap.dedent(WORKERS))
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, str(script), *arguments],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done


def test_killed_workers_are_started_anew_and_the_batches_stay(tmp_path):
  done = child(tmp_path, 'killed')
  assert done.stdout == 'whole\n'
  assert 'exit code -9' in done.stderr
  assert 'starting all workers anew at batch ' in done.stderr


@pytest.mark.slow
def test_a_sample_that_kills_its_worker_is_passed_over_the_second_time(tmp_path):
  done = child(tmp_path, 'crash')
  assert done.stdout == 'whole\n'
  assert "reads 'picture 5'" in done.stderr
  assert 'skipping a bad file: picture 5 (a worker died on it twice' in done.stderr


@pytest.mark.slow
def test_a_worker_that_cannot_even_look_at_its_clock_is_ended(tmp_path):
  done = child(tmp_path, 'stuck')
  assert done.stdout == 'whole\n'
  assert 'a worker was ended (worker 0 (process ' in done.stderr
  assert 'picture 5 (takes longer than 0.5 s to decode)' in done.stderr


@pytest.mark.slow
def test_batches_that_nobody_closes_do_not_hold_up_the_end(tmp_path):
  done = child(tmp_path, 'dropped')
  ended = time.monotonic()
  # Of the machine's clock, the same in all processes.
  assert ended - float(done.stdout.split()[1]) < 15


def test_a_worker_that_is_starting_holds_sigterm_back():
  """What a worker inherits: its signal mask, from the thread that starts the one that starts it."""
  found = []

  def ask():
    transport.hold_sigterm()
    inner = threading.Thread(target=lambda: found.append(blocked(['cat', '/proc/self/status'])))
    inner.start()
    inner.join()

  def blocked(command):
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    mask = next(line for line in status.splitlines() if line.startswith('SigBlk'))
    return int(mask.split()[1], 16) >> 14 & 1  # SIGTERM is signal 15, bit 14.

  thread = threading.Thread(target=ask)
  thread.start()
  thread.join()
  assert found == [1]
  assert blocked(['cat', '/proc/self/status']) == 0
