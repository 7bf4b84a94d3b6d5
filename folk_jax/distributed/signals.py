"""Being told to end: what SIGTERM and SIGINT (Ctrl-C) mean to a run that looks for them.

The first one asks. The run ends its step, saves, waits for the save and leaves. A second one, of either kind, leaves at
once, whatever the run is at: a save, a compilation, an evaluation. A checkpoint gets its name when all of it is
written, so that the newest one is whole whenever that happens.

Python runs the handler of a signal in the main thread, between two of its own instructions: while XLA compiles, none
would run for minutes, and a second signal would melt into the first. So that the number of a signal is written to a
pipe where it arrives, and a thread of its own reads it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

# What a process leaves behind that was told to end, as a shell counts. SIGTERM is a machine that is wanted back: launch
# scripts start the run again (143). SIGINT is a person: they do not (130).
STATUSES = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
# A terminal sends Ctrl-C to launcher and run alike, and some launchers pass it on: that is one signal, not two.
_SAME_SECONDS = 0.2

_FIRST = {
  signal.SIGTERM: 'told to end: this step ends and is saved',
  signal.SIGINT: 'interrupted: this step ends and is saved; Ctrl-C again leaves at once, with the last checkpoint',
}
_SECOND = 'told again: leaving at once; the same command goes on from the newest checkpoint'

# The signals that have come, each once.
_told: set[int] = set()


class Preempted(Exception):
  """The run was told to end and is saved; it goes on when it is started again.

  Attributes:
    status: the exit status that says so: 143, or 130 where a person was among those who told it.
  """

  def __init__(self, message: str):
    super().__init__(message)
    self.status = _status()


def _status() -> int:
  return STATUSES[signal.SIGINT if signal.SIGINT in _told else signal.SIGTERM]


@contextlib.contextmanager
def heeding(tell: Callable[[], None] | None = None, speaks: bool = True) -> Iterator[None]:
  """Inside, SIGTERM and SIGINT ask for a save at the next step (`preempted`); a second one leaves at once.

  Nothing changes outside the main thread: signals are another program's there.

  Args:
    tell: called at the first signal, in a thread: how the other processes of the run come to know.
    speaks: whether to say on stderr what is being done.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  _told.clear()
  reads, writes = socket.socketpair()
  writes.setblocking(False)
  before = {number: signal.signal(number, _note) for number in STATUSES}
  woken_before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
  watcher = threading.Thread(target=_watch, args=(reads, tell, speaks), daemon=True)
  watcher.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(woken_before)
    for number, handler in before.items():
      signal.signal(number, handler or signal.SIG_DFL)
    writes.close()  # The watcher reads an end of file.
    watcher.join()
    reads.close()
    _told.clear()


def _note(number: int, frame: object) -> None:
  del frame
  _told.add(number)


def _watch(reads: socket.socket, tell: Callable[[], None] | None, speaks: bool) -> None:
  first = None
  while byte := reads.recv(1):
    number = byte[0]
    if number not in STATUSES:
      continue  # Another signal that Python handles.
    _note(number, None)
    if first is None:
      first = time.monotonic()
      if speaks:
        _say(_FIRST[signal.Signals(number)])
      if tell is not None:
        tell()
    elif time.monotonic() - first > _SAME_SECONDS:
      _leave_at_once(speaks)


def _leave_at_once(speaks: bool) -> NoReturn:
  """Nothing here waits for a lock that another thread might hold: no stream is flushed, no thread is joined."""
  if speaks:
    _say(_SECOND)
  with contextlib.suppress(Exception):
    for child in multiprocessing.active_children():
      child.kill()  # The loader's workers ignore SIGTERM.
  os._exit(_status())


def _say(words: str) -> None:
  with contextlib.suppress(OSError):
    os.write(2, f'\n{words}\n'.encode())  # The progress line has no end of its own.


def told() -> bool:
  """Whether this process has been told to end, whatever the others of its run know."""
  return bool(_told)


def preempted(step: int) -> bool:
  """Whether to save after `step` and leave; all processes of a run get the same answer for the same step.

  Call it once after every step. A process told to leave tells the others, and they agree on a step.
  """
  import jax

  if jax.process_count() == 1:
    return bool(_told)
  import numpy as np
  from jax.experimental import multihost_utils

  try:
    reached = multihost_utils.reached_preemption_sync_point(step)
  except RuntimeError:  # jax's preemption service is switched off, as where signals are not heeded.
    return False
  if reached:
    # One of them may have been told by a person: all leave with the same status.
    by_hand_P = multihost_utils.process_allgather(np.array(signal.SIGINT in _told))
    _told.update([signal.SIGINT] if by_hand_P.any() else [])
  return reached


def jaxs_notice() -> Callable[[], None] | None:
  """What tells jax's preemption service of several processes that this one is to end; None where there is none.

  The service has put its own handler of SIGTERM there, in C++: it sets a flag, which a thread of the service passes on
  to all processes. It would swallow a second SIGTERM. So it is taken out and called by hand at the first signal, of
  either kind.
  """
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  default, ignore, error = None, 1, ctypes.c_void_p(-1).value
  address = libc.signal(signal.SIGTERM, ignore)
  if address in (default, ignore, error):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return None
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
  return lambda: handler(signal.SIGTERM)
