"""Compiles recipes for TPU slices or NVIDIA GPUs and keeps what the compilers say: the tables of docs/performance.md.

  python benchmarks/dryrun.py                      # every row that isn't there yet, the most important first
  python benchmarks/dryrun.py --chips=gpu          # the same for GPUs
  python benchmarks/dryrun.py --only vit_b_v5e_16 --redo
  python benchmarks/dryrun.py --list

One row after the other, each in a process of its own, written as soon as it is there: it may be stopped and started
again. A row takes minutes on two cores. Needs the `tpu` extra and no TPU, or the `gpu` extra and no GPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import report

from folk_jax.errors import UserError

_RESULTS = report.ROOT / 'benchmarks' / 'results'
_OUT = {'tpu': _RESULTS / 'dryrun.json', 'gpu': _RESULTS / 'dryrun_gpu.json'}
_WHAT = {
  'tpu': "Steps compiled by the TPU's own compiler for slices that were not there",
  'gpu': "Steps compiled by XLA's compiler for NVIDIA GPUs that were not there",
}


def _row(what: str, recipe: str, topology: str, **fields: Any) -> dict[str, Any]:
  flags = [f'--config=configs/{recipe}', f'--topology={topology}']
  return {'what': what, 'flags': [*flags, *(f'--config.{k}={v}' for k, v in fields.items())]}


# The kernel for TPUs; with it, 64 images a chip fit a v5e without recomputing anything.
_PALLAS = {'model.attention': 'pallas', 'model.remat': 'none'}
# By name, in the order of importance. 64 images a chip unless the row says otherwise.
_TPU: dict[str, dict[str, Any]] = {
  'vit_b_v5e_16': _row('FOLK, ViT-B/16', 'vit_b.py', 'v5e:4x4', batch_size=1024, **_PALLAS),
  'vit_b_v5e_256': _row('FOLK, ViT-B/16', 'vit_b.py', 'v5e:16x16', batch_size=4096, **_PALLAS),
  'vit_l_v5p_fsdp': _row(
    'FOLK, ViT-L/16',
    'vit_l.py',
    'v5p:2x2x4',
    batch_size=1024,
    **(_PALLAS | {'model.remat': 'block', 'mesh.fsdp': 8}),
  ),
  'vit_b_v5e_8': _row('FOLK, ViT-B/16', 'vit_b.py', 'v5e:2x4', batch_size=128, **_PALLAS),
  'vit_b_v6e_16': _row('FOLK, ViT-B/16', 'vit_b.py', 'v6e:4x4', batch_size=1024, **_PALLAS),
  'vit_s_v5e_16': _row('FOLK, ViT-S/16', 'vit_s.py', 'v5e:4x4', batch_size=1024, **_PALLAS),
  'resnet50_v5e_16': _row('FOLK, ResNet-50', 'resnet50.py', 'v5e:4x4', batch_size=1024),
  'vit_b_v4_16': _row('FOLK, ViT-B/16', 'vit_b.py', 'v4:2x2x4', batch_size=1024, **_PALLAS),
  'mfm_v5e_16': _row('MFM, ViT-B/16', 'mfm.py', 'v5e:4x4', batch_size=1024, **_PALLAS),
  'mae_v5e_16': _row('MAE, ViT-B/16', 'mae.py', 'v5e:4x4', batch_size=1024, **_PALLAS),
  'dino_v5e_16': _row('DINO, ViT-S/16', 'dino.py', 'v5e:4x4', batch_size=512, **_PALLAS),
  'dino_b_v5e_16': _row(
    'DINO, ViT-B/16', 'dino.py:model=vit_b', 'v5e:4x4', batch_size=512, **_PALLAS
  ),
  'ibot_v5e_16': _row(
    'iBOT, ViT-B/16', 'ibot.py:model=vit_b', 'v5e:4x4', batch_size=512, **_PALLAS
  ),
  'wavelet_mim_v5e_16': _row(
    'wavelet MIM, ViT-B/16', 'wavelet_mim.py', 'v5e:4x4', batch_size=1024, **_PALLAS
  ),
  'vit_b_v5e_16_elementwise': _row(
    'FOLK, ViT-B/16',
    'vit_b.py',
    'v5e:4x4',
    batch_size=1024,
    **(_PALLAS | {'model.remat': 'elementwise'}),
  ),
  'vit_b_v5e_16_block': _row(
    'FOLK, ViT-B/16',
    'vit_b.py',
    'v5e:4x4',
    batch_size=1024,
    **(_PALLAS | {'model.remat': 'block'}),
  ),
  'vit_b_v5e_16_scan': _row(
    'FOLK, ViT-B/16, 1 block a turn',
    'vit_b.py',
    'v5e:4x4',
    batch_size=1024,
    **(_PALLAS | {'model.scan_unroll': 1}),
  ),
  'vit_b_v5e_64': _row('FOLK, ViT-B/16', 'vit_b.py', 'v5e:8x8', batch_size=1024, **_PALLAS),
  # What the kernel and the products in place of the FFT are worth: the same step without them.
  'vit_b_v5e_16_xla': _row(
    'FOLK, ViT-B/16, XLA attention, FFT',
    'vit_b.py',
    'v5e:4x4',
    batch_size=1024,
    spectral_backend='fft',
    **{'model.attention': 'xla', 'model.remat': 'elementwise'},
  ),
  'vit_b_v5e_32': _row('FOLK, ViT-B/16', 'vit_b.py', 'v5e:4x8', batch_size=512, **_PALLAS),
}
# Nothing recomputed; else what 'auto' chooses, cuDNN's attention and no loop over layers.
_KEPT = {'model.remat': 'none'}
_GPU: dict[str, dict[str, Any]] = {
  'vit_b_h200_1': _row('FOLK, ViT-B/16', 'vit_b.py', 'h200:1', batch_size=256, **_KEPT),
  'vit_b_h200_scan': _row(
    'FOLK, ViT-B/16, 1 block a turn',
    'vit_b.py',
    'h200:1',
    batch_size=256,
    **(_KEPT | {'model.scan_unroll': 1}),
  ),
  'vit_b_h200_8': _row('FOLK, ViT-B/16', 'vit_b.py', 'h200:8', batch_size=2048, **_KEPT),
  'vit_b_h100_8': _row('FOLK, ViT-B/16', 'vit_b.py', 'h100:8', batch_size=1024, **_KEPT),
  'vit_s_h200_1': _row('FOLK, ViT-S/16', 'vit_s.py', 'h200:1', batch_size=512, **_KEPT),
  'vit_b_h200_xla': _row(
    'FOLK, ViT-B/16, XLA attention',
    'vit_b.py',
    'h200:1',
    batch_size=256,
    **(_KEPT | {'model.attention': 'xla'}),
  ),
  'dino_b_h200_1': _row('DINO, ViT-B/16', 'dino.py:model=vit_b', 'h200:1', batch_size=128, **_KEPT),
  'mae_h200_1': _row('MAE, ViT-B/16', 'mae.py', 'h200:1', batch_size=512, **_KEPT),
  'vit_b_4090_1': _row('FOLK, ViT-B/16', 'vit_b.py', 'rtx4090:1', batch_size=64, **_KEPT),
  'vit_b_a100_8': _row('FOLK, ViT-B/16', 'vit_b.py', 'a100:8', batch_size=1024, **_KEPT),
  'resnet50_h200_1': _row('FOLK, ResNet-50', 'resnet50.py', 'h200:1', batch_size=256),
  'vit_l_h200_1': _row('FOLK, ViT-L/16', 'vit_l.py', 'h200:1', batch_size=128, **_KEPT),
  'vit_l_h100_fsdp': _row(
    'FOLK, ViT-L/16',
    'vit_l.py',
    'h100:8',
    batch_size=512,
    **{'model.remat': 'elementwise', 'mesh.fsdp': 8},
  ),
  'ibot_h200_1': _row('iBOT, ViT-B/16', 'ibot.py:model=vit_b', 'h200:1', batch_size=128, **_KEPT),
  'mfm_h200_1': _row('MFM, ViT-B/16', 'mfm.py', 'h200:1', batch_size=512, **_KEPT),
  'wavelet_mim_h200_1': _row(
    'wavelet MIM, ViT-B/16', 'wavelet_mim.py', 'h200:1', batch_size=512, **_KEPT
  ),
  'vit_b_b200_8': _row('FOLK, ViT-B/16', 'vit_b.py', 'b200:8', batch_size=2048, **_KEPT),
  'vit_b_h100_64': _row('FOLK, ViT-B/16', 'vit_b.py', 'h100:8x8', batch_size=8192, **_KEPT),
}
ROWS = {'tpu': _TPU, 'gpu': _GPU}


def measure(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
  """One row: the command's own report, when and at which commit; of a step that does not fit, the shortfall."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'report.json'
    command = [sys.executable, '-m', 'folk_jax.dryrun', *row['flags'], '--suggestions=0']
    done = subprocess.run([*command, f'--json={file}'], cwd=report.ROOT, check=False)
    if not file.exists():
      raise UserError(f'row {name} failed with status {done.returncode}; its own words are above')
    found = json.loads(file.read_text(encoding='utf-8'))
  about = report.context(row['flags'][1].partition('=')[2])
  return {
    'name': name,
    'what': row['what'],
    'command': ' '.join(['python -m folk_jax.dryrun', *row['flags']]),
    'date': about['date'],
    'commit': about['commit'],
    'load_average': about['machine']['load_average'],
  } | found


def _rows(out: pathlib.Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The rows that are there and still known, by name."""
  rows = report.read_json(out)['rows'] if out.exists() else []
  return {row['name']: row for row in rows if row['name'] in known}


def _write(out: pathlib.Path, chips: str, rows: Sequence[Mapping[str, Any]]) -> None:
  order = list(ROWS[chips])
  rows = sorted(rows, key=lambda row: order.index(row['name']))
  about = {'what': _WHAT[chips]}
  report.write_json(out, about | report.context('none: compiled only') | {'rows': rows})


def _line(row: Mapping[str, Any]) -> list[str]:
  if not row['fits']:
    return [row['name'], 'does not fit', '', '', '']
  bound = row['roofline']
  return [
    row['name'],
    f'{row["memory"]["total"] / 2**30:.2f} GiB',
    f'{row["flops"]["executed_over_model"]:.2f}x',
    f'{1e3 * bound["seconds"]:.1f} ms ({bound["bound_by"]})',
    f'{bound["mfu"]:.0%}',
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--chips', choices=tuple(ROWS), default='tpu', help='whose rows (default tpu)'
  )
  parser.add_argument('--only', nargs='*', help='names of rows; all by default')
  parser.add_argument('--redo', action='store_true', help='also rows that are there')
  parser.add_argument('--list', action='store_true', help='print the rows and stop')
  parser.add_argument('--out', type=pathlib.Path, help='default: the JSON of the committed tables')
  args = parser.parse_args()
  known, out = ROWS[args.chips], args.out or _OUT[args.chips]
  wanted = args.only or list(known)
  if missing := [name for name in wanted if name not in known]:
    raise UserError(f'no row {missing[0]!r} with --chips={args.chips}; known: {", ".join(known)}')
  rows = _rows(out, known)
  if args.list:
    for name in wanted:
      there = 'there' if name in rows else 'to do'
      print(f'{there}  {name}: {known[name]["what"]}  {" ".join(known[name]["flags"])}')
    return
  os.nice(5)  # Minutes of a machine that others may be using.
  for name in wanted:
    if name in rows and not args.redo:
      continue
    print(f'{name}: {known[name]["what"]}', file=sys.stderr, flush=True)
    found = measure(name, known[name])
    rows = _rows(out, known) | {name: found}  # Read anew: another process may have added some.
    _write(out, args.chips, list(rows.values()))
  header = ['row', 'memory a chip', 'executed / model', 'at least', 'MFU at most']
  print(report.table(header, [_line(rows[name]) for name in wanted]))


if __name__ == '__main__':
  report.main(main)
