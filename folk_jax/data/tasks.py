"""From samples to a batch: what a worker does with the numbers that the stream gives it."""

import json
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from folk_jax.data import masks, transport
from folk_jax.data.board import CUTTING, DECODING, READING, Board
from folk_jax.data.decode import BadImage, decode
from folk_jax.data.ledger import Bad
from folk_jax.data.patience import LeftBehind, Patience, Turn
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.data.views import centre_view, random_view
from folk_jax.errors import UserError

# A sample that does not decode is replaced by the next that does, at most so far away: a data set
# with a longer bad stretch is broken, and a worker must not search it for ever.
MAX_SKIPS = 64
# The samples passed over to make a batch, as text; taken out of the batch before the caller sees it.
FAULTS = 'faults'
# Threads that a process may leave with samples that hang them: each holds a core and a batch's memory.
MAX_LEFT_BEHIND = 8
_NAMED = 20


def draw(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Keeps a sample's number and the state of Grain's generator for its place in the stream."""
  state = rng.bit_generator.state['state']
  return {'index': np.int64(index), 'state': np.concatenate([state['counter'], state['key']])}


def _restore(rng: np.random.Generator, state: np.ndarray) -> None:
  """Sets a Philox generator to what `draw` kept."""
  rng.bit_generator.state = {
    'bit_generator': 'Philox',
    'state': {'counter': state[:4], 'key': state[4:]},
    'buffer': np.zeros(4, np.uint64),
    'buffer_pos': 4,
    'has_uint32': 0,
    'uinteger': 0,
  }


def batch_shapes(settings: DataSettings, rows: int, training: bool) -> transport.Shapes:
  """The image arrays of every batch of `rows` samples, by name."""
  side, local = settings.image_size, settings.local_views
  shapes = {'views': (rows, len(settings.views) if training else 1, side, side, 3)}
  if training and local:
    shapes['local_views'] = (rows, local.count, local.size, local.size, 3)
  if settings.masks:
    sides = (side, side) if training else (settings.masks.height, settings.masks.width)
    shapes |= {'views': (rows, 1, *sides, 3), 'mask': (rows, 1, *sides)}
  return shapes


class Task:
  """Makes a batch of the samples that a worker is given.

  A whole batch at a time, because pictures made one by one and stacked afterwards cost half as much
  again: small arrays come from pages that glibc keeps handing back, one large array does not.
  """

  training = False

  def __init__(
    self,
    source: Source,
    settings: DataSettings,
    board: Board | None = None,
    passed_over: Mapping[int, str] | None = None,
  ):
    """Takes where samples come from, how they are cut, where to note them, and those not to try, with reasons."""
    self._source = source
    self._settings = settings
    self._board = board or Board(0, settings.threads)
    self._passed_over = dict(passed_over or {})
    self._start()

  def _start(self) -> None:
    settings = self._settings
    self._patience = Patience(settings.decode_seconds, self._board, settings.threads)
    self._left: list[int] = []

  def __getstate__(self) -> dict[str, Any]:
    return {key: x for key, x in self.__dict__.items() if key not in ('_patience', '_left')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._start()

  def stop(self) -> None:
    """Makes no more batches: those under way end as soon as they can."""
    self._patience.stop()

  def __call__(self, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
      while True:
        try:
          return self._patience.do(lambda turn: self._make(samples, turn))
        except LeftBehind as late:
          self._leave(late.index)
    except Exception as error:
      # An error that cannot be pickled never arrives, and the main process would wait for ever.
      try:
        pickle.loads(pickle.dumps(error))
      except Exception:
        raise RuntimeError(f'{type(error).__name__}: {error}') from None
      raise

  def _leave(self, index: int) -> None:
    """Passes over, from now on, a sample that takes too long to decode."""
    seconds = self._settings.decode_seconds
    self._passed_over[index] = too_long(seconds)
    self._left.append(index)
    if len(self._left) > MAX_LEFT_BEHIND:
      named = ', '.join(f"'{self._source.place(i)}'" for i in self._left[:_NAMED])
      raise UserError(
        f'{len(self._left)} samples each took longer than data.decode_seconds={seconds:g} to decode: '
        f'{named}; mend or remove them, or raise data.decode_seconds'
      )

  def _make(self, samples: Mapping[str, np.ndarray], turn: Turn) -> dict[str, Any]:
    rows = len(samples['index'])
    shapes = batch_shapes(self._settings, rows, self.training)
    batch: dict[str, Any] = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
    batch |= {
      'label': np.full(rows, -1, np.int32),
      'index': samples['index'].copy(),
      'valid': np.ones(rows, np.bool_),
    }
    faults: list[Bad] = []
    self._fill(batch, samples, turn, faults)
    for name in shapes:
      batch[name][~batch['valid']] = 0
    return batch | {FAULTS: pack_faults(faults)}

  def _fill(
    self,
    batch: dict[str, np.ndarray],
    samples: Mapping[str, np.ndarray],
    turn: Turn,
    faults: list[Bad],
  ) -> None:
    """Sets every row of a batch; rows with `valid` False may keep any views."""
    raise NotImplementedError

  def _read(self, index: int, turn: Turn, faults: list[Bad]) -> tuple[np.ndarray, int] | None:
    """Returns pixels and label of a sample; None, and a fault, for one that cannot be read or decoded."""
    try:
      if index in self._passed_over:
        raise BadImage(self._passed_over[index])
      turn.note(READING, index)
      data, label = self._source.read(index)
      turn.note(DECODING, index)
      image_HWC = decode(data)
      turn.note(CUTTING, index)
      return image_HWC, label
    except (BadImage, OSError) as error:
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      passed_over = index in self._passed_over
      name = self._source.place(index) if passed_over else self._source.name(index)
      faults.append(Bad(index, name, reason, passed_over))
      return None


def too_long(seconds: float) -> str:
  """Why a sample that hangs its decoder is bad."""
  return f'takes longer than {seconds:g} s to decode'


def pack_faults(faults: list[Bad]) -> str:
  """Faults as text, which Grain carries as it is."""
  return json.dumps([[bad.index, bad.name, bad.reason, bad.passed_over] for bad in faults])


def unpack_faults(text: str) -> list[Bad]:
  """What `pack_faults` packed."""
  return [Bad(*fields) for fields in json.loads(text)]


class TrainTask(Task):
  """Random views of each sample, or of the next one that decodes."""

  training = True

  def _fill(
    self,
    batch: dict[str, np.ndarray],
    samples: Mapping[str, np.ndarray],
    turn: Turn,
    faults: list[Bad],
  ) -> None:
    settings = self._settings
    rng = np.random.Generator(np.random.Philox(0))
    for row, (wanted, state) in enumerate(zip(samples['index'], samples['state'], strict=True)):
      image_HWC, label, index = self._next_good(int(wanted), turn, faults)
      batch['label'][row] = label
      batch['index'][row] = index
      batch['valid'][row] = image_HWC is not None
      if image_HWC is not None:
        _restore(rng, state)
        if settings.masks:
          masks.set_pair(batch, row, image_HWC, self._source, settings, rng)
          continue
        for number, view in enumerate(settings.views):
          batch['views'][row, number] = random_view(
            image_HWC, settings.image_size, view, settings.interpolation, rng
          )
        # After the global views, whose draws are then the same with local views and without.
        if local := settings.local_views:
          for number in range(local.count):
            batch['local_views'][row, number] = random_view(
              image_HWC, local.size, local.view, settings.interpolation, rng
            )

  def _next_good(
    self, wanted: int, turn: Turn, faults: list[Bad]
  ) -> tuple[np.ndarray | None, int, int]:
    """Returns pixels (None where too many fail), label and index."""
    size = len(self._source)
    tries = min(size, MAX_SKIPS)
    for skipped in range(tries):
      index = (wanted + skipped) % size
      if found := self._read(index, turn, faults):
        return *found, index
    return None, -1, wanted


class EvalTask(Task):
  """The centre view of each sample; invalid past the end, and where a sample does not decode."""

  def _fill(
    self,
    batch: dict[str, np.ndarray],
    samples: Mapping[str, np.ndarray],
    turn: Turn,
    faults: list[Bad],
  ) -> None:
    settings = self._settings
    for row, index in enumerate(samples['index'].tolist()):
      if index >= len(self._source):
        batch['index'][row] = -1
        batch['valid'][row] = False
        continue
      found = self._read(index, turn, faults)
      if found is None:
        batch['label'][row] = self._label(index)
        batch['valid'][row] = False
        continue
      image_HWC, batch['label'][row] = found
      if settings.masks:
        masks.set_pair(batch, row, image_HWC, self._source, settings)
        continue
      batch['views'][row, 0] = centre_view(
        image_HWC, settings.image_size, settings.short_side, settings.interpolation
      )

  def _label(self, index: int) -> int:
    """The label of a sample without an image; -1 where it went with it."""
    try:
      return self._source.label(index)
    except OSError:
      return -1
