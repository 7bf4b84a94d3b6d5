"""What a training loop holds: batches that watch for bad files and for workers that die, and go on where they can."""

import collections
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from folk_jax.data import notices, tasks
from folk_jax.data.labels import check_labels
from folk_jax.data.ledger import Bad, Ledger, trying
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.data.stream import Holder, Stream, WorkerLost, close_when_dropped
from folk_jax.errors import UserError

# Workers are started anew so often within so many batches; then something is wrong that starting does not cure.
MAX_RESTARTS = 3
_WITHIN_BATCHES = 100

# Those that somebody waits for, in this process.
_WAITED_FOR: weakref.WeakSet['Batches'] = weakref.WeakSet()

# Opens the stream at a batch's number, without these samples.
OpenStream = Callable[[int, Mapping[int, str]], Stream]


class Batches(Iterator[dict[str, np.ndarray]]):
  """An iterator of batches that watches for bad files; close it, or use it in a `with` statement.

  A batch holds `views` uint8 [B, V, S, S, 3], `local_views` uint8 [B, L, s, s, 3] and `mask` uint8 [B, 1, S, S] where
  the settings ask for them (with masks, evaluation fills their canvas), `label` int32 [B] (-1 unknown), `index`
  int64 [B] (the sample's number in the source, -1 on padding) and `valid` bool [B].

  Where a worker dies, all are started anew at the batch that is due: the batches stay what they would have been. A
  sample on which a worker died twice counts as bad, and is not tried again; by a later start it is, where its file has
  changed or `decode_seconds` is longer.
  """

  def __init__(
    self,
    open_stream: OpenStream,
    source: Source,
    settings: DataSettings,
    training: bool,
    classes: int = 0,
    ledger: Ledger | None = None,
    process_index: int = 0,
  ):
    """Opens the stream.

    Args:
      open_stream: opens it at a batch's number.
      source: where samples come from.
      settings: how they are read, and how many may be bad.
      training: whether a batch must be whole.
      classes: K, where every image must have a label in [0, K); 0 lets pass what labels there are.
      ledger: the bad samples of the whole run; None counts those of these batches.
      process_index: number of this process, for what is said.
    """
    self._open = open_stream
    self._source = source
    self._settings = settings
    self._training = training
    self._classes = classes
    self._ledger = Ledger() if ledger is None else ledger
    self._process = process_index
    self._passed_over = {bad.index: bad.reason for bad in self._bad.values() if self._holds(bad)}
    self._delivered = 0
    self._restarts: collections.deque[int] = collections.deque(maxlen=MAX_RESTARTS + 1)
    self._suspects: set[int] = set()
    self._closed = False
    self._holder = Holder(open_stream(0, self._passed_over))
    self._finalizer = close_when_dropped(self, self._holder)

  @property
  def _bad(self) -> dict[int, Bad]:
    return self._ledger.bad

  def _holds(self, bad: Bad) -> bool:
    """Whether a sample that was passed over is as it was then."""
    if not (bad.passed_over and bad.tried and bad.index < len(self._source)):
      return False
    return bad.tried.holds(trying(self._source, bad.index, self._settings.decode_seconds))

  @property
  def bad_names(self) -> list[str]:
    """The samples met so far that do not decode, by name, in the order met; by all starts and processes of the run."""
    self._ledger.refresh(now=True)
    return [bad.name for bad in self._bad.values()]

  @property
  def bad_count(self) -> int:
    """The number of different samples met so far that do not decode, by all starts and processes of the run."""
    self._ledger.refresh(now=True)
    return len(self._bad)

  def words(self) -> str:
    """What the workers are doing; any thread may ask."""
    return self._holder.stream.words(self._source.place)

  def __next__(self) -> dict[str, np.ndarray]:
    if self._closed:
      raise ValueError('these batches are closed')
    batch = None
    _WAITED_FOR.add(self)
    try:
      while batch is None:
        try:
          batch = self._holder.stream.next()
        except WorkerLost as lost:
          self._restart(lost)
    finally:
      _WAITED_FOR.discard(self)
    self._delivered += 1
    self._look_at(batch, tasks.unpack_faults(batch.pop(tasks.FAULTS)))
    if self._classes:
      self._check_labels(batch)
    return batch

  def _check_labels(self, batch: dict[str, np.ndarray]) -> None:
    valid_B = batch['valid']
    index_B = batch['index'][valid_B]
    try:
      check_labels(
        batch['label'][valid_B], self._classes, lambda row: self._source.name(int(index_B[row]))
      )
    except UserError:
      self.close()
      raise

  def _look_at(self, batch: dict[str, np.ndarray], faults: list[Bad]) -> None:
    """Notes the samples that were passed over, and those that were bad once and decode; raises past the share."""
    if self._bad:
      for index in self._bad.keys() & set(batch['index'][batch['valid']].tolist()):
        notices.warn(self._process, f'decodes after all: {self._bad[index].name}')
        self._ledger.mend(index)
    for bad in faults:
      self._note(bad)
    gone_B = np.flatnonzero(~batch['valid'])
    if self._training and len(gone_B):
      first = int(batch['index'][gone_B[0]])
      self.close()
      raise UserError(
        f'{min(len(self._source), tasks.MAX_SKIPS)} samples in a row do not decode, from '
        f'{self._bad[first]} on; mend them'
      )

  def _note(self, bad: Bad) -> None:
    """Warns of a bad sample where it is new; raises past the share, also where it is not."""
    # One that an earlier start passed over was tried again: what is known of it is new.
    if bad.index not in self._bad or bad.passed_over and bad.index not in self._passed_over:
      if bad.passed_over:
        self._passed_over[bad.index] = bad.reason
        tried = trying(self._source, bad.index, self._settings.decode_seconds)
        bad = dataclasses.replace(bad, tried=tried)
      notices.warn(self._process, f'skipping a bad file: {bad}')
      self._ledger.add(bad)
      self._ledger.refresh()
    size, share = len(self._source), self._settings.max_bad_share
    if len(self._bad) <= share * size:
      return
    self.close()
    kept = f', and remove {self._ledger.where}' if self._ledger.where else ''
    raise UserError(
      f'{len(self._bad)} of {size} samples do not decode, more than data.max_bad_share={share:g} allows; '
      f'the first: {next(iter(self._bad.values()))}; '
      f'mend or remove them{kept}, or raise data.max_bad_share'
    )

  def _restart(self, lost: WorkerLost) -> None:
    """Starts the workers anew at the batch that is due; raises where that has not helped before."""
    self._holder.stream.close(patiently=False)
    place = self._source.place
    were = '; '.join(at.words(place(at.index)) for at in lost.at) or 'it was at no sample'
    what = f'{lost} ({were})'
    bad = []
    if lost.overdue is not None:
      bad = [(lost.overdue, tasks.too_long(self._settings.decode_seconds))]
    else:
      now = {at.index for at in lost.at}
      bad = [(index, f'a worker died on it twice: {lost}') for index in now & self._suspects]
      self._suspects |= now
    self._restarts.append(self._delivered)
    if len(self._restarts) > MAX_RESTARTS and self._delivered - self._restarts[0] < _WITHIN_BATCHES:
      self._closed = True
      self._ledger.close()
      raise UserError(
        f'workers ended {len(self._restarts)} times within {_WITHIN_BATCHES} batches, the last time: {what}. Exit code '
        '-9 is most often want of memory: give fewer data.workers, a smaller data.prefetch, or more memory'
      ) from lost
    notices.warn(self._process, f'{what}; starting all workers anew at batch {self._delivered}')
    for index, reason in bad:
      self._note(Bad(index, place(index), reason, passed_over=True))
    self._holder.stream = self._open(self._delivered, self._passed_over)

  def close(self) -> None:
    """Stops the workers; asking for another batch raises ValueError."""
    if self._closed:
      return
    self._closed = True
    self._ledger.close()
    self._finalizer.cancel()
    self._holder.stream.close()

  def __enter__(self) -> 'Batches':
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self.close()


def waiting_for() -> str:
  """What the batches wait for that somebody in this process waits for; any thread may ask."""
  return '; '.join(batches.words() for batches in list(_WAITED_FOR)) or 'not for images'
