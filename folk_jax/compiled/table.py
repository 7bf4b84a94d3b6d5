"""A dry-run's report as text for a terminal."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from folk_jax.compiled.chips import GIB

_BOUNDS = {'compute': 'products at the peak', 'memory': 'memory traffic', 'links': 'collectives'}


def render(result: Mapping[str, Any]) -> str:
  """The report that `folk_jax.dryrun` writes as JSON, in words and columns."""
  return '\n'.join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
  setting, seconds = result['setting'], result['seconds']
  chips = f'{setting["devices"]} x {setting["device_kind"]}'
  yield f'{setting["recipe"]} on {setting["topology"] or "the local devices"}: {chips}'
  plural = 'es' if setting['accumulate'] > 1 else ''
  yield (
    f'{setting["batch_size"]} images a step, {setting["images_a_chip"]:g} a chip in {setting["accumulate"]} '
    f'microbatch{plural}; {setting["parameters"] / 1e6:.1f} M parameters; {setting["dtype"]}; '
    f'remat {setting["remat"]}; fsdp {setting["fsdp"]}'
  )
  yield (
    f'traced in {seconds["trace"]:.0f} s, lowered in {seconds["lower"]:.0f} s, compiled in {seconds["compile"]:.0f} s'
  )
  yield ''
  yield 'of one chip'
  yield from _columns(list(_chip_rows(result)))
  if result['collectives']:
    yield ''
    yield 'collectives'
    yield from _columns(
      [('', 'of', 'times', 'MB in all', 'largest array', 'devices', 'dtype', 'from')]
      + [
        (
          row['kind'],
          row['what'],
          f'{row["times"]}',
          f'{row["bytes"] / 1e6:.3g}',
          f'{row["largest"]:,}',
          f'{row["devices"]}',
          '+'.join(row['dtypes']),
          ', '.join(row['from']),
        )
        for row in result['collectives']
      ]
    )
  else:
    yield 'no collectives'
  yield ''
  yield from _bounds(result)
  yield from (f'note: {note}' for note in result['notes'])


def _chip_rows(result: Mapping[str, Any]) -> Iterator[Sequence[str]]:
  memory, flops, moved = result['memory'], result['flops'], result['bytes']
  words = {
    'arguments': 'state and batch',
    'outputs': f'{memory["aliased"] / GIB:.2f} of it in place of the arguments',
    'temporaries': 'activations, gradients',
    'code': '',
  }
  for name, meaning in words.items():
    yield f'  {name}', f'{memory[name] / GIB:.2f} GiB', meaning
  of = ''
  if memory['capacity']:
    share = memory['total'] / memory['capacity']
    of = f'{share:.0%} of {memory["capacity"] / GIB:.0f} GiB'
  yield '  memory in all', f'{memory["total"] / GIB:.2f} GiB', of
  ratio = flops['executed_over_model']
  words = f"{ratio:.2f} times the model's own {flops['model'] / 1e12:.4g}" if ratio else ''
  yield '  products executed', f'{_scaled(flops["executed"])}FLOP', words
  more = flops['matrix_unit'] - flops['executed']
  if more > 1e-3 * flops['executed'] and result['roofline']:
    yield '  float32 in passes', f'{_scaled(more)}FLOP', 'more on the matrix unit'
  yield '  memory traffic', f'{_scaled(moved["moved"])}B', _shares(result['share'].get('bytes', {}))
  yield '  sent to others', f'{_scaled(moved["sent"])}B', ''


def _scaled(amount: float) -> str:
  for prefix, size in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if amount >= size:
      return f'{amount / size:.4g} {prefix}'
  return f'{amount:.4g} '


def _shares(share: Mapping[str, float]) -> str:
  named = [(name, part) for name, part in share.items() if name != 'signal' and part >= 0.001]
  return ', '.join(f'{name} {part:.1%}' for name, part in sorted(named, key=lambda x: -x[1]))


def _bounds(result: Mapping[str, Any]) -> Iterator[str]:
  bound, compiler = result['roofline'], result['compiler']
  if bound is None:
    yield 'no bound: the table of chips has no published rates for these devices'
  else:
    times = ', '.join(f'{words} {1e3 * bound[name]:.1f} ms' for name, words in _BOUNDS.items())
    yield f'roofline: {times}'
    yield (
      f'bound by {_BOUNDS[bound["bound_by"]]}: at least {1e3 * bound["seconds"]:.1f} ms a step, at most '
      f'{bound["images_per_second"]:,.0f} images/s on all chips, MFU {bound["mfu"]:.1%}'
    )
    if compiler is None:
      yield (
        f'one kernel after the other, each at its own bound: {1e3 * bound["serial"]:.1f} ms a step, '
        f'MFU {bound["serial_mfu"]:.1%}'
      )
  if compiler is not None and compiler['seconds']:
    yield (
      f"the compiler's own estimate, nothing overlapped: {1e3 * compiler['seconds']:.0f} ms a step, "
      f'MFU {compiler["mfu"]:.1%} ({_shares(result["share"]["cycles"])})'
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  last = len(widths) - 1
  return [
    '  '.join(
      cell.rjust(widths[i]) if i and i < last and _is_number(cell) else cell.ljust(widths[i])
      for i, cell in enumerate(row)
    ).rstrip()
    for row in rows
  ]


def _is_number(cell: str) -> bool:
  return cell[:1].isdigit()


def say(line: str) -> None:
  """Progress goes to stderr: the table alone is on stdout."""
  print(line, file=sys.stderr, flush=True)
