"""Writes the table of docs/reliability.md from benchmarks/results/faults_*.json: no figure there is typed.

  python benchmarks/reliability_page.py

Only what stands between the marks is replaced; the words around it are written by hand.
"""

from collections.abc import Mapping
from typing import Any

import report
from measured_tables import cells

_RESULTS = report.ROOT / 'benchmarks' / 'results'
_PAGE = report.ROOT / 'docs' / 'reliability.md'

# File -> heading, in the order of a run's life.
_SCRIPTS = {
  'kill': 'Killed',
  'elastic': 'Resumed elsewhere',
  'storage': 'Storage and checkpoints',
  'data': 'Data',
  'training': 'Training',
  'determinism': 'The same twice',
  'soak': 'An hour at a stretch',
}


def _script(name: str, title: str) -> str:
  file = _RESULTS / f'faults_{name}.json'
  command = f'python benchmarks/faults/{name}.py'
  if not file.exists():
    return f'### {title}\n\nNot run. The command is `{command}`.'
  result = report.read_json(file)
  rows = [_row(row) for row in result['rows']]
  header = ['fault', 'promised', 'how it was tried', 'tried', 'kept', 'lost']
  machine = result['machine']
  commits = sorted({str(row.get('commit', result['commit'])) for row in result['rows']})
  source = (
    f'`{command}`, {machine["cores"]} cores of an {machine["processor"]}, {result["date"][:10]}; the last trials at '
    f'{", ".join(commits)}{" (+: with changes that were committed later)" * any("+" in c for c in commits)}.'
  )
  more = _soak(result) if 'judged' in result else ''
  return f'### {title}\n\n{cells(header, rows)}\n\n{more}{source}'


_NUMBERS = {
  'rss': 'resident, trainer and workers, MiB',
  'rss_trainer': 'resident, trainer, MiB',
  'pss': 'proportional share, MiB',
  'files': 'open files',
  'threads': 'threads',
  'children': 'child processes',
}


def _soak(result: Mapping[str, Any]) -> str:
  """What was counted, in the second and the last quarter of the time."""
  judged = result['judged']
  rows = [
    [
      words,
      *(f'{judged["numbers"][name][key]:g}' for key in ('second_quarter', 'last_quarter', 'bound')),
    ]
    for name, words in _NUMBERS.items()
    if name in judged['numbers']
  ]
  header = ['', 'second quarter', 'last quarter', 'growth allowed']
  words = (
    f'{judged["steps"]:,} steps in {judged["minutes"]:.0f} minutes. The growth allowed is what a run of 375,300 steps '
    '(300 epochs of ImageNet at a batch of 1024) would turn into a gibibyte; it is not zero: what a save keeps '
    'is part of it (above), and the rest has not been traced.'
  )
  return f'{cells(header, rows)}\n\n{words}\n\n![memory and counts over time](figures/soak.png)\n\n'


def _row(row: Mapping[str, Any]) -> list[Any]:
  lost = '; '.join(row['lost']) if isinstance(row['lost'], list) else row['lost']
  return [row['fault'], row['promise'], row['how'], row['trials'], row['kept'], lost or 'nothing']


def _verdict() -> str:
  rows = [
    row
    for name in _SCRIPTS
    if (file := _RESULTS / f'faults_{name}.json').exists()
    for row in report.read_json(file)['rows']
  ]
  trials, kept = sum(row['trials'] for row in rows), sum(row['kept'] for row in rows)
  return f'**{len(rows)} kinds of fault, tried {trials:,} times in all; the promise was kept {kept:,} times.**'


def main() -> None:
  parts = [_verdict(), *(_script(name, title) for name, title in _SCRIPTS.items())]
  report.between_marks(_PAGE, {'faults': '\n\n'.join(parts)})
  print(f'written to {_PAGE}')


if __name__ == '__main__':
  report.main(main)
