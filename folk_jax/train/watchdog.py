"""A thread that says what a run waits for, when it waits long; and, where asked to, ends a run that hangs.

Nothing here can mend a hang. It turns silence into a line, then into the stacks of all threads, then into an exit
status after which launch scripts start the run again.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from folk_jax.errors import UserError

# What a run that hung leaves behind: "try again" of BSD's sysexits.
STATUS = 75
# A stopped process or a sleeping machine has not waited: a look counts twice the time between looks at most.
_LOOKS = 20
_LONGEST_LOOK = 5.0
_MOST_BETWEEN = 3600.0
_LAST_SECONDS = 5.0


def check(seconds: float, limit: float) -> None:
  """Refuses what makes no sense. Raises `UserError`."""
  if not (seconds >= 0 and limit >= 0):
    raise UserError(
      f'config.watchdog has seconds {seconds:g} and limit {limit:g}; give seconds, 0 for never'
    )
  if limit and limit < seconds:
    raise UserError(
      f'config.watchdog.limit {limit:g} ends a run before config.watchdog.seconds {seconds:g} says what it waits for; '
      'give a longer one, or 0 for never'
    )


class Watchdog:
  """Call it with what comes next; it speaks when that takes long. A context manager.

  The first notice comes after `seconds`, the next after twice that, four times, and so on, an hour later at most. With
  the second come the stacks of all threads, in `<workdir>/stacks-<process>.txt`, or on stderr where the workdir is not
  a local folder. After `limit` the process ends with status 75, workers and all, without saving.
  """

  def __init__(
    self,
    seconds: float,
    limit: float = 0.0,
    *,
    workdir: str = '',
    process: int = 0,
    stream: TextIO | None = None,
  ):
    """Begins to watch.

    Args:
      seconds: how long to wait in silence; 0 for ever.
      limit: how long to wait at all; 0 for ever.
      workdir: the run's folder.
      process: number of this process of the run.
      stream: where notices go; stderr by default.

    Raises:
      UserError: a limit below `seconds`, or a negative number.
    """
    check(seconds, limit)
    self._seconds, self._limit, self._process = seconds, limit, process
    self._stream = stream
    local = workdir and '://' not in workdir
    folder = pathlib.Path(workdir).expanduser() if local else None
    self._stacks = folder / f'stacks-{process}.txt' if folder else None
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._what, self._detail, self._patience = '', None, 1.0
    self._waited, self._notices, self._next = 0.0, 0, seconds
    self._thread: threading.Thread | None = None
    shortest = min((s for s in (seconds, limit) if s), default=0.0)
    if shortest:
      self._every = min(shortest / _LOOKS, _LONGEST_LOOK)
      self._thread = threading.Thread(target=self._watch, name='folk-watchdog', daemon=True)
      self._thread.start()

  def __call__(
    self, what: str, detail: Callable[[], str] | None = None, patience: float = 1.0
  ) -> None:
    """Says what the run does from here on.

    Args:
      what: completes "waiting for ...".
      detail: asked for more when a notice is due.
      patience: how many times longer than usual this may take, before a notice and before the limit.
    """
    with self._lock:
      self._what, self._detail, self._patience = what, detail, patience
      self._waited, self._notices, self._next = 0.0, 0, self._seconds * patience

  def compiling(self, what: str) -> None:
    """Says that `what` is compiled from here on, which takes minutes for a large model."""
    self(f'the compiler, at {what}: minutes are usual for a large model', patience=10.0)

  def idle(self) -> None:
    """Says that nothing is waited for from here on."""
    self('')

  def _watch(self) -> None:
    before = time.monotonic()
    while not self._ended.wait(self._every):
      now = time.monotonic()
      passed, before = min(now - before, 2 * self._every), now
      with self._lock:
        self._waited += passed
        what, detail = self._what, self._detail
        waited, patience = self._waited, self._patience
        due = self._seconds and waited >= self._next
        if due:
          self._notices += 1
          self._next += min(self._next, _MOST_BETWEEN)
        notices = self._notices
      if not what:
        continue
      if due:
        self._say(f'waiting for {what}: {waited:.0f} s so far{_asked(detail)}')
        if notices == 2:
          self._dump(what)
      if self._limit and waited >= self._limit * patience:
        self._end(what, waited, detail)

  def _say(self, line: str) -> None:
    stream = self._stream or sys.stderr
    who = f'process {self._process}: ' if self._process else ''
    with contextlib.suppress(OSError, ValueError):
      print(f'{who}{line}', file=stream, flush=True)

  def _dump(self, what: str) -> None:
    """Writes the stacks of all threads."""
    try:
      if self._stacks is not None:
        with open(self._stacks, 'a', encoding='utf-8') as file:
          file.write(f'--- {time.strftime("%Y-%m-%d %H:%M:%S")} waiting for {what}\n')
          file.flush()
          faulthandler.dump_traceback(file)
        self._say(f'stacks of all threads are in {self._stacks}')
        return
    except OSError as error:
      self._say(f'{self._stacks} cannot be written: {error}')
    with contextlib.suppress(OSError, ValueError, AttributeError):
      faulthandler.dump_traceback(sys.__stderr__)

  def _end(self, what: str, waited: float, detail: Callable[[], str] | None) -> NoReturn:
    self._say(
      f'stopped: waited {waited:.0f} s for {what}{_asked(detail)}, and config.watchdog.limit is {self._limit:g}; '
      'the same command goes on from what was saved last'
    )
    self._dump(what)
    children = multiprocessing.active_children()
    for child in children:
      child.kill()
    end = time.monotonic() + _LAST_SECONDS
    for child in children:  # Gone before this process is, but where a disk that hangs holds one.
      child.join(max(0.0, end - time.monotonic()))
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
    os._exit(STATUS)

  def close(self) -> None:
    """Ends the thread."""
    self._ended.set()
    if self._thread is not None and self._thread is not threading.current_thread():
      self._thread.join()

  def __enter__(self) -> 'Watchdog':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def _asked(detail: Callable[[], str] | None) -> str:
  """More about it, in brackets; a question that fails is no reason to fall silent."""
  if detail is None:
    return ''
  try:
    return f' ({detail()})'
  except Exception as error:
    return f' ({type(error).__name__}: {error})'
