"""How a process ends before its time: told to (SIGTERM), or because one of several failed."""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

from folk_jax.errors import UserError

# What a process that SIGTERM ended leaves behind, as a shell counts.
STATUS = 128 + signal.SIGTERM
# jax's service runs in process 0: it leaves last, so that the others can say what was wrong with them.
_LAST_SECONDS = 3.0

# Of other errors than these it is 1.
_STATUSES = {UserError: 2, KeyboardInterrupt: 130}

_told = False


class Preempted(Exception):
  """The machine is wanted back: the run is saved, and goes on when it is started again."""


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[None]:
  """Inside, SIGTERM asks for a save at the next step instead of killing; a second one kills."""
  global _told

  def note(number: int, frame: object) -> None:
    del number, frame
    global _told
    _told = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  _told = False
  if threading.current_thread() is not threading.main_thread():
    yield  # Somebody else's program: its signals are its own.
    return
  before = signal.signal(signal.SIGTERM, note)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
    _told = False


def preempted(step: int) -> bool:
  """Whether to save after `step` and leave; all processes of a run get the same answer for the same step.

  Call it once after every step. A process told to leave (SIGTERM) tells the others, and they agree on a step.
  """
  import jax

  if jax.process_count() == 1:
    return _told
  from jax.experimental import multihost_utils

  try:
    return multihost_utils.reached_preemption_sync_point(step)
  except RuntimeError:  # jax's preemption service is switched off, as where SIGTERM is not heeded.
    return False


def hush() -> None:
  """Makes this process, which isn't process 0, silent but for errors."""
  sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # for as long as the process lives
  warnings.simplefilter('ignore')
  logging.getLogger().setLevel(logging.ERROR)
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.ERROR)


@contextlib.contextmanager
def together(index: int) -> Iterator[None]:
  """Around the work of process number `index` of several: if it fails, it leaves without waiting for the others.

  At the end of a process jax waits for all others, which wait for this one in a sum over all devices. Gone, it is
  missed: jax ends them.
  """
  try:
    yield
  except BaseException as error:
    status = _status(error)
    if status:
      atexit.register(
        _leave, status, index
      )  # Before what was registered earlier, jax's wait among it.
    raise


def _status(error: BaseException) -> int:
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else int(error.code is not None)
  return next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), 1)


def _leave(status: int, index: int) -> NoReturn:
  for child in multiprocessing.active_children():
    child.kill()  # The loader's workers ignore SIGTERM.
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  if not index:
    time.sleep(_LAST_SECONDS)
  os._exit(status)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
  """Whether `condition` comes true in so many seconds; looked at once at least."""
  end = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > end:
      return False
    time.sleep(0.1)
  return True
