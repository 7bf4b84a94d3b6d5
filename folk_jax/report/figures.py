"""The sections of a run's page, from arrays and numbers.

Shape letters: N images, H, W pixels, C channels, h, w positions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from folk_jax.report import images, networks, spectra
from folk_jax.report.markup import Markup, number, tag
from folk_jax.report.page import Cell, Noted, Picture, Section, card, folded, strip, table
from folk_jax.report.rebuild import Rebuilt
from folk_jax.signal.filters import FILTERS, Filter

# Longer tables of scores open at a click.
_FOLDED_FROM = 40


@dataclasses.dataclass(frozen=True)
class Photo:
  """A photograph as networks see it: uint8 [H, W, 3], and what it is of, '' where that isn't known."""

  image_HWC: np.ndarray
  name: str

  @property
  def unit_HWC(self) -> np.ndarray:
    """float32 in [0, 1]."""
    return self.image_HWC.astype(np.float32) / 255.0


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """A query and the images that a network finds most like it, with the cosines of their features, falling."""

  query: Photo
  found: Sequence[Photo]
  similarities: Sequence[float]


def stack(photos: Sequence[Photo]) -> np.ndarray:
  """The photographs as one uint8 array [N, H, W, 3]."""
  return np.stack([photo.image_HWC for photo in photos])


def photo_cell(photo: Photo) -> Cell:
  """A photograph above its spectrum."""
  spectrum = Picture(images.spectrum(photo.unit_HWC), 'its log-magnitude spectrum', lossless=True)
  return Cell(
    (Picture(photo.image_HWC, photo.name or 'photograph'), spectrum), 'Original', 'and its spectrum'
  )


def left_cell(left: spectra.Left, photo: Photo, words: str = '') -> Cell:
  """What a filter leaves of a photograph, above the mask (for wavelet filters, which have none, the spectrum)."""
  view = Picture(
    images.shown(left.image_HWC, photo.unit_HWC), f'{photo.name} under {left.filter}, {left.name}'
  )
  below = images.mask(left.kept_HWM, photo.unit_HWC)
  alt = f'the coefficients that {left.name} keeps'
  if not left.fourier:
    below, alt = images.spectrum(left.image_HWC, photo.unit_HWC), f'the spectrum of {left.name}'
  said = words or f'{percent(left.energy)} of the energy'
  return Cell((view, Picture(below, alt, lossless=True)), left.name, said)


def percent(share: float) -> str:
  """A share in [0, 1] for people."""
  value = 100 * share
  return f'{value:.3g} %' if value < 99.95 else f'{value:.4g} %'


def curves_section(cards: Sequence[Markup]) -> Section:
  """Of `curves.charts`."""
  intro = 'What the run logged, by step. Point at a curve for its numbers.'
  return Section('curves', 'Curves', intro, [tag('div', cards, class_='charts')])


def filters_section(photos: Sequence[Photo], settings: Filter) -> Section:
  """Photographs under the run's filter, kept and removed, at each of its portions: the paper's figures 1, 2 and 4."""
  kind = FILTERS[settings.name]
  rows = []
  for photo in photos:
    lefts = spectra.under_filter(photo.unit_HWC, settings)
    cells = [photo_cell(photo), *(left_cell(left, photo) for left in lefts)]
    if kind.keep is None:  # First all that keep, then all that remove.
      cells = [cells[0], *cells[1::2], *cells[2::2]]
    rows += [tag('h3', photo.name) if photo.name else None]
    rows += [strip(cells, max(len(cells), 5), narrow=_narrow(len(cells)))]
  below = 'its spectrum'
  if spectra.is_fourier(settings.name):
    below = 'what it keeps of the spectrum, in yellow'
  caption = (
    f'Each view above {below} with the lowest frequency in the middle: what is kept carries the coarse image or only '
    'its detail. A view that has lost its mean is shown on mid-grey.'
  )
  cards = [card(caption, *rows)]
  sized = (
    'at the portions of this run' if kind.sized_by == 'portions' else 'at the radius of this run'
  )
  informed = (
    "looks at each image's own spectrum" if kind.informed else 'is the same for every image'
  )
  intro = (
    f"The filter '{settings.name}' {sized}; it {informed}. The student sees nothing but such views."
  )
  return Section('filters', 'Filtered views', intro, cards)


def _narrow(cells: int) -> int:
  """Columns on a phone: original and what keeps, then what removes."""
  return min(max(3, (cells + 1) // 2), 4)


def views_section(rows: Sequence[tuple[Photo, Sequence[Cell]]], hides: str) -> Section:
  """What training makes of photographs before the networks see them.

  Args:
    rows: photographs with the cells of their views.
    hides: what the student gets instead, for the intro; '' for nothing.
  """
  cards = []
  for photo, cells in rows:
    first = Cell((Picture(photo.image_HWC, photo.name or 'photograph'),), 'Original', photo.name)
    caption = (
      'Random crops, flips and colours: all that the networks may rely on is what the views share.'
    )
    cards.append(strip([first, *cells], 1 + len(cells), narrow=1 + len(cells)))
  body = [card(caption, tag('div', cards, class_='groups'))]
  intro = f'Each image is cut and coloured at random. {hides}'.strip()
  return Section('views', 'What the networks see', intro, body)


def rebuilt_section(
  photos: Sequence[Photo], found: Sequence[Rebuilt], error: float | None, of_mean: float | None
) -> Section:
  """What the student puts in place of what was taken."""
  cards = []
  for one in found:
    rows = [_rebuilt_row(photo, one, i) for i, photo in enumerate(photos)]
    if one.target_NHWC is not None:
      caption = (
        'Images above their spectra. The closer the answer comes to what was removed, the better; the last column puts '
        'it together with what the student was given.'
      )
    else:
      caption = (
        'Images, with spectra or wavelet coefficients below: the last should look like the first.'
      )
    cards.append(
      card(caption, tag('h3', one.what[0].upper() + one.what[1:]), tag('div', rows, class_='pairs'))
    )
  intro = 'Held-out photographs through the student, which has the head that rebuilds.'
  if error is not None and of_mean:
    intro += f' Over the held-out images its error was {percent(error / of_mean)} of that of guessing the mean.'
  for borrowed in dict.fromkeys(one.borrowed for one in found if one.borrowed):
    intro += f' {borrowed}'
  return Section('rebuilt', 'Reconstructions', intro, cards)


def _rebuilt_row(photo: Photo, one: Rebuilt, i: int) -> Markup:
  original_HWC = photo.unit_HWC

  def cell(
    image_HWC: np.ndarray, label: str, like_HWC: np.ndarray = original_HWC, bands_HW1=None
  ) -> Cell:
    if bands_HW1 is None:
      below = images.spectrum(image_HWC, like_HWC)
    else:
      below = images.colours(bands_HW1[..., 0], 'magma')
    upper = Picture(images.shown(image_HWC, original_HWC), f'{label}: {photo.name}')
    return Cell((upper, Picture(below, f'spectrum of: {label}', lossless=True)), label)

  columns = [('Original', original_HWC), ('Student sees', one.seen_NHWC[i])]
  if one.target_NHWC is not None:
    columns += [('What was removed', one.target_NHWC[i]), ("Student's answer", one.answer_NHWC[i])]
    columns += [('Put together', one.rebuilt_NHWC[i])]
  else:
    columns += [(one.label, one.rebuilt_NHWC[i])]
  bands = one.bands or (None,) * len(columns)
  cells = [
    cell(image_HWC, label, bands_HW1=None if of_all is None else of_all[i])
    for (label, image_HWC), of_all in zip(columns, bands, strict=True)
  ]
  return strip(cells, len(cells), narrow=len(cells), dense=True)


def patches_section(photos: Sequence[Photo], network: networks.Network) -> Section:
  """Principal components of patch features, and the class token's attention where there is one."""
  image_NHWC = stack(photos)
  share_NhwK = networks.components(networks.patch_map(network, image_NHWC))
  attention_NAhw = networks.class_attention(network, image_NHWC)
  cells = []
  for i, photo in enumerate(photos):
    colours_hw3 = np.round(share_NhwK[i] * 255).astype(np.uint8)
    pictures = [Picture(photo.image_HWC, photo.name or 'photograph')]
    pictures.append(Picture(colours_hw3, 'principal components of its patches', lossless=True))
    if attention_NAhw is not None:
      mean_hw = attention_NAhw[i].mean(0)
      share_hw = (mean_hw - mean_hw.min()) / max(mean_hw.max() - mean_hw.min(), 1e-12)
      heat_HWC = networks.overlay(photo.image_HWC, share_hw, images.colours(share_hw, 'inferno'))
      pictures.append(Picture(heat_HWC, 'what the class token looks at'))
    cells.append(Cell(tuple(pictures), photo.name))
  what = f"the {network.which}'s features"
  caption = (
    f'Top: the photograph. Below it {what}, position by position, in three colours (the first principal components '
    'of all of them together): positions of one colour look alike to the network, so that objects should stand out '
    'whole.'
  )
  if attention_NAhw is not None:
    caption += ' Bottom: how much the class token of the last block looks at each patch, averaged over heads.'
  h, w = share_NhwK.shape[1:3]
  title = 'Patches and attention' if attention_NAhw is not None else 'Feature maps'
  intro = (
    f'{len(photos)} held-out photographs through the {network.which}, {h} x {w} positions each.'
  )
  return Section('patches', title, intro, [card(caption, strip(cells, 8, narrow=4))])


def neighbours_section(
  rows: Sequence[Neighbours], bank: int, which: str, feature: str, stand_in: bool = False
) -> Section:
  """Queries and what a network finds most like them.

  Args:
    rows: queries with their neighbours.
    bank: how many images the neighbours are of.
    which: 'teacher' or 'student'.
    feature: its feature's name.
    stand_in: whether queries are embedded photographs, and the bank crops of these.
  """
  strips, right, known = [], 0, 0
  for row in rows:
    query = row.query
    cells = [Cell((Picture(query.image_HWC, query.name or 'query'),), 'Query', query.name)]
    for photo, similarity in zip(row.found, row.similarities, strict=True):
      verdict = ''
      if query.name and photo.name and not stand_in:
        verdict = 'right' if query.name == photo.name else 'wrong'
        known, right = known + 1, right + (verdict == 'right')
      mark = {'right': '✓ ', 'wrong': '✗ ', '': ''}[verdict]
      cells.append(
        Cell(
          (Picture(photo.image_HWC, photo.name or 'neighbour'),),
          f'{mark}{similarity:.3f}',
          photo.name,
          verdict,
        )
      )
    strips.append(strip(cells, 6, narrow=6, dense=True))
  caption = (
    'On the left a photograph, then the crops most like it, of all photographs and itself among them, with the cosine '
    'of their features: '
    if stand_in
    else 'On the left a held-out image, then the training images most like it, with the cosine of their features: '
  )
  caption += 'good features find the same kind of thing whatever its place and colour.'
  if known:
    caption += f' Of these neighbours {right} of {known} have the class of their query.'
  among = 'crops of embedded photographs' if stand_in else 'training images'
  intro = f"By the {which}'s feature '{feature}', among {number(bank)} {among}."
  return Section('neighbours', 'Nearest neighbours', intro, [card(caption, *strips)])


def evaluation_section(
  metrics: Sequence[Mapping[str, float]], results: Mapping[str, Mapping[str, Any]]
) -> Section | None:
  """The run's own evaluations before and after, and those of `results.json` files by their names."""
  body = []
  measured = [line for line in metrics if any(key.startswith('eval/') for key in line)]
  ends = [line['step'] for line in measured][:1] + [line['step'] for line in measured][-1:]
  keys = sorted({key for line in measured for key in line if key.startswith('eval/')})
  rows = []
  for key in keys:
    having = [line for line in measured if key in line]
    first, last = having[0], having[-1]
    before = change = ''
    if first is not last:
      before, change = _at(first, key, ends[0]), last[key] - first[key]
    rows.append((_plain(key.removeprefix('eval/')), before, _at(last, key, ends[1]), change))
  if rows:
    caption = (
      'Shares are between 0 and 1. A reconstruction error below that of guessing the mean, and accuracies above the '
      'first ones, are what pre-training is for.'
    )
    head = ('', *(f'step {number(step)}' for step in ends), 'change')
    body.append(table(head, rows, caption))
  for name, found in results.items():
    scores = [
      (_plain(evaluation), _plain(key), value)
      for evaluation, row in found['scores'].items()
      for key, value in row.items()
    ]
    if scores:
      caption = (
        f'{name}: evaluations of {found["checkpoint"]} ({found.get("which", "its network")}).'
      )
      whole = table(('evaluation', 'what', 'score'), scores, caption)
      many = len(scores) > _FOLDED_FROM
      body.append(folded(f'{name}: {len(scores)} scores', whole) if many else whole)
  if not body:
    return None
  return Section(
    'evaluation',
    'Evaluations',
    'Before and after training, and what was measured afterwards.',
    body,
  )


def _at(line: Mapping[str, float], key: str, step: int) -> float | Noted:
  """A line's value, with its step where the column is of another."""
  value = line[key]
  return value if line['step'] == step else Noted(value, f'(step {number(line["step"])})')


def _plain(key: str) -> str:
  """A name that wraps where its words end."""
  return key.replace('_', ' ').replace('/', ': ')


def configuration_section(config: Mapping[str, Any], machine: Mapping[str, Any]) -> Section:
  """Every field of the configuration, and the machine of the run."""
  body = []
  if machine:
    body.append(
      table(('machine', ''), machine.items(), 'Where the run trained, as it wrote it down.')
    )
  rows = [(f'config.{key}', _written(value)) for key, value in config.items()]
  caption = 'Every field of the configuration that the run started with.'
  body.append(
    folded(f'Configuration: {len(rows)} fields', table(('field', 'value'), rows, caption))
  )
  return Section('configuration', 'Configuration and machine', '', body)


def _written(value: Any) -> str:
  return ', '.join(map(str, value)) or '()' if isinstance(value, list | tuple) else str(value)
