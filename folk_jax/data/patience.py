"""Work that may never end is done by a thread that can be left behind."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

from folk_jax.data.board import DECODING, Board

# How often a waiting thread looks up, and what it counts for one look at the most: a process that was stopped for an
# hour has not waited an hour.
LOOK_SECONDS = 0.5
_LOOK_COUNTS = 1.0


class Stopped(Exception):
  """Nobody wants the batch any more."""


class LeftBehind(Exception):
  """The work is at a sample for too long: its thread was left with it.

  Attributes:
    index: the sample's number.
  """

  def __init__(self, index: int):
    super().__init__(index)
    self.index = index


class Watch:
  """Counts how long things have stayed the same, by looks."""

  def __init__(self):
    self._counted: dict[Hashable, float] = {}
    self._looked = time.monotonic()

  def look(self, things: list[Hashable]) -> dict[Hashable, float]:
    """Seconds for which each of these was there at every look."""
    now = time.monotonic()
    passed = min(now - self._looked, _LOOK_COUNTS)
    self._looked = now
    self._counted = {
      thing: self._counted[thing] + passed if thing in self._counted else 0.0 for thing in things
    }
    return self._counted


class Turn:
  """A thread's place on the board while it makes one batch; after `leave` it writes no more."""

  def __init__(self, board: Board, thread: int):
    self._board, self._thread = board, thread
    self._count, self._lock = itertools.count(), threading.Lock()
    self._left = False
    self.now: tuple[int, int, int] | None = None

  def note(self, doing: int, index: int) -> None:
    """Says what is done now, with which sample; raises `Stopped` where nobody waits for it."""
    with self._lock:
      if self._left:
        raise Stopped
      self.now = (next(self._count), doing, index)
      self._board.write(self._thread, doing, index)

  def leave(self) -> None:
    """Ends the turn."""
    with self._lock:
      self._left = True
      self._board.wipe(self._thread)


class _Helper:
  """A thread that works for another; a daemon, so that nobody waits for it at the end of the process."""

  def __init__(self):
    self._asked, self.answers = queue.SimpleQueue(), queue.SimpleQueue()
    args = (self._asked, self.answers)
    threading.Thread(target=_serve, args=args, name='folk-decode', daemon=True).start()

  def ask(self, work: Callable[[], Any]) -> None:
    self._asked.put(work)

  def __del__(self):
    self._asked.put(None)


def _serve(asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
  while (work := asked.get()) is not None:
    try:
      answers.put((work(), None))
    except BaseException as error:
      answers.put((None, error))
    del work


class Patience:
  """Does work in a process's threads, each with a helper, and leaves a helper that decodes one sample for too long."""

  def __init__(self, seconds: float, board: Board, threads: int):
    """Takes the limit, 0 for none, and the board with so many places."""
    self._seconds, self._board = seconds, board
    self._places: queue.SimpleQueue[int] = queue.SimpleQueue()
    for thread in range(threads):
      self._places.put(thread)
    self._helpers = threading.local()
    self._stopped = threading.Event()

  def do(self, work: Callable[[Turn], Any]) -> Any:
    """Returns `work(turn)`, and raises what it raises.

    Raises:
      LeftBehind: a sample took longer than the limit to decode.
      Stopped: `stop` was called, or the program is at its end.
    """
    if self._stopped.is_set():
      raise Stopped
    place = self._places.get()
    turn = Turn(self._board, place)
    try:
      return self._done(turn, work) if self._seconds else work(turn)
    finally:
      turn.leave()
      self._places.put(place)

  def _done(self, turn: Turn, work: Callable[[Turn], Any]) -> Any:
    helper = getattr(self._helpers, 'mine', None)
    if helper is None:
      helper = self._helpers.mine = _Helper()
    helper.ask(lambda: work(turn))
    watch = Watch()
    while True:
      try:
        result, error = helper.answers.get(timeout=min(LOOK_SECONDS, self._seconds / 4))
      except queue.Empty:
        now = turn.now
        waited = watch.look([now]).get(now, 0.0)
        if self._stopped.is_set() or not threading.main_thread().is_alive():
          self._helpers.mine = None
          raise Stopped from None
        if now and now[1] == DECODING and waited >= self._seconds:
          self._helpers.mine = None
          raise LeftBehind(now[2]) from None
        continue
      if error is not None:
        raise error
      return result

  def stop(self) -> None:
    """Lets those go that wait."""
    self._stopped.set()
