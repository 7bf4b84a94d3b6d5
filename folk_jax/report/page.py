"""The page: a head with facts, sections, figures and tables; one file that refers to nothing outside itself.

Shape letters: H, W pixels, C channels.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from folk_jax.errors import UserError
from folk_jax.report import images
from folk_jax.report.markup import Markup, number, tag
from folk_jax.report.style import CSS

# Nothing is loaded and nothing is run, whatever stands in a file that the page shows.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Below this side a picture is shown pixel by pixel instead of smoothed.
_SMALL = 65


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page.

  Attributes:
    key: its address in the page, and what a test looks for.
    title: of the section.
    intro: a sentence or two on what it shows.
    body: elements.
  """

  key: str
  title: str
  intro: str
  body: Sequence[Markup]


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image of a cell: uint8 [H, W, 3], what it shows for those who don't see it, and whether every pixel counts."""

  image_HWC: np.ndarray
  alt: str
  lossless: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
  """Pictures above each other with a label and a few words below; `verdict` '' or 'right' or 'wrong' frames them."""

  pictures: tuple[Picture, ...]
  label: str
  words: str = ''
  verdict: str = ''


@dataclasses.dataclass(frozen=True)
class Noted:
  """A number of a table with a remark before it."""

  value: float
  remark: str


def strip(cells: Iterable[Cell], columns: int, narrow: int = 3, dense: bool = False) -> Markup:
  """Cells in a grid of so many columns, fewer on a narrow screen."""
  return tag(
    'div',
    *(_cell(cell) for cell in cells),
    class_='strip dense' if dense else 'strip',
    style=f'--columns:{columns};--narrow:{narrow}',
  )


def _cell(cell: Cell) -> Markup:
  pictures = [
    tag(
      'img',
      src=images.data_uri(picture.image_HWC, picture.lossless),
      alt=picture.alt,
      width=picture.image_HWC.shape[1],
      height=picture.image_HWC.shape[0],
      class_='pixels' if picture.lossless or min(picture.image_HWC.shape[:2]) < _SMALL else None,
    )
    for picture in cell.pictures
  ]
  label = tag('b', cell.label) if cell.label else None
  caption = tag('figcaption', label, cell.words)
  return tag('figure', *pictures, caption, class_=f'cell {cell.verdict}'.strip())


def card(caption: str, *body: Any) -> Markup:
  """A figure with its one sentence."""
  return tag('figure', *body, tag('figcaption', caption), class_='card')


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> Markup:
  """A table; numbers stand to the right."""

  def of(name: str, value: Any) -> Markup:
    if isinstance(value, Noted):
      return tag(name, tag('small', value.remark), f' {number(value.value)}', class_='n')
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return tag(name, number(value) if is_number else value, class_='n' if is_number else None)

  rows = [list(row) for row in rows]
  numeric = [
    bool(rows) and all(isinstance(row[i], int | float | Noted) or row[i] == '' for row in rows)
    for i in range(len(head))
  ]
  heads = [
    tag('th', name, class_='n' if is_n else None) for name, is_n in zip(head, numeric, strict=True)
  ]
  body = [tag('tr', [of('td', value) for value in row]) for row in rows]
  whole = tag('table', tag('thead', tag('tr', heads)), tag('tbody', body))
  return tag(
    'figure', tag('div', whole, class_='scroll'), tag('figcaption', caption), class_='table'
  )


def folded(title: str, body: Markup) -> Markup:
  """What few will read, behind its title."""
  return tag('details', tag('summary', title), body)


def render(
  title: str,
  lead: str,
  facts: Mapping[str, Any],
  sections: Sequence[Section],
  notices: Sequence[str] = (),
  foot: str = '',
) -> str:
  """The whole page.

  Args:
    title: of the page and its window.
    lead: the line below it.
    facts: what one wants to know first, by name.
    sections: in their order.
    notices: what is missing or unfinished, above everything else.
    foot: the last line.
  """
  contents = [tag('a', section.title, href=f'#{section.key}') for section in sections]
  head = tag(
    'head',
    tag('meta', charset='utf-8'),
    tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
    Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
    tag('title', title),
    Markup(f'<style>{CSS}</style>'),
  )
  known = [tag('div', tag('dt', name), tag('dd', value)) for name, value in facts.items()]
  top = tag(
    'header',
    tag('h1', title),
    tag('p', lead, class_='lead'),
    [tag('p', notice, class_='notice') for notice in notices],
    tag('dl', known, class_='facts') if known else None,
    tag('nav', contents, aria_label='Contents') if len(contents) > 1 else None,
  )
  parts = [
    tag(
      'section',
      tag('h2', section.title),
      tag('p', section.intro, class_='intro') if section.intro else None,
      section.body,
      id=section.key,
    )
    for section in sections
  ]
  body = tag('body', top, tag('main', parts), tag('footer', foot))
  return f'<!doctype html>\n{tag("html", head, body, lang="en")}\n'


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes a file so that a kill leaves the old one or the new one.

  Raises:
    UserError: it cannot be written.
  """
  path = epath.Path(path).expanduser()
  content = content.encode() if isinstance(content, str) else content
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f'{path.name}.tmp'
    fresh.write_bytes(content)
    fresh.replace(path)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error}; give an --out that can be written') from error
