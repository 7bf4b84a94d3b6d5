"""results.json: what the evaluations of one checkpoint found, kept as it is found."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from folk_jax import checkpoint
from folk_jax.errors import UserError

# Scores of every corruption at every severity are kilobytes, too.
_JSON_BYTES = 16 << 20

# What an evaluation returns: numbers by name, and here and there a name that was chosen. Shares are in [0, 1].
Scores = dict[str, float | str]


class Results:
  """Scores by evaluation, the parts they are made of, and what all of it is of.

  Every change is written at once, and so that a kill leaves the old file or the new one: a second start with the same
  settings finds all that had finished. Of several hosts the first writes.

  Attributes:
    file: of JSON: `about`'s fields, `scores` and `details`.
    scores: of finished evaluations, in the order they ran.
    details: by evaluation, the results of its parts.
  """

  def __init__(self, file: str | os.PathLike[str], about: Mapping[str, Any]):
    """Reads what the file holds.

    Args:
      file: where; it needn't exist.
      about: what the results are of, as JSON has it; with `checkpoint` and `settings`, a digest of all they depend on.

    Raises:
      UserError: the file is of other settings, or it can't be read.
    """
    self.file, self._about = epath.Path(file).expanduser(), dict(about)
    self.scores: dict[str, Scores] = {}
    self.details: dict[str, dict[str, Scores]] = {}
    if not self.file.exists():
      return
    found = read(self.file)
    # Only where it writes: hosts may have the same data in other places.
    if found['settings'] != about['settings'] and not jax.process_index():
      raise UserError(
        f'{self.file} is of {found["checkpoint"]} with other settings: give another --workdir, or remove it.'
      )
    self.scores, self.details = found['scores'], found.get('details', {})

  def add(self, name: str, scores: Scores) -> None:
    """An evaluation is over."""
    self.scores[name] = _plain(scores)
    self._write()

  def part(self, name: str, key: str, compute: Callable[[], Scores]) -> Scores:
    """The result of a part of an evaluation: the one that stands, or what `compute` returns, which is kept."""
    parts = self.details.setdefault(name, {})
    if key not in parts:
      parts[key] = _plain(compute())
      self._write()
    return parts[key]

  def stands(self, name: str, key: str) -> bool:
    """Whether `part` would find a result."""
    return key in self.details.get(name, {})

  def _write(self) -> None:
    if jax.process_index():
      return
    whole = self._about | {'scores': self.scores, 'details': self.details}
    try:
      self.file.parent.mkdir(parents=True, exist_ok=True)
      fresh = self.file.parent / f'{self.file.name}.tmp'
      fresh.write_text(json.dumps(whole, indent=2) + '\n')
      fresh.replace(self.file)
    except OSError as error:
      raise UserError(f'cannot write {self.file}: {error}; give another --workdir.') from error


def read(file: str | os.PathLike[str]) -> dict[str, Any]:
  """A results.json as a dict.

  Raises:
    UserError: no such file, or one of something else.
  """
  path = epath.Path(file).expanduser()
  try:
    found = checkpoint.read_json(path, _JSON_BYTES)
  except OSError as error:
    raise UserError(
      f'cannot read {path}: {error}; give the results.json of an evaluation.'
    ) from error
  except UserError as error:
    raise UserError(
      f'cannot read {path}: it is no results.json of an evaluation: {error}.'
    ) from error
  if not {'scores', 'settings', 'checkpoint'} <= found.keys():
    raise UserError(f'{path} is no results.json: it has no scores; give the one of an evaluation.')
  details = found.get('details', {})
  tables = {'scores': found['scores'], 'details': details}
  if isinstance(details, dict):
    tables |= {f'details.{name}': row for name, row in details.items()}
  for field, rows in tables.items():
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
      raise UserError(f'{path} is no results.json: its {field} is no table of evaluations.')
  for name, row in found['scores'].items():
    for key, value in row.items():
      if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f'{path} is no results.json: scores.{name}.{key} is no number or name.')
  return found


def table(scores: Mapping[str, Scores]) -> str:
  """One line a number or name, evaluations in the order they ran."""
  lines = [('evaluation', 'what', '')]
  lines += [
    (name, key, value if isinstance(value, str) else f'{value:.4f}')
    for name, row in scores.items()
    for key, value in row.items()
  ]
  widths = [max(len(line[column]) for line in lines) for column in range(3)]
  return '\n'.join(
    f'{name.ljust(widths[0])}  {key.ljust(widths[1])}  {value.rjust(widths[2])}'
    for name, key, value in lines
  )


def _plain(scores: Mapping[str, Any]) -> Scores:
  return {key: value if isinstance(value, str) else float(value) for key, value in scores.items()}
