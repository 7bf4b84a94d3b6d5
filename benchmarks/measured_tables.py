"""Tables of what was measured on machines that were there: the steps beside the peer, settings, attention, loader.

`performance_page.py` puts them into docs/performance.md; every figure comes from a JSON in benchmarks/results/.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import report


def cells(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def measured(folder: pathlib.Path) -> str:
  """The section on what ran: for each kind of file a table, or what to run for it."""
  kinds = (
    ('### Beside PyTorch', 'peer_*.json', _peer, _PEER, _PEER_NOTE),
    ('### The step alone', 'step_*.json', _step, _STEP, _STEP_NOTE),
    ('### One to eight devices', 'scaling_*.json', _scaling, _SCALING, _SCALING_NOTE),
    ('### Self-attention', 'attention_*.json', _attention, _ATTENTION, ''),
  )
  parts = []
  for title, pattern, rows_of, header, note in kinds:
    files = sorted(folder.glob(pattern))
    results = [report.read_json(file) for file in files]
    rows = [row for result in results for row in rows_of(result)]
    parts.append(title)
    if note:
      parts.append(note)
    parts.append(cells(header, rows) if rows else 'Not run.')
    parts += [_source(result) for result in results]
  parts += _ceilings(
    *(
      [report.read_json(file) for file in sorted(folder.glob(pattern))]
      for pattern in ('peer_*.json', 'step_*.json')
    )
  )
  if not list(folder.glob('peer_gpu*.json')):
    parts.append('On a GPU: not run. The command is `benchmarks/gpu.sh --minutes=25 --peer=FILE`.')
  return '\n\n'.join(parts)


def cores(loader: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
  """How many cores a chip needs: its images/s at most, times the loader's processor time an image."""
  name, best = min(
    ((name, found) for name, found in loader['median'].items() if name != 'bare'),
    key=lambda item: item[1]['processor_ms_per_image'],
  )
  cost = best['processor_ms_per_image']
  table = []
  for row in rows:
    rate = row['roofline']['images_per_second'] / row['setting']['devices']
    slices = row['setting']['topology']
    table.append([row['what'], slices, f'{rate:,.0f}', f'{rate * cost / 1e3:.1f}'])
  header = ['step', 'slice', 'images/s a chip at most', 'cores a chip at most']
  machine, what = loader['machine'], loader['what'].partition(';')[0]
  return (
    f'{cells(header, table)}\n\nAt {cost:.2f} ms of processor time an image: {what}, {name}, on '
    f'{machine["cores"]} cores of an {machine["processor"]} ({loader["date"][:10]}, '
    f'`{loader["command"]}`). Measure yours with '
    '`benchmarks/loader.py --path=DIR`; a chip that falls short of its roofline needs fewer.'
  )


def _source(result: Mapping[str, Any]) -> str:
  machine = result['machine']
  return (
    f'{machine["device"]}, {machine["cores"]} cores, load {machine["load_average"]}, {result["date"][:10]}, at '
    f'{result["commit"]}: `{result["command"]}`'
  )


_PEER = ['step', 'device', 'side', 'images/s', 'ours over it', 'peak GiB']
_PEER_NOTE = 'One FOLK step, same model, batch, type and losses, by turns in one run; without colour augmentation.'


def _peer(result: Mapping[str, Any]) -> Iterator[list[Any]]:
  for side, speed in result['images_per_second'].items():
    ratio = result['ours_over'].get(side)
    turns = result['turns'][side]
    yield [
      result['what'].partition(': ')[2],
      turns[0].get('device', result['machine']['device']),
      side,
      f'{speed:,.2f}',
      f'{ratio:.2f}' if ratio else '',
      f'{max(turn["peak_mem_gib"] for turn in turns):.2f}',
    ]


_STEP = [
  'step',
  'images',
  'attention',
  'remat',
  'blocks a turn',
  'dtype',
  'images/s',
  'MFU',
  'peak product, TFLOP/s',
  'GiB',
]
_STEP_NOTE = (
  "MFU: the model's own products against the largest matrix product, measured in the same process."
)


def _step(result: Mapping[str, Any]) -> Iterator[list[Any]]:
  what = result['what'].removeprefix('one train step of ').partition(',')[0]
  for row in result['rows']:
    yield [
      f'{what} on {row["device"]}' + (', augmented' if row['augmentation'] else ''),
      row['batch'],
      row['attention'],
      row['remat'],
      row.get('scan_unroll', 1),  # Rows of before it could be chosen lack it.
      row['dtype'],
      f'{row["images_per_second"]:,.2f}',
      f'{row["mfu"]:.1%}',
      f'{row["peak_tflops"]:.2f}',
      f'{row["peak_memory_gib"] or row["temporaries_gib"]:.2f}',
    ]


def _ceilings(
  peers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
  """What the products alone would allow, beside the peer, for each comparison whose step was timed alone as well."""
  dtypes = {'fp32': 'float32', 'bf16': 'bfloat16'}
  for peer in peers:
    asked, rates = peer['settings'], peer['images_per_second']
    same = {'batch': asked['batch'], 'dtype': dtypes[asked['dtype']], 'augmentation': False}
    device = peer['turns']['ours'][0]['device']
    rows = [
      row
      for step in steps
      if step['what'].startswith(f'one train step of configs/{asked["model"]}.py,')
      for row in step['rows']
      if row['device'] == device and same.items() <= row.items()
    ]
    for side, rate in rates.items():
      if not rows or not side.startswith('peer'):
        continue
      best = max(rows, key=lambda row: row['peak_tflops'])
      ceiling = 1e3 * best['peak_tflops'] / best['model_gflop_an_image']
      yield (
        f'{asked["model"]}, {asked["batch"]} images, {same["dtype"]}, {device}: products alone, at the rate of the '
        f'largest one, would give {ceiling:,.2f} images/s, {ceiling / rate:.2f} times {side}; 1.2 times it would take '
        f'{1.2 * rate / ceiling:.0%} of that rate, and ours is at {rates["ours"] / ceiling:.0%}.'
      )


_SCALING = ['step', 'devices', 'images/s', 'efficiency', 'GFLOP a device', 'against the first']
_SCALING_NOTE = 'Devices simulated on a CPU share its cores, so that no speed stands there.'


def _scaling(result: Mapping[str, Any]) -> Iterator[list[Any]]:
  for row in result['rows']:
    speed, efficiency = row['images_per_second'], row['efficiency']
    yield [
      result['what'].removeprefix('one train step of '),
      row['devices'],
      f'{speed:,.1f}' if speed else '-',
      f'{efficiency:.1%}' if efficiency else '-',
      f'{row["gflop_a_device"]:.3f}',
      f'{row["products_over_first"]:.4f}',
    ]


_ATTENTION = ['what', 'device', 'model', 'attention', 'ms', 'TFLOP/s']


def _attention(result: Mapping[str, Any]) -> Iterator[list[Any]]:
  for row in result['rows']:
    yield [
      result['what'],
      result['machine']['device'],
      row['model'],
      row['attention'],
      row['median_ms'],
      row['tflops'],
    ]
