"""Held-out photographs of a run, and a bank of its training images; embedded ones where the run's data are absent."""

import importlib.resources

import numpy as np

from folk_jax import data
from folk_jax.data import embedded
from folk_jax.data.decode import BadImage, decode
from folk_jax.data.sources import evenly_spread
from folk_jax.data.views import centre_view
from folk_jax.errors import UserError
from folk_jax.report.figures import Photo

# From so many images the shown ones are chosen, of different classes as far as there are any.
_CANDIDATES = 48


class Photographs:
  """Images that a run didn't train on, as its evaluation cuts them.

  Attributes:
    stand_in: whether they are embedded photographs in the place of the run's, and their crops in that of its training
      images.
  """

  def __init__(
    self,
    settings: data.DataSettings,
    held_out: data.Source,
    training: data.Source,
    stand_in: bool = False,
  ):
    self.stand_in = stand_in
    self._settings, self._training = settings, training
    self._shown: list[tuple[np.ndarray, Photo]] = []
    self._candidates = evenly_spread(held_out, _CANDIDATES)

  def chosen(self, count: int) -> list[Photo]:
    """The first so many held-out photographs, of different classes as far as possible; always the same."""
    if not self._shown:
      self._choose()
    return [photo for _, photo in self._shown[:count]]

  def raw(self, number: int) -> np.ndarray:
    """One of those, uint8 [H, W, 3], as it was before its centre was cut."""
    return self._shown[number][0]

  def bank(self, limit: int) -> 'Bank':
    """So many training images, evenly spread."""
    return Bank(evenly_spread(self._training, limit), self._settings)

  def _choose(self) -> None:
    bank = Bank(self._candidates, self._settings)
    rest, seen = [], set()
    for number in range(len(self._candidates)):
      try:
        found = bank.raw(number), bank.photo(number)
      except (BadImage, OSError):
        continue
      fresh = found[1].name not in seen or not found[1].name
      (self._shown if fresh else rest).append(found)
      seen.add(found[1].name)
    self._shown += rest
    if not self._shown:
      raise UserError('none of the held-out images can be read: see docs/data.md on bad files.')


class Bank:
  """Images of a source by number, as evaluation cuts them."""

  def __init__(self, source: data.Source, settings: data.DataSettings):
    self._source, self._settings = source, settings

  def __len__(self) -> int:
    return len(self._source)

  def raw(self, number: int) -> np.ndarray:
    """uint8 [H, W, 3], of its own size."""
    return decode(self._source.fetch(number))

  def image(self, number: int) -> np.ndarray:
    """uint8 [S, S, 3], the centre view; grey where the file can't be read."""
    settings = self._settings
    try:
      raw_HWC = self.raw(number)
    except (BadImage, OSError):
      return np.full((settings.image_size, settings.image_size, 3), 128, np.uint8)
    return centre_view(raw_HWC, settings.image_size, settings.short_side, settings.interpolation)

  def photo(self, number: int) -> Photo:
    """The centre view with the name of its class."""
    names, label = self._source.class_names, self._source.label(number)
    return Photo(self.image(number), names[label] if 0 <= label < len(names) else '')


class WholePhotographs(data.Source):
  """The embedded photographs, whole."""

  class_names = embedded.EmbeddedSource.class_names

  def __len__(self) -> int:
    return len(embedded.PHOTOGRAPHS)

  def read(self, index: int) -> tuple[bytes, int]:
    _, package, file = embedded.PHOTOGRAPHS[index]
    return (importlib.resources.files(package) / file).read_bytes(), index

  def label(self, index: int) -> int:
    return index

  def name(self, index: int) -> str:
    return self.class_names[index]


def open_photographs(settings: data.DataSettings, notices: list[str]) -> Photographs:
  """A run's held-out and training images, or embedded photographs where they can't be had, said in `notices`."""
  try:
    return Photographs(
      settings, data.make_source(settings, 'test'), data.make_source(settings, 'train')
    )
  except (UserError, OSError) as error:
    notices.append(
      f"The run's held-out images are not here, so all pictures are of embedded photographs, which it may never have "
      f'seen the like of ({error})'
    )
  settings = data.DataSettings(source='embedded', image_size=settings.image_size)
  training = data.make_source(settings, 'train')
  return Photographs(settings, WholePhotographs(), training, stand_in=True)
