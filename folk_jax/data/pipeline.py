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
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from folk_jax.data import tasks, transport
from folk_jax.data.batches import Batches
from folk_jax.data.board import Board
from folk_jax.data.ledger import Ledger
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.data.stream import Stream
from folk_jax.errors import UserError

# More bytes than any array has: Grain's own shared memory stays out of it.
_NEVER = 1 << 62


def _rows_per_process(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'batch_size {batch_size} is not a multiple of the {process_count} processes; give one '
      'that is'
    )
  return batch_size // process_count


def _batches(
  dataset: Any,
  source: Source,
  settings: DataSettings,
  make_task: type[tasks.Task],
  shapes: transport.Shapes,
  classes: int,
  ledger: Ledger | None = None,
  process_index: int = 0,
) -> Batches:
  """Reads a Grain MapDataset of samples, a batch an element."""

  def open_stream(start: int, passed_over: Mapping[int, str]) -> Stream:
    board = Board(settings.workers, settings.threads)
    task = make_task(source, settings, board, passed_over)
    return _stream((dataset[start:] if start else dataset).map(task), settings, task, board, shapes)

  return Batches(open_stream, source, settings, make_task.training, classes, ledger, process_index)


def _stream(
  dataset: Any, settings: DataSettings, task: tasks.Task, board: Board, shapes: transport.Shapes
) -> Stream:
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
        stacklevel=6,
      )
    options = grain.experimental.DatasetOptions(min_shm_size=_NEVER)
    batches = grain.experimental.WithOptionsIterDataset(batches, options).mp_prefetch(
      grain.MultiprocessingOptions(num_workers=settings.workers, per_worker_buffer_size=waiting),
      worker_init_fn=transport.set_worker,
    )
  return Stream(iter(batches), task, board, ring, settings.workers, settings.decode_seconds)


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
  ledger: Ledger | None = None,
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
    ledger: the bad samples of the whole run, for all its starts; None counts those of this call.

  Returns:
    An iterator of this process's `batch_size / process_count` rows of every global batch, V views
    each. Every epoch visits each sample once, in a new order; an epoch that does not end with a
    batch runs on into the next.

  Raises:
    UserError: a batch that the processes do not divide; while iterating, too many bad files, workers
      that die again and again, or a label outside [0, K) (names the image).
  """
  import grain

  rows = _rows_per_process(batch_size, process_count)
  dataset = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat()
  # By process only after the draws are keyed: sliced before, processes would share their draws. Each takes a block of
  # the batch: one after the other they are the batch of one process, in its order.
  dataset = dataset.random_map(tasks.draw).batch(rows, drop_remainder=True)
  dataset = dataset[process_index::process_count][step:]
  shapes = tasks.batch_shapes(settings, rows, training=True)
  return _batches(
    dataset, source, settings, tasks.TrainTask, shapes, classes, ledger, process_index
  )


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
    UserError: a batch that the processes do not divide; while iterating, too many bad files, workers
      that die again and again, or a label outside [0, K) (names the image).
  """
  import grain

  rows = _rows_per_process(batch_size, process_count)
  padded = math.ceil(len(source) / batch_size) * batch_size
  dataset = grain.MapDataset.range(padded).map(lambda index: {'index': np.int64(index)})
  dataset = dataset.batch(rows, drop_remainder=True)[process_index::process_count]
  shapes = tasks.batch_shapes(settings, rows, training=False)
  return _batches(dataset, source, settings, tasks.EvalTask, shapes, classes, None, process_index)
