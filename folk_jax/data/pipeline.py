"""From a source to batches: the one place that knows Grain.

The stream is a pure function of (seed, step). Samples are shuffled anew each epoch, cut with draws
keyed on their place in the stream, then sliced by process, batched, and sliced at the step; Grain's
iterator state is never used. So 0, 2 or 4 workers give the same batches, P processes give the rows
of the one-process batch between them, and a run that resumes at step n gets what the uninterrupted
run got.

Grain is imported where it is used: it imports jax wherever jax is installed, and this room must
load without.
"""

import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags, logging

from folk_jax.data import masks, transport
from folk_jax.data.decode import BadImage, decode
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.data.views import centre_view, random_view
from folk_jax.errors import UserError

# A sample that does not decode is replaced by the next that does, at most so far away: a data set
# with a longer bad stretch is broken, and a worker must not search it for ever.
MAX_SKIPS = 64
# More bytes than any array has: Grain's own shared memory stays out of it.
_NEVER = 1 << 62
# The number of samples passed over to fill a row; taken out of the batch before the caller sees it.
_SKIPPED = 'skipped'


def _draw(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Keeps a sample's number and the state of Grain's generator for its place in the stream."""
  state = rng.bit_generator.state['state']
  return {'index': np.int64(index), 'state': np.concatenate([state['counter'], state['key']])}


def _restore(rng: np.random.Generator, state: np.ndarray) -> None:
  """Sets a Philox generator to what `_draw` kept."""
  rng.bit_generator.state = {
    'bit_generator': 'Philox',
    'state': {'counter': state[:4], 'key': state[4:]},
    'buffer': np.zeros(4, np.uint64),
    'buffer_pos': 4,
    'has_uint32': 0,
    'uinteger': 0,
  }


def _shapes(settings: DataSettings, rows: int, training: bool) -> transport.Shapes:
  """The image arrays of every batch of `rows` samples, by name."""
  side, local = settings.image_size, settings.local_views
  shapes = {'views': (rows, len(settings.views) if training else 1, side, side, 3)}
  if training and local:
    shapes['local_views'] = (rows, local.count, local.size, local.size, 3)
  if settings.masks:
    sides = (side, side) if training else (settings.masks.height, settings.masks.width)
    shapes |= {'views': (rows, 1, *sides, 3), 'mask': (rows, 1, *sides)}
  return shapes


class _Task:
  """Makes a batch of the samples that a worker is given.

  A whole batch at a time, because pictures made one by one and stacked afterwards cost half as much
  again: small arrays come from pages that glibc keeps handing back, one large array does not.
  """

  training = False

  def __init__(self, source: Source, settings: DataSettings):
    self._source = source
    self._settings = settings

  def __call__(self, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = len(samples['index'])
    shapes = _shapes(self._settings, rows, self.training)
    batch = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
    batch |= {
      'label': np.full(rows, -1, np.int32),
      'index': samples['index'].copy(),
      'valid': np.ones(rows, np.bool_),
      _SKIPPED: np.zeros(rows, np.int32),
    }
    try:
      self._fill(batch, samples)
    except Exception as error:
      # An error that cannot be pickled never arrives, and the main process would wait for ever.
      try:
        pickle.loads(pickle.dumps(error))
      except Exception:
        raise RuntimeError(f'{type(error).__name__}: {error}') from None
      raise
    for name in shapes:
      batch[name][~batch['valid']] = 0
    return batch

  def _fill(self, batch: dict[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> None:
    """Sets every row of a batch; rows with `valid` False may keep any views."""
    raise NotImplementedError

  def _read(self, index: int) -> tuple[np.ndarray, int]:
    """Returns pixels and label of a sample; BadImage also for a file that cannot be read."""
    try:
      data, label = self._source.read(index)
    except OSError as error:
      raise BadImage(str(error)) from error
    return decode(data), label


class _TrainTask(_Task):
  """Random views of each sample, or of the next one that decodes."""

  training = True

  def _fill(self, batch: dict[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> None:
    settings = self._settings
    rng = np.random.Generator(np.random.Philox(0))
    for row, (wanted, state) in enumerate(zip(samples['index'], samples['state'], strict=True)):
      image_HWC, label, index, skipped = self._next_good(int(wanted))
      batch['label'][row] = label
      batch['index'][row] = index
      batch[_SKIPPED][row] = skipped
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

  def _next_good(self, wanted: int) -> tuple[np.ndarray | None, int, int, int]:
    """Returns pixels (None where too many fail), label, index, and how many were passed over."""
    size = len(self._source)
    tries = min(size, MAX_SKIPS)
    for skipped in range(tries):
      index = (wanted + skipped) % size
      try:
        image_HWC, label = self._read(index)
      except BadImage:
        continue
      return image_HWC, label, index, skipped
    return None, -1, wanted + tries, tries


class _EvalTask(_Task):
  """The centre view of each sample; invalid past the end, and where a sample does not decode."""

  def _fill(self, batch: dict[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> None:
    settings = self._settings
    for row, index in enumerate(samples['index'].tolist()):
      if index >= len(self._source):
        batch['index'][row] = -1
        batch['valid'][row] = False
        continue
      try:
        image_HWC, batch['label'][row] = self._read(index)
      except BadImage:
        batch['label'][row] = self._source.label(index)
        batch['valid'][row] = False
        batch[_SKIPPED][row] = 1
        continue
      if settings.masks:
        masks.set_pair(batch, row, image_HWC, self._source, settings)
        continue
      batch['views'][row, 0] = centre_view(
        image_HWC, settings.image_size, settings.short_side, settings.interpolation
      )


class Batches(Iterator[dict[str, np.ndarray]]):
  """An iterator of batches that watches for bad files; close it, or use it in a `with` statement.

  A batch holds `views` uint8 [B, V, S, S, 3], `local_views` uint8 [B, L, s, s, 3] and `mask` uint8 [B, 1, S, S] where
  the settings ask for them (with masks, evaluation fills their canvas), `label` int32 [B] (-1 unknown), `index`
  int64 [B] (the sample's number in the source, -1 on padding) and `valid` bool [B].
  """

  def __init__(
    self,
    rows: Iterator[dict[str, np.ndarray]],
    source: Source,
    settings: DataSettings,
    training: bool,
    ring: transport.Ring | None,
  ):
    self._rows = rows
    self._source = source
    self._settings = settings
    self._training = training
    self._ring = ring
    self._closed = False
    self._bad: dict[int, str] = {}

  @property
  def bad_names(self) -> list[str]:
    """The samples met so far that do not decode, by name, in the order met."""
    return list(self._bad.values())

  @property
  def bad_count(self) -> int:
    """The number of different samples met so far that do not decode."""
    return len(self._bad)

  def __next__(self) -> dict[str, np.ndarray]:
    if self._closed:
      raise ValueError('these batches are closed')
    batch = dict(next(self._rows))
    if self._ring:
      batch = self._ring.receive(batch)
    skipped_B = batch.pop(_SKIPPED)
    for row in np.flatnonzero(skipped_B):
      self._report(int(batch['index'][row]), int(skipped_B[row]))
    return batch

  def _report(self, index: int, skipped: int) -> None:
    """Notes the samples passed over to reach `index` (in evaluation: `index` itself); raises past
    the share.
    """
    size = len(self._source)
    first = index - skipped if self._training else index
    for bad in ((first + i) % size for i in range(skipped)):
      if bad in self._bad:
        continue
      self._bad[bad] = self._source.name(bad)
      logging.warning('skipping a bad file: %s (%s)', self._bad[bad], _reason(self._source, bad))
    share = self._settings.max_bad_share
    if len(self._bad) > share * size:
      self.close()
      number, name = next(iter(self._bad.items()))
      raise UserError(
        f'{len(self._bad)} of {size} samples do not decode, more than '
        f'data.max_bad_share={share:g} allows; '
        f'the first: {name} ({_reason(self._source, number)}); '
        'mend or remove them, or raise data.max_bad_share'
      )
    if self._training and skipped >= min(size, MAX_SKIPS):
      self.close()
      raise UserError(
        f'{skipped} samples in a row do not decode, from {self._source.name(first % size)} on; '
        'mend them'
      )

  def close(self) -> None:
    """Stops the workers; asking for another batch raises ValueError."""
    if self._closed:
      return
    self._closed = True
    if self._ring:
      self._ring.stop()
    self._rows.close()
    if self._ring:
      self._ring.close()

  def __enter__(self) -> 'Batches':
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self.close()


def _reason(source: Source, index: int) -> str:
  try:
    decode(source.fetch(index))
  except (BadImage, OSError) as error:
    return str(error)
  return 'decodes now'


def _rows_per_process(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'batch_size {batch_size} is not a multiple of the {process_count} processes; give one '
      'that is'
    )
  return batch_size // process_count


def _stream(
  dataset: Any, source: Source, settings: DataSettings, training: bool, shapes: transport.Shapes
) -> Batches:
  """Reads a Grain MapDataset of batches in threads, of this process or of workers."""
  import grain

  reading = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=settings.prefetch)
  batches = dataset.to_iter_dataset(reading)
  ring, waiting = None, 1
  if settings.workers:
    if not flags.FLAGS.is_parsed():  # Grain reads flags: it fails where no absl app has parsed them
      flags.FLAGS.mark_as_parsed()
    if transport.has_room(settings.workers, shapes):
      ring = transport.Ring(settings.workers, shapes)
      # Addresses only; with room for all, a worker waits in the ring alone, which knows when to
      # give up.
      waiting = transport.SLOTS + 1
      batches = batches.map(ring.send)
    else:
      needed = transport.ring_bytes(settings.workers, shapes) >> 20
      warnings.warn(
        f'/dev/shm has less free than the {needed} MiB that {settings.workers} workers need; '
        'batches go through pipes, which is slower (in Docker: --shm-size=8g)',
        stacklevel=3,
      )
    options = grain.experimental.DatasetOptions(min_shm_size=_NEVER)
    batches = grain.experimental.WithOptionsIterDataset(batches, options).mp_prefetch(
      grain.MultiprocessingOptions(num_workers=settings.workers, per_worker_buffer_size=waiting),
      worker_init_fn=transport.set_worker,
    )
  return Batches(iter(batches), source, settings, training, ring)


def train_batches(
  source: Source,
  settings: DataSettings,
  *,
  seed: int,
  step: int,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Streams training batches from optimiser step `step` on, without end.

  Args:
    source: where samples come from; its length may be smaller than the batch.
    settings: views, size, workers.
    seed: any integer; with `step` it determines every batch.
    step: the first optimiser step to make a batch for, 0 or more.
    batch_size: samples in the global batch.
    process_index: number of this process.
    process_count: number of processes that share a global batch.

  Returns:
    An iterator of this process's `batch_size / process_count` rows of every global batch, V views
    each. Every epoch visits each sample once, in a new order; an epoch that does not end with a
    batch runs on into the next.

  Raises:
    UserError: a batch that the processes do not divide; while iterating, too many bad files.
  """
  import grain

  rows = _rows_per_process(batch_size, process_count)
  dataset = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()
  # By process only after the draws are keyed: sliced before, processes would share their draws.
  dataset = dataset.random_map(_draw)[process_index::process_count]
  dataset = dataset.batch(rows, drop_remainder=True)[step:]
  dataset = dataset.map(_TrainTask(source, settings))
  return _stream(dataset, source, settings, True, _shapes(settings, rows, training=True))


def eval_batches(
  source: Source,
  settings: DataSettings,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Goes once through a source, in order, one centre view a sample.

  Args:
    source: where samples come from.
    settings: size, resize, workers.
    batch_size: samples in the global batch.
    process_index: number of this process.
    process_count: number of processes that share a global batch.

  Returns:
    An iterator of this process's rows, views uint8 [B, 1, S, S, 3]; `valid` is False on the padding
    that fills the last batch and on samples that do not decode. Every process gets the same number
    of batches.

  Raises:
    UserError: a batch that the processes do not divide; while iterating, too many bad files.
  """
  import grain

  rows = _rows_per_process(batch_size, process_count)
  padded = math.ceil(len(source) / batch_size) * batch_size
  dataset = grain.MapDataset.range(padded).map(lambda index: {'index': np.int64(index)})
  dataset = dataset[process_index::process_count].batch(rows, drop_remainder=True)
  dataset = dataset.map(_EvalTask(source, settings))
  return _stream(dataset, source, settings, False, _shapes(settings, rows, training=False))
