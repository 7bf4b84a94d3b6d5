"""HTML as nested calls: what comes from files is escaped, and every element is closed."""

import html
import math
from collections.abc import Iterable, Mapping
from typing import Any

# Elements without an end tag.
_VOID = frozenset({'img', 'meta', 'br', 'hr'})


class Markup(str):
  """Text that is HTML already; any other text is escaped where it enters an element."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
  """One element.

  Args:
    name: of the element.
    *children: text, which is escaped; `Markup`; numbers; None for nothing; or iterables of these.
    **attributes: by name, `class_` for class and `_` for '-'; values are escaped. None and False leave one out, True
      gives it without a value.
  """
  written = ''.join(
    f' {key.rstrip("_").replace("_", "-")}' + ('' if value is True else f'="{escape(value)}"')
    for key, value in attributes.items()
    if value is not None and value is not False
  )
  if name in _VOID:
    return Markup(f'<{name}{written}>')
  return Markup(f'<{name}{written}>{join(*children)}</{name}>')


def join(*children: Any) -> Markup:
  """Children in a row, without an element around them."""
  parts = []
  for child in children:
    if child is None:
      continue
    if isinstance(child, Markup):
      parts.append(str(child))
    elif isinstance(child, Iterable) and not isinstance(child, str | Mapping):
      parts.append(str(join(*child)))
    else:
      # A number and its sign stay on one line.
      parts.append(escape(child).replace(' %', '\N{NO-BREAK SPACE}%'))
  return Markup(''.join(parts))


def escape(value: Any) -> str:
  """Text that no browser reads as HTML, inside an element or between quotes."""
  # Control characters are no HTML at all, and a file name may hold them.
  text = ''.join(
    c if c.isprintable() or c in '\n\t' else '\N{REPLACEMENT CHARACTER}' for c in str(value)
  )
  return html.escape(text, quote=True)


def number(value: float) -> str:
  """A number for people: four digits, thousands apart, no trailing zeros."""
  if not math.isfinite(value):
    return str(value)
  if value == int(value) and abs(value) < 1e15:
    return f'{int(value):,}'
  size = abs(value)
  if size >= 1000:
    return f'{value:,.0f}'
  return f'{value:.4g}'
