"""What every fault script shares: trials that are counted as they come, and a file that resumes.

A script injects one kind of fault after another. Each kind is a row: what is promised, how it was tried, how often, how
often the promise was kept, and what was lost. The rows are written after each trial, so that a script that was killed
goes on where it stood.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import report

from folk_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fault:
  """A kind of fault.

  Attributes:
    name: a few words, the row's key.
    promise: one sentence: what a user may count on.
    how: one sentence: what a trial does.
    trial: takes the trial's number and returns '' where the promise was kept, else one sentence that says what was
      lost. What it raises is a trial that was not made, and ends the script.
    times: trials wanted.
    stage: says, after a trial, at which stage of the run its fault fell; counted in the row. None counts none.
  """

  name: str
  promise: str
  how: str
  trial: Callable[[int], str]
  times: int = 1
  stage: Callable[[], str] | None = None


class Trials:
  """The file of one script: rows by fault, kept trial by trial."""

  def __init__(self, out: pathlib.Path, what: str, any_commit: bool = False):
    """Opens the file, or begins it.

    Raises:
      UserError: it is another script's, or (unless `any_commit`) has rows of another commit.
    """
    self._out, self._what = out, what
    self._rows: dict[str, dict[str, Any]] = {}
    if out.exists():
      found = report.read_json(out)
      if found.get('what') != what:
        raise UserError(
          f'{out} holds "{found.get("what")}", not "{what}": name another --out, or remove it'
        )
      self._rows = {row['fault']: row for row in found['rows']}
      if not any_commit:
        self._refuse_other_commits(found)

  def _refuse_other_commits(self, found: dict[str, Any]) -> None:
    here = report.context()['commit']
    for row in self._rows.values():
      made = row.get('commit', found.get('commit'))
      # Without its mark of changed files: the file itself may be one of them.
      if here and made and made.rstrip('+') != here.rstrip('+'):
        raise UserError(
          f'{self._out} has trials of "{row["fault"]}" made at commit {made}, and this is {here}: name another --out, '
          'remove it, or give --any_commit to go on in it'
        )

  def run(self, fault: Fault) -> None:
    """Tries a fault until it has been tried `fault.times` times, counting what an earlier start kept."""
    about = {'fault': fault.name, 'promise': fault.promise, 'how': fault.how}
    row = self._rows.get(fault.name, {'trials': 0, 'kept': 0, 'lost': [], 'seconds': 0.0})
    self._rows[fault.name] = row = about | {key: row[key] for key in row if key not in about}
    while row['trials'] < fault.times:
      number, began = row['trials'], time.perf_counter()
      lost = fault.trial(number)
      row['trials'] += 1
      row['kept'] += not lost
      row['lost'] += [f'trial {number}: {lost}'] if lost else []
      row['seconds'] = round(row['seconds'] + time.perf_counter() - began, 1)
      row |= {key: value for key, value in report.context().items() if key in ('date', 'commit')}
      if fault.stage is not None:
        stages, stage = row.setdefault('stages', {}), fault.stage()
        stages[stage] = stages.get(stage, 0) + 1
      self._write()
      print(f'{fault.name}: trial {number + 1} of {fault.times}: {lost or "kept"}', flush=True)

  def _write(self) -> None:
    rows = [row for row in self._rows.values() if row['trials']]
    report.write_json(self._out, {'what': self._what, 'rows': rows} | report.context())

  def show(self) -> bool:
    """Prints the table; whether every promise was kept in every trial."""
    rows = [row for row in self._rows.values() if row['trials']]
    cells = [(row['fault'], row['trials'], row['kept'], row['seconds']) for row in rows]
    print(report.table(('fault', 'trials', 'kept', 'seconds'), cells))
    for row in rows:
      for lost in row['lost']:
        print(f'{row["fault"]}, {lost}')
    return all(row['kept'] == row['trials'] for row in rows)


def parser(text: str | None, script: str) -> argparse.ArgumentParser:
  """Flags that every fault script has: --out, --workdir, --only, --times, --any_commit."""
  made = argparse.ArgumentParser(
    description=text, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  name = pathlib.Path(script).stem
  add = made.add_argument
  default = report.ROOT / 'benchmarks' / 'results' / f'faults_{name}.json'
  add('--out', type=pathlib.Path, default=default, help='JSON, written anew after each trial')
  add(
    '--workdir',
    type=pathlib.Path,
    default=pathlib.Path('runs') / f'faults_{name}',
    help='scratch space, made and emptied by the script',
  )
  add('--only', default='', help='names of faults, separated by semicolons (default all)')
  add('--times', type=int, default=0, help='trials of each fault (default as many as it says)')
  add('--any_commit', action='store_true', help='go on in a file that another commit began')
  return made


def main(faults: list[Fault], flags: argparse.Namespace, what: str) -> None:
  """Runs the chosen faults; exit status 1 where a promise was broken.

  Raises:
    UserError: for an unknown fault, or a file of another script or commit.
  """
  by_name = {fault.name: fault for fault in faults}
  chosen = flags.only.split(';') if flags.only else list(by_name)
  for name in chosen:
    if name not in by_name:
      raise UserError(f'unknown fault {name!r}. Known: {"; ".join(by_name)}.')
  trials = Trials(flags.out, what, flags.any_commit)
  for name in chosen:
    fault = by_name[name]
    trials.run(dataclasses.replace(fault, times=flags.times) if flags.times else fault)
  if not trials.show():
    sys.exit(1)
