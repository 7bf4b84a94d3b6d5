"""Writes the tables of docs/performance.md from the JSON files in benchmarks/results/: no figure there is typed.

  python benchmarks/performance_page.py

Only what stands between two marks of a name is replaced; the words around it are written by hand.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cost_tables
import report
from measured_tables import cells, cores, measured

from folk_jax.compiled import chips

_RESULTS = report.ROOT / 'benchmarks' / 'results'
_PAGE = report.ROOT / 'docs' / 'performance.md'
_GIB = 2**30
_GPUS = tuple(name for name, chip in chips.CHIPS.items() if chip.platform == 'gpu')


def _slice(row: Mapping[str, Any]) -> str:
  setting = row['setting']
  slices = f' x {setting["slices"]}' if setting['slices'] > 1 else ''
  return f'{setting["topology"]}{slices}'


def _memory(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
  for row in rows:
    setting, memory = row['setting'], row['memory']
    held = memory['arguments'] + memory['outputs'] - memory['aliased']
    yield [
      row['what'],
      _slice(row),
      setting['batch_size'],
      setting['remat'],
      setting['fsdp'],
      f'{held / _GIB:.2f}',
      f'{memory["temporaries"] / _GIB:.2f}',
      f'{memory["total"] / _GIB:.2f} ({memory["total"] / memory["capacity"]:.0%})',
      f'{row["seconds"]["compile"]:.0f}',
    ]


def _work(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
  for row in rows:
    flops, bound, compiler = row['flops'], row['roofline'], row['compiler']
    if row['setting']['topology'].partition(':')[0] in _GPUS:
      estimate = f'{bound["serial_mfu"]:.0%}'
    else:
      estimate = f'{compiler["mfu"]:.0%}' if compiler and compiler['seconds'] else '-'
    yield [
      row['what'],
      _slice(row),
      f'{flops["executed"] / 1e12:.2f}',
      f'{flops["executed_over_model"]:.2f}',
      f'{row["bytes"]["moved"] / 1e9:.1f}',
      f'{row["share"]["bytes"]["signal"]:.1%}',
      f'{1e3 * bound["compute"]:.1f}',
      f'{1e3 * bound["memory"]:.1f}',
      f'{1e3 * bound["links"]:.1f}',
      f'{bound["images_per_second"]:,.0f}',
      f'{bound["mfu"]:.0%}',
      estimate,
    ]


def _collectives(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Any]]:
  for row in rows:
    for one in row['collectives']:
      yield [
        row['what'],
        _slice(row),
        one['kind'],
        one['what'],
        one['times'],
        f'{one["bytes"] / 1e6:.2f}',
        f'{one["largest"]:,}',
        f'{one["groups"]} x {one["devices"]}',
        ' + '.join(one['dtypes']),
      ]


def _scaling(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows that differ in nothing but the number of chips, at a constant batch a chip."""
  families: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    setting = row['setting']
    same = ('images_a_chip', 'device_kind', 'objective', 'model', 'accumulate', 'fsdp')
    families.setdefault(json.dumps([setting[key] for key in same]), []).append(row)
  table = []
  for family in families.values():
    family = sorted(family, key=lambda row: row['setting']['devices'])
    if len(family) < 2:
      continue
    first = family[0]
    table += [
      [
        row['setting']['recipe'],
        _slice(row),
        row['setting']['devices'],
        row['setting']['images_a_chip'],
        f'{row["flops"]["executed"] / 1e12:.4f}',
        f'{row["flops"]["executed"] / first["flops"]["executed"] - 1:+.2%}',
        f'{row["bytes"]["moved"] / first["bytes"]["moved"] - 1:+.2%}',
        f'{row["bytes"]["sent"] / 1e9:.3f}',
      ]
      for row in family
    ]
  if not table:
    return ''
  header = ['recipe', 'slice', 'chips', 'images a chip', 'TFLOP a chip', 'against the smallest']
  header += ['traffic against it', 'GB sent a chip']
  return (
    f'### Scaling: one batch a chip, more chips\n\n{cells(header, table)}\n\n'
    'Work a chip that stays constant is what perfect weak scaling needs; what grows is the share of the all-reduces.'
  )


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
  """What one wants to know first: do they fit, is anything computed twice, does an image leave its chip?"""
  fullest = max(rows, key=lambda row: row['memory']['total'] / row['memory']['capacity'])
  most = max(rows, key=lambda row: row['flops']['executed_over_model'])
  signal = max(rows, key=lambda row: row['share']['bytes']['signal'])
  leaving = sorted(
    {row['what'] for row in rows for one in row['collectives'] if one['what'] == 'images'}
  )
  return (
    f'Of {len(rows)} steps the fullest takes {fullest["memory"]["total"] / fullest["memory"]["capacity"]:.0%} of its '
    f"chip's memory ({fullest['what']} on {_slice(fullest)}); at most {most['flops']['executed_over_model']:.2f} times "
    f"the model's own products are executed ({most['what']}, remat {most['setting']['remat']}); filter, augmentation "
    f'and frequency loss move at most {signal["share"]["bytes"]["signal"]:.1%} of the bytes ({signal["what"]}). '
    f'Collectives that move images or features: {", ".join(leaving) or "none"}.'
  )


def _section(result: Mapping[str, Any], estimate: str) -> str:
  """The tables of one compiler's rows; `estimate` heads the nearest to a prediction that there is."""
  rows = [row for row in result['rows'] if row['fits']]
  parts = [
    f'{result["what"]}: {", ".join(f"{k} {v}" for k, v in rows[0]["setting"]["versions"].items())}. Every figure is '
    'of one chip and one step.',
    _verdict(rows),
    '### Memory',
    cells(
      ['step', 'slice', 'images', 'remat', 'fsdp', 'state, batch; GiB', 'temporaries']
      + ['in all (of the chip)', 'compiled in, s'],
      list(_memory(rows)),
    ),
    '### Work and the least time',
    cells(
      [
        'step',
        'slice',
        'TFLOP executed',
        'over the model',
        'GB moved',
        'of it filter, augmentation, frequency loss',
      ]
      + ['compute, ms', 'memory, ms', 'links, ms', 'images/s at most, all chips', 'MFU at most']
      + [estimate],
      list(_work(rows)),
    ),
    '### Collectives',
    cells(
      ['step', 'slice', 'kind', 'of', 'times', 'MB in all', 'largest array', 'groups', 'dtype'],
      list(_collectives(rows)),
    ),
    _scaling(rows),
  ]
  if short := [row for row in result['rows'] if not row['fits']]:
    parts += [
      '### What does not fit',
      '\n'.join(
        f'- {row["what"]}: {row["needed"] / _GIB:.2f} GiB needed, {row["granted"] / _GIB:.2f} granted. '
        f'`{row["command"]}`'
        for row in short
      ),
    ]
  parts.append(
    '### Commands\n\n```\n' + '\n'.join(row['command'] for row in result['rows']) + '\n```'
  )
  dates = sorted({row['date'][:10] for row in result['rows']})
  commits = sorted({str(row['commit']) for row in result['rows']})
  parts.append(
    f'Compiled {", ".join(dates)} at {", ".join(commits)} (`+`: with uncommitted changes).'
  )
  return '\n\n'.join(part for part in parts if part)


def main() -> None:
  dryrun, of_gpus, loader = (
    report.read_json(_RESULTS / name)
    for name in ('dryrun.json', 'dryrun_gpu.json', 'loader_cpu.json')
  )
  rows = [row for row in dryrun['rows'] + of_gpus['rows'] if row['fits']]
  sections = {
    'dry-run': _section(dryrun, "MFU by the compiler's estimate"),
    'dry-run-gpu': _section(of_gpus, 'MFU, kernels in turn'),
    'cores': cores(loader, rows),
    'measured': measured(_RESULTS),
    'cost': cost_tables.section(_RESULTS),
  }
  report.between_marks(_PAGE, sections)
  print(f'written to {_PAGE}')


if __name__ == '__main__':
  report.main(main)
