"""Grain's iterator and its workers, held at arm's length: asked by a thread that can be left, watched while it works.

A worker that is killed while it writes may leave Grain waiting for the rest for ever; one whose decoder never gives the
interpreter back can't even look at its own clock. So nobody waits for Grain itself: the main process waits for a
thread that asks Grain, looks at the workers' board meanwhile, and says what it saw.
"""

import dataclasses
import multiprocessing
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from folk_jax.data import transport
from folk_jax.data.board import DECODING, At, Board
from folk_jax.data.patience import LOOK_SECONDS, Watch
from folk_jax.data.tasks import Task
from folk_jax.errors import UserError

# How long Grain may take to notice that a worker is dead, which it looks for every second where it waits for that one.
_NOTICE_SECONDS = 10.0
# How long workers may take to end by themselves, and Grain to close without them.
_CLOSE_SECONDS = 5.0
# A worker leaves a sample behind by itself at `decode_seconds`; where it can't, it is killed at so many times that.
_OVERDUE = 2.0
# How Grain words the death of a worker.
_GRAIN_DIED = 'terminated unexpectedly'


class WorkerLost(Exception):
  """A worker has died; its stream is of no use any more.

  Attributes:
    at: what it was doing.
    overdue: the sample on which it was killed for taking too long, or None.
  """

  def __init__(self, how: str, at: list[At], overdue: int | None = None):
    super().__init__(how)
    self.at = at
    self.overdue = overdue


@dataclasses.dataclass
class _Asking:
  """What the asking thread shares with its stream."""

  rows: Any
  asked: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
  answers: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
  closed: threading.Event = dataclasses.field(default_factory=threading.Event)


def _ask(asking: _Asking) -> None:
  transport.hold_sigterm()  # Grain's threads, which start the workers, begin here.
  try:
    while asking.asked.get():
      try:
        answer = (next(asking.rows), None)
      except BaseException as error:
        answer = (None, error)
      asking.answers.put(answer)
      del answer
    asking.rows.close()
  finally:
    # Collected now, and not when the interpreter has already forgotten what Grain needs for it.
    asking.rows = None
    asking.closed.set()


class Stream:
  """The batches of one Grain iterator, of threads of this process or of workers."""

  def __init__(
    self,
    rows: Any,
    task: Task,
    board: Board,
    ring: transport.Ring | None,
    workers: int,
    decode_seconds: float,
  ):
    """Takes what it owns from here on: Grain's iterator, the task in it, and what the workers share."""
    self._task, self._board, self._ring = task, board, ring
    self._workers, self._limit = workers, decode_seconds * _OVERDUE
    self._asking = _Asking(rows)
    self._thread: threading.Thread | None = None
    self._watch = Watch()
    self._children: dict[int, Any] = {}

  def next(self) -> dict[str, np.ndarray]:
    """Waits for the next batch.

    Raises:
      StopIteration: there is none.
      WorkerLost: a worker has died, or was killed for a sample that took too long.
      Exception: whatever the source raises.
    """
    if self._thread is None:
      self._thread = threading.Thread(
        target=_ask, args=(self._asking,), name='folk-batches', daemon=True
      )
      self._thread.start()
    self._asking.asked.put(True)
    dead_since = None
    while True:
      try:
        batch, error = self._asking.answers.get(timeout=LOOK_SECONDS)
      except queue.Empty:
        self._end_overdue()
        dead = self._dead()
        dead_since = (dead_since or time.monotonic()) if dead else None
        if dead and time.monotonic() - dead_since > _NOTICE_SECONDS:
          raise WorkerLost('a worker ended without a word', self._at(dead)) from None
        continue
      if error is None:
        return self._ring.receive(batch) if self._ring else dict(batch)
      if self._workers and isinstance(error, RuntimeError) and _GRAIN_DIED in str(error):
        how = str(error).split('. ')[0].replace('Worker process', 'a worker')
        raise WorkerLost(how, self._at(self._dead())) from error
      if isinstance(error, UserError):  # Grain adds lines of its own to every message.
        raise UserError(str(error).split('\n', 1)[0]) from error
      raise error

  def _dead(self) -> set[int]:
    """The processes on the board that ended before their time."""
    if not self._workers:
      return set()
    alive = {child.pid: child for child in multiprocessing.active_children()}
    pids = set(self._board.pids().values())
    self._children |= {pid: alive[pid] for pid in pids & alive.keys()}
    if self._task.training:  # Without end.
      return pids - alive.keys()
    return {pid for pid in pids & self._children.keys() if self._children[pid].exitcode}

  def _at(self, pids: set[int]) -> list[At]:
    return [at for at in self._board.at_work() if at.pid in pids]

  def _end_overdue(self) -> None:
    """Kills a worker whose decoder does not even let it look at the clock."""
    if not (self._workers and self._limit):
      return
    at_work = [at for at in self._board.at_work() if at.doing == DECODING]
    waited = self._watch.look(at_work)
    for at in at_work:
      if waited[at] > self._limit:
        transport.kill([at.pid])
        raise WorkerLost('a worker was ended', [at], overdue=at.index)

  def words(self, name: Callable[[int], str]) -> str:
    """Says what the workers are doing, those longest at one sample first."""
    at_work = sorted(self._board.at_work(), key=lambda at: at.since)
    said = [at.words(name(at.index)) for at in at_work[:3]]
    if len(at_work) > 3:
      said.append(f'{len(at_work) - 3} more are at work')
    pids = self._board.pids()
    if starting := self._workers - len(pids):
      said.append(f'{starting} of {self._workers} workers are starting')
    if dead := self._dead():
      said.append(f'dead: {", ".join(f"worker {w}" for w, pid in pids.items() if pid in dead)}')
    return '; '.join(said) or 'no worker is at a sample'

  def close(self, patiently: bool = True) -> None:
    """Ends the workers and gives back what they shared; `patiently` lets them end by themselves first."""
    self._task.stop()
    if self._ring:
      self._ring.stop()
    if not patiently:
      transport.kill(self._board.pids().values())
    if self._thread is None:
      self._asking.rows.close()
    else:
      self._asking.asked.put(False)
      # Collected by chance in that very thread, the stream can't wait for it.
      wait = 0 if threading.current_thread() is self._thread else _CLOSE_SECONDS
      if not self._asking.closed.wait(wait):
        transport.kill(self._board.pids().values())
        self._asking.closed.wait(wait)
    transport.kill(self._board.pids().values())
    if self._ring:
      self._ring.close()
    self._board.close()


class Holder:
  """Holds the stream that batches come from, so that it is closed when nobody uses them any more."""

  def __init__(self, stream: Stream):
    self.stream = stream

  def drop(self) -> None:
    """Closes the stream at once."""
    self.stream.close(patiently=False)


def close_when_dropped(owner: Any, holder: Holder) -> weakref.finalize:
  """Closes what `holder` holds when `owner` is collected, and before the process ends."""
  from multiprocessing import util

  # Before Grain's own (priority 1), which waits 25 seconds for each worker.
  return util.Finalize(owner, holder.drop, exitpriority=10)
