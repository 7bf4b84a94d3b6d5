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
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from folk_jax.data import tasks, transport
from folk_jax.data.decode import BadImage, decode
from folk_jax.data.labels import check_labels
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.errors import UserError

# More bytes than any array has: Grain's own shared memory stays out of it.
_NEVER = 1 << 62


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
    classes: int = 0,
  ):
    self._rows = rows
    self._source = source
    self._settings = settings
    self._training = training
    self._ring = ring
    self._classes = classes
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
    skipped_B = batch.pop(tasks.SKIPPED)
    for row in np.flatnonzero(skipped_B):
      self._report(int(batch['index'][row]), int(skipped_B[row]))
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
    if self._training and skipped >= min(size, tasks.MAX_SKIPS):
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
  dataset: Any,
  source: Source,
  settings: DataSettings,
  training: bool,
  shapes: transport.Shapes,
  classes: int,
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
  return Batches(iter(batches), source, settings, training, ring, classes)


def train_batches(
  source: Source,
  settings: DataSettings,
  *,
  seed: int,
  step: int,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  classes: int = 0,
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
    classes: K, where every image must have a label in [0, K); 0 lets pass what labels there are.

  Returns:
    An iterator of this process's `batch_size / process_count` rows of every global batch, V views
    each. Every epoch visits each sample once, in a new order; an epoch that does not end with a
    batch runs on into the next.

  Raises:
    UserError: a batch that the processes do not divide; while iterating, too many bad files, or a
      label outside [0, K) (names the image).
  """
  import grain

  rows = _rows_per_process(batch_size, process_count)
  dataset = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()
  # By process only after the draws are keyed: sliced before, processes would share their draws. Each takes a block of
  # the batch: one after the other they are the batch of one process, in its order.
  dataset = dataset.random_map(tasks.draw).batch(rows, drop_remainder=True)
  dataset = dataset[process_index::process_count][step:]
  dataset = dataset.map(tasks.TrainTask(source, settings))
  shapes = tasks.batch_shapes(settings, rows, training=True)
  return _stream(dataset, source, settings, True, shapes, classes)


def eval_batches(
  source: Source,
  settings: DataSettings,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  classes: int = 0,
) -> Batches:
  """Goes once through a source, in order, one centre view a sample.

  Args:
    source: where samples come from.
    settings: size, resize, workers.
    batch_size: samples in the global batch.
    process_index: number of this process.
    process_count: number of processes that share a global batch.
    classes: K, where every image must have a label in [0, K); 0 lets pass what labels there are.

  Returns:
    An iterator of this process's rows, views uint8 [B, 1, S, S, 3]; `valid` is False on the padding
    that fills the last batch and on samples that do not decode. Every process gets the same number
    of batches.

  Raises:
    UserError: a batch that the processes do not divide; while iterating, too many bad files, or a
      label outside [0, K) (names the image).
  """
  import grain

  rows = _rows_per_process(batch_size, process_count)
  padded = math.ceil(len(source) / batch_size) * batch_size
  dataset = grain.MapDataset.range(padded).map(lambda index: {'index': np.int64(index)})
  dataset = dataset.batch(rows, drop_remainder=True)[process_index::process_count]
  dataset = dataset.map(tasks.EvalTask(source, settings))
  shapes = tasks.batch_shapes(settings, rows, training=False)
  return _stream(dataset, source, settings, False, shapes, classes)
