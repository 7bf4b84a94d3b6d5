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
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from folk_jax.data import transport
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


class _Task:
  """What a worker does with one sample; keeps errors in a form that survives the way back."""

  def __init__(self, source: Source, settings: DataSettings):
    self._source = source
    self._settings = settings

  def _read(self, index: int) -> tuple[np.ndarray, int]:
    """Returns pixels and label of a sample; BadImage also for a file that cannot be read."""
    try:
      data, label = self._source.read(index)
    except OSError as error:
      raise BadImage(str(error)) from error
    return decode(data), label

  def _guarded(self, make: Any, *args: Any) -> dict[str, np.ndarray]:
    try:
      return make(*args)
    except Exception as error:
      # A worker's error that cannot be pickled never arrives, and the main process would wait for
      # ever.
      try:
        pickle.loads(pickle.dumps(error))
      except Exception:
        raise RuntimeError(f'{type(error).__name__}: {error}') from None
      raise

  def _row(
    self, views: np.ndarray | None, label: int, index: int, skipped: int
  ) -> dict[str, np.ndarray]:
    valid = views is not None
    if not valid:
      side = self._settings.image_size
      views = np.zeros((self.views_per_row, side, side, 3), np.uint8)
    return {
      'views': views,
      'label': np.int32(label),
      'index': np.int64(index),
      'valid': np.bool_(valid),
      _SKIPPED: np.int32(skipped),
    }


class _TrainTask(_Task):
  """Index -> random views of that sample, or of the next one that decodes."""

  @property
  def views_per_row(self) -> int:
    return len(self._settings.views)

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return self._guarded(self._make, int(index), rng)

  def _make(self, wanted: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    settings = self._settings
    tries = min(len(self._source), MAX_SKIPS)
    for skipped in range(tries):
      index = (wanted + skipped) % len(self._source)
      try:
        image_HWC, label = self._read(index)
      except BadImage:
        continue
      views_VHWC = np.empty(
        (self.views_per_row, settings.image_size, settings.image_size, 3), np.uint8
      )
      for view_HWC, view in zip(views_VHWC, settings.views, strict=True):
        view_HWC[:] = random_view(image_HWC, settings.image_size, view, settings.interpolation, rng)
      return self._row(views_VHWC, label, index, skipped)
    return self._row(None, -1, wanted + tries, tries)


class _EvalTask(_Task):
  """Index -> the centre view of that sample; an invalid row past the end and for a sample that does
  not decode.
  """

  views_per_row = 1

  def __call__(self, index: int) -> dict[str, np.ndarray]:
    return self._guarded(self._make, int(index))

  def _make(self, index: int) -> dict[str, np.ndarray]:
    settings = self._settings
    if index >= len(self._source):
      return self._row(None, -1, -1, 0)
    try:
      image_HWC, label = self._read(index)
    except BadImage:
      return self._row(None, self._source.label(index), index, 1)
    view_HWC = centre_view(
      image_HWC, settings.image_size, settings.short_side, settings.interpolation
    )
    return self._row(view_HWC[None], label, index, 0)


class Batches(Iterator[dict[str, np.ndarray]]):
  """An iterator of batches that watches for bad files; close it, or use it in a `with` statement.

  A batch holds `views` uint8 [B, V, S, S, 3], `label` int32 [B] (-1 unknown), `index` int64 [B]
  (the sample's number in the source, -1 on padding) and `valid` bool [B].
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
  dataset: Any, source: Source, settings: DataSettings, training: bool, views_shape: tuple[int, ...]
) -> Batches:
  """Reads a Grain MapDataset of batches in threads, of this process or of workers."""
  import grain

  reading = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=settings.prefetch)
  batches = dataset.to_iter_dataset(reading)
  ring, waiting = None, 1
  if settings.workers:
    if not flags.FLAGS.is_parsed():  # Grain reads flags: it fails where no absl app has parsed them
      flags.FLAGS.mark_as_parsed()
    if transport.has_room(settings.workers, views_shape):
      ring = transport.Ring(settings.workers, views_shape)
      # Addresses only; with room for all, a worker waits in the ring alone, which knows when to
      # give up.
      waiting = transport.SLOTS + 1
      batches = batches.map(ring.send)
    else:
      needed = transport.ring_bytes(settings.workers, views_shape) >> 20
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
  task = _TrainTask(source, settings)
  dataset = (
    grain.MapDataset.range(len(source))
    .seed(seed % 2**32)
    .shuffle()
    .repeat()
    .random_map(task)[
      # By process only after the draws are keyed: sliced before, processes would share their draws.
      process_index::process_count
    ]
    .batch(rows, drop_remainder=True)[step:]
  )
  shape = (rows, task.views_per_row, settings.image_size, settings.image_size, 3)
  return _stream(dataset, source, settings, True, shape)


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
  dataset = grain.MapDataset.range(padded).map(_EvalTask(source, settings))[
    process_index::process_count
  ]
  dataset = dataset.batch(rows, drop_remainder=True)
  shape = (rows, 1, settings.image_size, settings.image_size, 3)
  return _stream(dataset, source, settings, False, shape)
