"""How the views of a batch come from a worker process: through slots of shared memory that are used
again and again.

Grain's own way makes a shared-memory file for each batch, and every page of it is handed out,
zeroed, mapped twice and given back: 15 ms for 64 pairs of 224-pixel views on a virtual machine, a
fifth of what decoding them takes. Copying into and out of pages that are already there takes 2 ms.
What leaves is plain memory, with nothing to unlink.
"""

import itertools
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from multiprocessing import shared_memory, util
from typing import Any

import numpy as np

# Of each worker: one slot is written while the other waits to be read.
SLOTS = 2
# Before the arrays of a slot stand two numbers: the batch in it plus one, 0 while it is free; and
# whether the reader has gone.
_HEADER = 2 * np.dtype(np.int64).itemsize
_POLL_SECONDS = 0.0005

# The uint8 arrays of every batch, by name.
Shapes = Mapping[str, tuple[int, ...]]

_worker = 0


def set_worker(index: int, count: int) -> None:
  """Notes in a worker which one it is; Grain calls it first, with (index, number of workers).

  SIGTERM, which Slurm and systemd send to all processes of a job at once, is the main process's matter: it still needs
  batches up to the step that it saves. Until here the worker held it back, as it was started (`hold_sigterm`). The
  worker ends with the main process, however that ends.
  """
  del count
  global _worker
  _worker = index
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
  threading.Thread(target=_end_with_parent, daemon=True).start()


def worker_number() -> int:
  """The number of this worker process; 0 in the main process."""
  return _worker


def hold_sigterm() -> None:
  """Holds SIGTERM back in this thread, in threads that it starts and in processes that any of those starts.

  A worker imports for some seconds before it can ignore the signal. Other threads of this process still get it.
  """
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def kill(pids: Iterable[int]) -> None:
  """Ends those of this process's children at once."""
  pids = set(pids)
  for child in multiprocessing.active_children():
    if child.pid in pids:
      child.kill()


def _kill_workers() -> None:
  for child in multiprocessing.active_children():
    if child.name.startswith('grain-'):
      child.kill()


# At its end multiprocessing waits for workers: Grain, which closes what it still knows of (priority 1), 25 seconds for
# each that nobody closed, and then the package itself without end for one that ignores SIGTERM. They hold nothing.
util.Finalize(None, _kill_workers, exitpriority=2)
util.Finalize(None, _kill_workers, exitpriority=0)


class Ring:
  """The slots of all workers: made in the main process, which reads; its copies in workers write.

  Flow control is in the slots, not in a count of what Grain may hold between worker and reader: a
  worker waits until its slot has been read.
  """

  def __init__(self, workers: int, shapes: Shapes):
    """Makes slots for a batch's uint8 arrays of these shapes.

    Args:
      workers: number of worker processes.
      shapes: by the arrays' names in every batch.
    """
    self._shapes = dict(shapes)
    size = _slot_bytes(shapes)
    self._blocks = {
      worker: [shared_memory.SharedMemory(create=True, size=size) for _ in range(SLOTS)]
      for worker in range(workers)
    }
    self._names = [[block.name for block in blocks] for blocks in self._blocks.values()]
    self._sent = 0
    # Also when nobody closes: shared memory outlives the process.
    self._release = weakref.finalize(self, _release, self._blocks)

  def __getstate__(self) -> dict[str, Any]:
    return {'_shapes': self._shapes, '_names': self._names, '_blocks': {}, '_sent': 0}

  def _slot(self, worker: int, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns header, int64 [2], and arrays of the slot for a worker's batch `number`."""
    buffer = self._blocks[worker][number % SLOTS].buf
    arrays, offset = {}, _HEADER
    for name, shape in self._shapes.items():
      arrays[name] = np.ndarray(shape, np.uint8, buffer, offset=offset)
      offset += math.prod(shape)
    return np.ndarray((2,), np.int64, buffer), arrays

  def send(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Writes a batch's arrays into this worker's next slot and puts their address in their place.

    Raises:
      SystemExit: the main process is gone, and nobody would ever read the slot.
    """
    if _worker not in self._blocks:
      names = self._names[_worker]
      self._blocks[_worker] = [shared_memory.SharedMemory(name) for name in names]
    header, arrays = self._slot(_worker, self._sent)
    parent = multiprocessing.parent_process()
    while header[0] and not header[1]:
      if parent is not None and not parent.is_alive():
        raise SystemExit(1)
      time.sleep(_POLL_SECONDS)
    if not header[1]:
      for name, array in arrays.items():
        array[:] = batch[name]
      header[0] = self._sent + 1
    address = np.array([_worker, self._sent], np.int64)
    self._sent += 1
    return {**batch, **dict.fromkeys(arrays, address)}

  def receive(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts copies of the arrays back where `send` put their address, and frees the slot."""
    worker, number = (int(part) for part in batch[next(iter(self._shapes))])
    header, arrays = self._slot(worker, number)
    if header[0] != number + 1:
      raise RuntimeError(f'slot of batch {number} of worker {worker} holds batch {header[0] - 1}')
    copies = {name: array.copy() for name, array in arrays.items()}
    header[0] = 0
    return {**batch, **copies}

  def stop(self) -> None:
    """Lets workers go that wait for a slot; nothing is read any more."""
    for worker, blocks in self._blocks.items():
      for number in range(len(blocks)):
        self._slot(worker, number)[0][1] = 1

  def close(self) -> None:
    """Gives the shared memory back, once the workers have ended."""
    self._release()


def ring_bytes(workers: int, shapes: Shapes) -> int:
  """Returns the shared memory that a ring takes, in bytes."""
  return workers * SLOTS * _slot_bytes(shapes)


def _slot_bytes(shapes: Shapes) -> int:
  return _HEADER + sum(map(math.prod, shapes.values()))


def has_room(workers: int, shapes: Shapes) -> bool:
  """Whether a ring fits: one page too many in shared memory kills its writer without a word."""
  if not os.path.isdir('/dev/shm'):
    return True
  return shutil.disk_usage('/dev/shm').free >= ring_bytes(workers, shapes)


def _release(blocks: dict[int, list[shared_memory.SharedMemory]]) -> None:
  for block in itertools.chain(*blocks.values()):
    block.close()
    block.unlink()
