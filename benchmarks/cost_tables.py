"""The table of docs/performance.md on what a method's step costs: every figure comes from benchmarks/cost.py's JSON.

performance_page.py puts it there, and what was not run says so, with its command.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import report
from cost import GRIDS, METHODS
from measured_tables import cells

_COMMANDS = {
  'cpu': ('a CPU', 'python benchmarks/cost.py'),
  'gpu': ('a GPU', 'python benchmarks/cost.py'),
  'tpu': ('TPUs, compiled only', 'python benchmarks/cost.py --topology=v5e:2x2'),
}
_FIRST = 'FOLK'
_HEADER = ['method', 'GFLOP', 'of FOLK', 'GFLOP compiled', 'GB', 'GiB', 'ms', 'of FOLK', 'peak GiB']
_HEADER_TPU = [
  'method',
  'GFLOP',
  'of FOLK',
  'GFLOP compiled',
  'GB',
  'GiB',
  'ms at least',
  'of FOLK',
]


def section(folder: pathlib.Path) -> str:
  """Tables for each kind of device: one a size, batch and resolution."""
  parts = []
  for where, (name, command) in _COMMANDS.items():
    file = folder / f'cost_{where}.json'
    parts.append(f'### On {name}')
    if not file.exists():
      parts.append(f'Not run. The command is `{command}`.')
      continue
    result = report.read_json(file)
    parts += _tables(result)
    points = sum(map(len, GRIDS[where].values())) * len(METHODS)
    if missing := points - len(result['rows']):
      parts.append(f'{missing} of {points} rows were not run: `{command}` goes on.')
    loads = [row['load_average'] for row in result['rows']]
    days = sorted({row['date'][:10] for row in result['rows']})
    machine = result['machine']
    parts.append(
      f'{result["rows"][0]["device"]}, {machine["cores"]} cores of an {machine["processor"]}, load {min(loads)} to '
      f'{max(loads)}, {", ".join(days)}, last at {result["commit"]}: `{result["command"]}`'
    )
  return '\n\n'.join(parts)


def _tables(result: Mapping[str, Any]) -> Iterator[str]:
  order = [name for name, _, _ in METHODS.values()]
  places = {
    (size, *point): place
    for size, points in GRIDS[result['where']].items()
    for place, point in enumerate(points)
  }

  def point_of(row: Mapping[str, Any]) -> tuple:
    return row['size'], row['batch'], row['image_size']

  rows = sorted(
    result['rows'],
    key=lambda row: (
      row['size'] != 'vit_s',
      places.get(point_of(row), len(places)),
      point_of(row),
      order.index(row['method']),
    ),
  )
  for (size, batch, side), group in itertools.groupby(rows, point_of):
    group = list(group)
    types = ' or '.join(sorted({row['dtype'] for row in group}))
    name = size.replace('vit_', 'ViT-').upper().replace('VIT', 'ViT')
    yield f'**{name}/16, {batch} images of {side} px, {types}**'
    measured = any(row['measured'] for row in group)
    yield cells(_HEADER if measured else _HEADER_TPU, list(_lines(group, measured)))


def _lines(group: Sequence[Mapping[str, Any]], measured: bool) -> Iterator[list[str]]:
  first = next((row for row in group if row['method'] == _FIRST), None)
  for row in group:
    found = row['compiled']
    line = [row['method'], f'{_counted(row):.1f}', _of(_counted, row, first)]
    line += [f'{found["gflop_an_image"]:.1f}', f'{found["gb_an_image"]:.2f}']
    line.append(f'{found["memory_gib"]:.2f}')
    time = _time(row)
    line += [f'{time:,.0f}' if time >= 100 else f'{time:.3g}', _of(_time, row, first)]
    if measured:
      line.append(f'{row["measured"]["peak_memory_gib"]:.2f}')
    yield line


def _counted(row: Mapping[str, Any]) -> float:
  return row['counted']['gflop_an_image']


def _time(row: Mapping[str, Any]) -> float:
  """Milliseconds an image: as measured, or what the compiled step takes at least on all its chips."""
  if row['measured']:
    return row['measured']['ms_an_image']
  return 1e3 / row['compiled']['bound_images_per_second']


def _of(value: Any, row: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
  return f'{value(row) / value(first):.2f}' if first else '-'
