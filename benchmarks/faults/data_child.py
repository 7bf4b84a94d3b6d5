"""One trial of `data.py`, in a process of its own: streams batches under a fault, and compares with a clean stream.

  python benchmarks/faults/data_child.py KIND FOLDER SEED

Prints one line: '' where the promise was kept, else what was lost. Where the fault did not happen, it ends with status
`NOT_MADE`; tried again with FAULT_ATTEMPT=1, 2, ... the fault comes earlier. Workers are started by importing this
file.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np

from folk_jax.data import DataSettings, make_source, tasks, train_batches
from folk_jax.data.folder import FolderSource
from folk_jax.errors import UserError

WORKERS, BATCH, BATCHES = 2, 8, 24
SECONDS = 1.0
NOT_MADE = 3
# The sample that a trial's fault is about stands in these variables, which workers inherit.
KIND, SAMPLE = os.environ.get('FAULT_KIND', ''), int(os.environ.get('FAULT_SAMPLE', -1))
# Workers leave a file here: a slow read is over.
MARK = 'FAULT_MARK'
_decode = tasks.decode


class Faulty(FolderSource):
  """The images of a folder; in workers one of them has the fault."""

  def read(self, index):
    if multiprocessing.parent_process() and index == SAMPLE:
      if KIND == 'crash':
        ctypes.string_at(0)  # A signal sent to oneself comes later, at another sample.
      if KIND == 'slow':
        time.sleep(3 * SECONDS)
        pathlib.Path(os.environ[MARK]).touch()
      if KIND in ('endless', 'stuck'):
        return KIND.encode(), self.label(index)
    return super().read(index)


def decode(data):
  """As the loader's, but for the bytes that stand for a decoder that never returns."""
  if data == b'endless':
    time.sleep(3600)
  if data == b'stuck':
    ctypes.PyDLL(None).sleep(3600)  # And never gives the interpreter back.
  return _decode(data)


if __name__ == '__mp_main__':
  tasks.decode = decode


def settings(folder: str, source: str = 'folder', workers: int = WORKERS) -> DataSettings:
  return DataSettings(
    source=source,
    path=folder,
    image_size=16,
    workers=workers,
    threads=2 if KIND == 'files' else 1,
    prefetch=1,
    decode_seconds=SECONDS,
    max_bad_share=0.2,
  )


def stream(source, how: DataSettings, seed: int, disturb=lambda step: None, over=lambda: None):
  """The batches' rows by (place in the stream), and the bad names; `over` is called before workers are let go."""
  with train_batches(source, how, seed=seed, step=0, batch_size=BATCH) as batches:
    rows = []
    for step in range(BATCHES):
      disturb(step)
      batch = next(batches)
      rows += list(
        zip(batch['index'].tolist(), map(np.ndarray.tobytes, batch['views']), strict=True)
      )
    over()
    return rows, batches.bad_names


class NotMade(Exception):
  """The fault did not happen, so that the trial shows nothing."""


class Signals:
  """Signals to the workers, some time on, for as long as the stream is in the state that the fault is about."""

  def __init__(self, number: int):
    self._number, self._sent, self._timers, self._over = number, [], [], False
    self._lock = threading.Lock()

  def soon(self, seconds: float) -> None:
    self._timers.append(threading.Timer(seconds, self._send))
    self._timers[-1].start()

  def _send(self) -> None:
    with self._lock:
      for child in [] if self._over else multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):
          os.kill(child.pid, self._number)
          self._sent.append(child)

  def over(self) -> None:
    """No more signals: what they would meet is past."""
    with self._lock:
      self._over = True
    for timer in self._timers:
      timer.cancel()

  def check(self) -> None:
    """Raises `NotMade` where no worker got one, or where kill -9 ended none."""
    ended = [child for child in self._sent if child.exitcode == -signal.SIGKILL]
    if not self._sent or self._number == signal.SIGKILL and not ended:
      raise NotMade(f'{len(self._sent)} workers got signal {self._number}, {len(ended)} ended')


def compared(found, wanted, bad: set[int]) -> str:
  """Rows must be the clean stream's but for the bad samples, which give way to a later one."""
  for place, ((index, views), (clean, clean_views)) in enumerate(zip(found, wanted, strict=True)):
    if clean not in bad and (index, views) != (clean, clean_views):
      return f'row {place} of the stream is another: sample {index} instead of {clean}'
    if clean in bad and index in bad:
      return f'row {place} holds the bad sample {index}'
  return ''


def trial(kind: str, folder: str, seed: int) -> str:
  """One trial; '' or what was lost."""
  attempt = int(os.environ.get('FAULT_ATTEMPT', 0))
  rng = np.random.default_rng([seed, attempt] if attempt else seed)
  if kind == 'shard':
    return shard(folder, seed)
  how = settings(folder)
  source = Faulty(how, 'train')
  clean = make_source(settings(folder + '.clean', workers=0), 'train')
  wanted, _ = stream(clean, settings(folder + '.clean', workers=0), seed)
  bad = {SAMPLE} if kind in ('crash', 'endless', 'stuck') else set()
  if kind == 'files':
    with open(folder + '.bad', encoding='utf-8') as file:
      bad = {int(number) for number in file.read().split()}
  at, wait = int(rng.integers(1, BATCHES)), float(rng.uniform(0, 4))
  at, wait = max(1, at >> attempt), wait / 2**attempt
  signals = Signals(signal.SIGTERM if kind == 'told to end at start' else signal.SIGKILL)
  mark = pathlib.Path(f'{folder}.slow')
  mark.unlink(missing_ok=True)
  os.environ[MARK] = str(mark)

  def disturb(step: int) -> None:
    if kind == 'killed' and step == at:
      signals.soon(wait / 20)
    if kind == 'killed at start' and not step:
      signals.soon(0.2 + wait)
    if kind == 'told to end at start' and not step:
      for moment in (0.2, 0.6, 1.0, 2.0):
        signals.soon(moment)
    if step and kind.endswith('at start'):
      signals.over()  # A batch is there: they have started.

  found, names = stream(source, how, seed, disturb, signals.over)
  if kind == 'killed' or kind.endswith('at start'):
    signals.check()
  if kind == 'slow' and not mark.exists():
    raise NotMade(f'no worker read sample {SAMPLE}')
  met = {index for index, _ in wanted} & bad
  if bad and not met:
    raise NotMade(f'no batch had the samples {sorted(bad)}')
  named = {index for index in range(len(source)) if source.name(index) in names}
  if kind == 'files':  # And those that were tried in place of others.
    named &= met
  if named != met:
    return f'the samples {sorted(met)} are bad and {sorted(named)} were named'
  return compared(found, wanted, bad)


def shard(folder: str, seed: int) -> str:
  """A shard is cut, or bytes of it flipped; it must be named, or its records passed over by name."""
  del seed
  how = settings(folder, 'array_record')
  source = make_source(how, 'train')
  try:
    with train_batches(source, how, seed=0, step=0, batch_size=BATCH) as batches:
      for _ in range(BATCHES):
        next(batches)
      names = batches.bad_names
  except UserError as error:
    names = [str(error)]
  if not names:
    return '' if os.environ['FAULT_HARMLESS'] else 'the damage went by without a word'
  return (
    ''
    if all('train-00001-of-' in name and 'record ' in name for name in names)
    else f'named {names}'
  )


if __name__ == '__main__':
  # The disturbing signals are for workers alone: SIGTERM comes to this process's children one by one.
  try:
    print(trial(sys.argv[1], sys.argv[2], int(sys.argv[3])))
  except NotMade as error:
    print(error, file=sys.stderr)
    sys.exit(NOT_MADE)
  except Exception as error:
    print(f'{type(error).__name__}: {error}'.splitlines()[0])
