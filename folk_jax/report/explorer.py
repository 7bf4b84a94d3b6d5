"""One's own photographs under Com and RCom at each portion, and under every other filter, with what each leaves.

Shape letters: H, W pixels, C channels.
"""

import io
import os
from collections.abc import Callable, Sequence

from etils import epath

from folk_jax.data.decode import BadImage, decode
from folk_jax.data.views import centre_view
from folk_jax.errors import UserError
from folk_jax.report import figures, page, spectra
from folk_jax.report.figures import Photo, percent
from folk_jax.report.markup import Markup, number, tag
from folk_jax.signal.filters import FILTERS, Filter

PORTIONS = (0.005, 0.01, 0.05)
_MOST_IMAGES = 24
_SIZES = (8, 1024)
# One half of another filter: 'com_rcom' and 'radial' show both.
_HALVES = tuple(name for name, kind in FILTERS.items() if kind.keep is not None)
_WHOLE = tuple(name for name in FILTERS if name not in _HALVES)
_PICTURES = ('.png', '.jpg')
_ABOUT = {
  'com_rcom': 'the strongest coefficients of this very image',
  'magnitude_weighted': 'coefficients drawn by their magnitude',
  'gabor': 'the strongest Gabor bands, octave by orientation',
  'wavelet': 'the Haar sub-bands of most energy a coefficient',
  'radial': "MFM's disk around the lowest frequency, the same for every image",
  'random': 'any coefficients',
  'random_block': 'a square block of the spectrum and its mirror image',
  'random_band': 'a ring of the spectrum',
  'gabor_random': 'Gabor bands in random order',
  'wavelet_random': 'Haar sub-bands in random order',
}


def explore(
  path: str,
  out: str | None = None,
  *,
  portions: Sequence[float] = PORTIONS,
  size: int = 224,
  filters: Sequence[str] = _WHOLE,
  say: Callable[[str], None] = lambda line: None,
) -> str:
  """Writes a page, or a picture, of photographs under every filter.

  Args:
    path: an image, or a folder of them, of which the first 24 by name are taken.
    out: the file, ending in .html, or .png or .jpg (one image only); by default `<image's name>_filters.html`, here.
    portions: shares of the coefficients, in (0, 1).
    size: side in pixels to which the short side is brought, before the centre is cut out.
    filters: which, by name.
    say: called with a line for each image.

  Returns:
    The file's path.

  Raises:
    UserError: no such image, one that can't be read, numbers out of range, or a file that can't be written.
  """
  if not _SIZES[0] <= size <= _SIZES[1]:
    raise UserError(f'--size={size}: give {_SIZES[0]} to {_SIZES[1]} pixels')
  made = settings('com_rcom', portions)  # Refuses portions out of range.
  strangers = [name for name in filters if name not in _WHOLE]
  if strangers or not filters:
    found = f'--filters={",".join(filters)}' + f': {strangers[0]} is unknown' * bool(strangers)
    raise UserError(f'{found}; give some of {", ".join(_WHOLE)}')
  files = _files(path)
  out = out or f'{os.path.splitext(os.path.basename(os.path.normpath(path)))[0]}_filters.html'
  if not out.endswith(('.html', *_PICTURES)) or (out.endswith(_PICTURES) and len(files) > 1):
    raise UserError(
      f'--out={out}: give a file that ends in .html, or for one image in .png or .jpg'
    )
  photos = [_read(file, size) for file in files]
  if out.endswith(_PICTURES):
    say(f'{photos[0].name} under {len(filters)} filters')
    page.write(out, sheet(photos[0], made, filters, os.path.splitext(out)[1][1:]))
    return out
  sections = []
  for i, photo in enumerate(photos, start=1):
    say(f'{photo.name} under {len(filters)} filters ({i} of {len(photos)})')
    if 'com_rcom' in filters:
      sections.append(_com_section(photo, made, i))
    if others := [name for name in filters if name != 'com_rcom']:
      sections.append(_others_section(photo, made, others, i))
  names = photos[0].name if len(photos) == 1 else f'{len(photos)} photographs'
  facts = {
    'Coefficients': f'{size} x {size} = {number(size * size)}',
    'Portions': ', '.join(f'{portion * 100:g} %' for portion in made.portions),
    'Filters': len(filters),
  }
  lead = 'What frequency filters leave of a photograph: the views that a student is trained on.'
  foot = 'Made by python -m folk_jax.report --image=...'
  page.write(out, page.render(f'Filters on {names}', lead, facts, sections, foot=foot))
  return out


def settings(name: str, portions: Sequence[float]) -> Filter:
  """A filter as the explorer shows it: one ranking for all channels, MFM's radius, nothing cut.

  Raises:
    UserError: portions outside (0, 1), or none.
  """
  return Filter(name, tuple(portions), 0.5, 'shared', 16.0, clamp=False)


def middle(portions: Sequence[float]) -> tuple[float]:
  """The portion at which filters are compared."""
  return (sorted(portions)[len(portions) // 2],)


def _files(path: str) -> list[epath.Path]:
  found = epath.Path(path).expanduser()
  if not found.is_dir():
    return [found]
  from folk_jax.data.folder import image_suffixes  # Pillow's table of formats takes a moment.

  known = image_suffixes()
  files = sorted(file for file in found.iterdir() if file.suffix.lower() in known)
  if not files:
    raise UserError(f'--image={path}: the folder holds no image')
  return files[:_MOST_IMAGES]


def _read(file: epath.Path, size: int) -> Photo:
  try:
    image_HWC = decode(file.read_bytes())
  except OSError as error:
    raise UserError(f'--image={file}: cannot be read: {error.strerror or error}') from error
  except BadImage as error:
    raise UserError(f'--image={file}: no image that can be decoded: {error}') from error
  return Photo(centre_view(image_HWC, size, size, 'bicubic'), file.name)


def _words(left: spectra.Left) -> str:
  kind = 'coefficients' if left.fourier else 'wavelet coefficients'
  return (
    f'{number(left.coefficients)} {kind}, {percent(left.energy)} of the energy, '
    f'{percent(left.energy_without_mean)} without the mean'
  )


def _com_section(photo: Photo, made: Filter, place: int) -> page.Section:
  lefts = list(spectra.under_filter(photo.unit_HWC, made))
  pictures = figures.photo_cell(photo).pictures
  names = 'The photograph', 'Its log-magnitude spectrum'
  originals = [page.Cell((one,), name) for one, name in zip(pictures, names, strict=True)]
  cards = [page.card('The lowest frequency is in the middle.', page.strip(originals, 2, narrow=2))]
  for com, rcom in zip(lefts[::2], lefts[1::2], strict=True):
    cells = [figures.left_cell(left, photo, _words(left)) for left in (com, rcom)]
    caption = (
      f'Com keeps the strongest {com.portion * 100:g} % of the coefficients (yellow), RCom all others: the two views '
      'add up to the photograph.'
    )
    cards.append(page.card(caption, page.strip(cells, 2, narrow=2)))
  intro = (
    'Views above what they keep of the spectrum. One that has lost its mean is shown on mid-grey.'
  )
  body = [tag('div', cards, class_='pairs')]
  return page.Section(f'com-{place}', f'{photo.name}: Com and RCom', intro, body)


def _others_section(photo: Photo, made: Filter, filters: Sequence[str], place: int) -> page.Section:
  portion = middle(made.portions)
  cards: list[Markup] = []
  rows = []
  for name in filters:
    lefts = list(spectra.under_filter(photo.unit_HWC, settings(name, portion)))
    cells = [figures.left_cell(left, photo, _words(left)) for left in lefts]
    caption = f'{name}: {_ABOUT.get(name, "see docs/")}; ' + (
      'it looks at the image.' if FILTERS[name].informed else 'it does not look at the image.'
    )
    cards.append(page.card(caption, tag('h3', name), page.strip(cells, 2, narrow=2)))
    rows += _rows(lefts)
  rows = [*_rows(list(spectra.under_filter(photo.unit_HWC, made))), *rows]
  caption = (
    'Energy is the sum of squared magnitudes over coefficients and channels; most of it is the mean, the coefficient '
    'at frequency 0, so that the last column leaves that out. '
    f'{", ".join(_HALVES)} are halves of com_rcom and radial.'
  )
  head = ('filter', 'view', 'coefficients kept', 'energy, %', 'without the mean, %')
  intro = (
    f'Filters sized by a portion at {portion[0] * 100:g} %, for comparison with Com and RCom there.'
  )
  body = [tag('div', cards, class_='charts'), page.table(head, rows, caption)]
  return page.Section(f'others-{place}', f'{photo.name}: every other filter', intro, body)


def _rows(lefts: Sequence[spectra.Left]) -> list[tuple]:
  return [
    (
      left.filter,
      left.name,
      round(left.coefficients),
      100 * left.energy,
      100 * left.energy_without_mean,
    )
    for left in lefts
  ]


def sheet(photo: Photo, made: Filter, filters: Sequence[str] = _WHOLE, kind: str = 'png') -> bytes:
  """All views with their masks on one sheet, as a picture of a kind."""
  from matplotlib.backends.backend_agg import (
    FigureCanvasAgg,  # Half a second that a page needn't wait.
  )
  from matplotlib.figure import Figure

  portion = middle(made.portions)
  lefts = []
  for name in filters:
    one = made if name == 'com_rcom' else settings(name, portion)
    lefts += spectra.under_filter(photo.unit_HWC, one)
  cells = [figures.photo_cell(photo), *(figures.left_cell(left, photo) for left in lefts)]
  names = ['Original', *(_named(left) for left in lefts)]
  columns = 7
  rows = -(-len(cells) // columns)
  figure = Figure(figsize=(2.0 * columns, 4.55 * rows), facecolor='white', layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.subplots(2 * rows, columns, squeeze=False)
  for axes in grid.flat:
    axes.set_axis_off()
  for i, (cell, name) in enumerate(zip(cells, names, strict=True)):
    row, column = divmod(i, columns)
    for below, picture in enumerate(cell.pictures):
      grid[2 * row + below, column].imshow(picture.image_HWC, interpolation='nearest')
    # A name between dollars would be read as mathematics.
    grid[2 * row, column].set_title(f'{name}\n{cell.words}'.replace('$', r'\$'), fontsize=9)
  buffer = io.BytesIO()
  figure.savefig(buffer, format=kind, dpi=110)
  return buffer.getvalue()


def _named(left: spectra.Left) -> str:
  return left.name if left.filter == 'com_rcom' else f'{left.filter}\n{left.name}'
