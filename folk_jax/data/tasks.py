"""From samples to a batch: what a worker does with the numbers that the stream gives it."""

import pickle
from collections.abc import Mapping

import numpy as np

from folk_jax.data import masks, transport
from folk_jax.data.decode import BadImage, decode
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import Source
from folk_jax.data.views import centre_view, random_view

# A sample that does not decode is replaced by the next that does, at most so far away: a data set
# with a longer bad stretch is broken, and a worker must not search it for ever.
MAX_SKIPS = 64
# The number of samples passed over to fill a row; taken out of the batch before the caller sees it.
SKIPPED = 'skipped'


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

  def __init__(self, source: Source, settings: DataSettings):
    self._source = source
    self._settings = settings

  def __call__(self, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = len(samples['index'])
    shapes = batch_shapes(self._settings, rows, self.training)
    batch = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
    batch |= {
      'label': np.full(rows, -1, np.int32),
      'index': samples['index'].copy(),
      'valid': np.ones(rows, np.bool_),
      SKIPPED: np.zeros(rows, np.int32),
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


class TrainTask(Task):
  """Random views of each sample, or of the next one that decodes."""

  training = True

  def _fill(self, batch: dict[str, np.ndarray], samples: Mapping[str, np.ndarray]) -> None:
    settings = self._settings
    rng = np.random.Generator(np.random.Philox(0))
    for row, (wanted, state) in enumerate(zip(samples['index'], samples['state'], strict=True)):
      image_HWC, label, index, skipped = self._next_good(int(wanted))
      batch['label'][row] = label
      batch['index'][row] = index
      batch[SKIPPED][row] = skipped
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


class EvalTask(Task):
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
        batch[SKIPPED][row] = 1
        continue
      if settings.masks:
        masks.set_pair(batch, row, image_HWC, self._source, settings)
        continue
      batch['views'][row, 0] = centre_view(
        image_HWC, settings.image_size, settings.short_side, settings.interpolation
      )
