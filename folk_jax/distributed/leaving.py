"""How a process of several ends before its time, because it failed or was told to."""

import atexit
import contextlib
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

from folk_jax.errors import UserError

# jax's service runs in process 0: it leaves last, so that the others can say what was wrong with them.
_LAST_SECONDS = 3.0

# Of other errors than these it is 1.
_STATUSES = {UserError: 2, KeyboardInterrupt: 130}


def hush() -> None:
  """Makes this process, which isn't process 0, silent but for errors; what it finds in its data it says as such."""
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
