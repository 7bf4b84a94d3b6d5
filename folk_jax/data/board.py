"""Which sample every decoding thread is at: a page that workers write and the main process reads.

What a message about a dead or a waiting worker knows, it knows from here: a worker that was killed can no longer say
what it was doing.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import time
import weakref
from multiprocessing import shared_memory
from typing import Any

from folk_jax.data import transport

# What a thread does with its sample; 0 is nothing.
READING, DECODING, CUTTING = 1, 2, 3
_WORDS = {READING: 'reads', DECODING: 'decodes', CUTTING: 'cuts views from'}
# Numbers of a thread: what it does, the sample, since when (nanoseconds of the machine's monotonic clock).
_CELLS = 3
_BYTES = 8
# With less of it free, a write to shared memory may kill its writer.
_ROOM = 1 << 20


@dataclasses.dataclass(frozen=True)
class At:
  """A thread at work.

  Attributes:
    worker: its process's number.
    pid: that process.
    thread: its number in it.
    doing: READING, DECODING or CUTTING.
    index: the sample's number in the source.
    since: nanoseconds, when it began: tells two turns at the same sample apart.
  """

  worker: int
  pid: int
  thread: int
  doing: int
  index: int
  since: int

  @property
  def seconds(self) -> float:
    """How long it has been at it."""
    return (time.monotonic_ns() - self.since) / 1e9

  def words(self, name: str) -> str:
    """Says so of a sample called `name`."""
    who = f'worker {self.worker} (process {self.pid})' if self.pid != os.getpid() else 'a thread'
    return f"{who} {_WORDS[self.doing]} '{name}' for {self.seconds:.0f} s"


class Board:
  """Made in the main process; its copies in workers write to the same page."""

  def __init__(self, workers: int, threads: int):
    """Makes a page for so many processes (0: this one) with so many decoding threads each."""
    self._rows, self._row = max(1, workers), 1 + threads * _CELLS
    self._block, self._name = None, ''
    size = self._rows * self._row * _BYTES
    if workers and _has_room(size):
      self._block = shared_memory.SharedMemory(create=True, size=size)
      self._name = self._block.name
      self._release = weakref.finalize(self, _release, self._block)
    self._attach()
    for cell in range(self._rows * self._row):
      self._cells[cell] = 0
    if not workers:
      self._cells[0] = os.getpid()

  def _attach(self) -> None:
    # No NumPy: an array would point into the page also when that is gone; a memoryview knows.
    size = self._rows * self._row * _BYTES
    # One process; or no shared memory, and each keeps to itself.
    page = memoryview(bytearray(size)) if self._block is None else self._block.buf[:size]
    self._cells = page.cast('q')

  def __getstate__(self) -> dict[str, Any]:
    return {'_rows': self._rows, '_row': self._row, '_name': self._name}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._block = shared_memory.SharedMemory(self._name) if self._name else None
    self._attach()
    if multiprocessing.parent_process() is not None:
      self._cells[transport.worker_number() * self._row] = os.getpid()

  def _place(self, thread: int) -> int:
    return transport.worker_number() * self._row + 1 + thread * _CELLS

  def write(self, thread: int, doing: int, index: int) -> None:
    """Notes what a thread of this process begins to do, with which sample."""
    place = self._place(thread)
    with contextlib.suppress(ValueError):  # Closed.
      if doing != CUTTING:  # Cutting goes on with the sample: the clock does, too.
        self._cells[place + 2] = time.monotonic_ns()
      self._cells[place + 1] = index
      self._cells[place] = doing

  def wipe(self, thread: int) -> None:
    """Notes that a thread of this process has nothing to do."""
    with contextlib.suppress(ValueError):
      self._cells[self._place(thread)] = 0

  def pids(self) -> dict[int, int]:
    """The processes by worker; one that is still starting has none."""
    return {worker: row[0] for worker, row in enumerate(self._read()) if row[0]}

  def _read(self) -> list[list[int]]:
    """The rows, of which there are none after `close`."""
    try:
      cells = self._cells.tolist()
    except ValueError:
      return []
    return [cells[start : start + self._row] for start in range(0, len(cells), self._row)]

  def at_work(self) -> list[At]:
    """Every thread that is at a sample; empty after `close`."""
    found = []
    for worker, row in enumerate(self._read()):
      for thread in range((len(row) - 1) // _CELLS):
        doing, index, since = row[1 + thread * _CELLS :][:_CELLS]
        if doing:
          found.append(At(worker, row[0], thread, doing, index, since))
    return found

  def close(self) -> None:
    """Gives the page back; what was on it is forgotten."""
    self._cells.release()
    if self._block is not None:
      self._release()

  def __del__(self):
    # Of a worker's copy, whose page can only then be unmapped.
    if hasattr(self, '_cells'):
      self._cells.release()


def _has_room(size: int) -> bool:
  return not os.path.isdir('/dev/shm') or shutil.disk_usage('/dev/shm').free >= size + _ROOM


def _release(block: shared_memory.SharedMemory) -> None:
  with contextlib.suppress(BufferError):  # At the end of the process the page is still in use.
    block.close()
  block.unlink()
