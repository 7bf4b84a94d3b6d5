"""What a method's training step costs: counted, compiled and measured, side by side, over batches and resolutions.

  python benchmarks/cost.py                                   # the devices at hand: a GPU, or a CPU with small batches
  python benchmarks/cost.py --only=folk,mfm --sizes=vit_s     # some of it
  python benchmarks/cost.py --topology=v5e:2x2                # compiled for TPUs, none needed

Every row is one process: a method, a size of ViT, a batch and a resolution. Counted: products of the networks, from the
traced step. Compiled: products, bytes and memory, read from XLA's program. Measured: time of a step whose batch already
lies on the device. Rows that stand in the JSON are kept: it may be stopped and started again. The table is put into
docs/performance.md by benchmarks/performance_page.py.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
from typing import Any

import report

from folk_jax import config as config_lib
from folk_jax.errors import UserError

METHODS = {
  'folk': ('FOLK', 'vit_{size}.py', ''),
  'mfm': ('MFM', 'mfm.py', 'model=vit_{size}'),
  'dino': ('DINO', 'dino.py', 'model=vit_{size}'),
  'ibot': ('iBOT', 'ibot.py', 'model=vit_{size}'),
  'mae': ('MAE', 'mae.py', 'model=vit_{size}'),
  'wavelet_mim': ('wavelet MIM', 'wavelet_mim.py', 'model=vit_{size}'),
}
# (batch, resolution) by size and kind of device: what varies one and then the other, from one common point.
GRIDS = {
  'cpu': {'vit_s': ((8, 224), (4, 224), (16, 224), (8, 160), (8, 320)), 'vit_b': ((4, 224),)},
  'gpu': {
    'vit_s': ((256, 224), (64, 224), (512, 224), (256, 160), (256, 320)),
    'vit_b': ((128, 224), (64, 224), (256, 224), (128, 160), (128, 320)),
  },
  # A chip of a slice of four; global batches.
  'tpu': {'vit_s': ((256, 224),), 'vit_b': ((256, 224), (64, 224), (64, 320))},
}


def one(flags: argparse.Namespace) -> dict[str, Any]:
  """One row, in this process."""
  if flags.topology:
    from folk_jax.compiled import topology

    topology.prepare_environment()
  import jax
  import recipe_step

  from folk_jax.compiled import chips, hlo
  from folk_jax.compiled import report as report_lib
  from folk_jax.compiled import step as step_lib

  key, size, batch, side = flags.one.split(',')
  _, file, arg = METHODS[key]
  size = size.removeprefix('vit_')
  recipe = f'configs/{file.format(size=size)}:{arg.format(size=size)}'.rstrip(':')
  config = recipe_step.load(recipe)
  config.batch_size, config.image_size = int(batch), int(side)
  config.model.remat = 'none'
  if flags.topology:
    chip, _ = topology.parse(flags.topology)
    target = step_lib.Target(flags.topology, 1, topology.devices(flags.topology), chip, None)
  else:
    devices = jax.devices()[:1]
    target = step_lib.Target('', 1, devices, chips.chip_of(devices[0].device_kind), None)
  config = step_lib.for_target(config, target)
  compiler = step_lib.Compiler(recipe, target, recipe_step.IMAGENET, recipe_step.CLASSES)
  expected, parameters = compiler.expected(config)
  if flags.topology:
    program, _ = compiler.compile(config)
  else:
    program, state, data, _ = recipe_step.compiled(config)
  found = report_lib.report(
    hlo.parse(program.as_text()),
    program.memory_analysis(),
    expected,
    len(target.devices),
    target.chip,
  )
  images = config.batch_size / len(target.devices)
  row = {
    'recipe': recipe,
    'dtype': str(config.model.dtype),
    'parameters': parameters,
    'counted': {'gflop_an_image': expected.model_flops / config.batch_size / 1e9},
    'compiled': {
      'gflop_an_image': found['flops']['executed'] / images / 1e9,
      'gb_an_image': found['bytes']['moved'] / images / 1e9,
      'memory_gib': found['memory']['total'] / 2**30,
      'temporaries_gib': found['memory']['temporaries'] / 2**30,
      'bound_images_per_second': (found['roofline'] or {}).get('images_per_second'),
      'bound_by': (found['roofline'] or {}).get('bound_by'),
    },
    'measured': None,
  }
  if not flags.topology:
    seconds, _ = recipe_step.seconds_a_step(program, state, data, flags.steps)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get('peak_bytes_in_use')
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row['measured'] = {
      'ms_an_image': 1e3 * seconds / config.batch_size,
      'peak_memory_gib': (peak if peak is not None else resident) / 2**30,
      'memory_of': 'device' if peak is not None else 'process',
    }
  return row | {'device': target.devices[0].device_kind, 'devices': len(target.devices)}


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--only', default=','.join(METHODS), help=f'methods: {", ".join(METHODS)} (default all)')
  add('--sizes', default='vit_s,vit_b', help='vit_s, vit_b (default both)')
  add('--topology', default='', help='compile for a TPU slice such as v5e:2x2 and measure nothing')
  add(
    '--steps', type=int, default=3, help='timed steps a row, after three that are not (default 3)'
  )
  add('--out', type=pathlib.Path, help='JSON (default benchmarks/results/cost_<cpu|gpu|tpu>.json)')
  add('--one', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  for what, given, known in (
    ('method', flags.only, METHODS),
    ('size', flags.sizes, ('vit_s', 'vit_b')),
  ):
    for name in given.split(','):
      if name not in known:
        raise config_lib.unknown(what, name, known)
  return flags


def kind(flags: argparse.Namespace) -> str:
  """cpu, gpu or tpu: found in a process of its own, so that this one holds no device."""
  if flags.topology:
    return 'tpu'
  code = 'import jax; print(jax.default_backend())'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  return 'gpu' if done.stdout.strip() == 'gpu' else 'cpu'


def main() -> None:
  flags = parse()
  if flags.one:
    print(json.dumps(one(flags)))
    return
  where = kind(flags)
  out = flags.out or report.ROOT / 'benchmarks' / 'results' / f'cost_{where}.json'
  rows = report.read_json(out)['rows'] if out.exists() else []
  if strangers := {row['topology'] for row in rows} - {flags.topology}:
    raise UserError(f'{out} holds rows of {strangers.pop() or where}: name another --out')
  there = {(row['method'], row['size'], row['batch'], row['image_size']) for row in rows}
  # The common point of each size first: half a table is then one that can be read.
  points = sorted(
    (
      (place, size, key, batch, side)
      for size in flags.sizes.split(',')
      for place, (batch, side) in enumerate(GRIDS[where][size])
      for key in flags.only.split(',')
    ),
    key=lambda point: point[0],
  )
  for number, (_, size, key, batch, side) in enumerate(points, 1):
    name = METHODS[key][0]
    if (name, size, batch, side) in there:
      continue
    print(f'{number} of {len(points)}: {name}, {size}, batch {batch}, {side} px', flush=True)
    command = [sys.executable, __file__, f'--one={key},{size},{batch},{side}']
    command += [f'--topology={flags.topology}', f'--steps={flags.steps}']
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    if done.returncode:
      last = (done.stderr.strip().splitlines() or ['no message'])[-1]
      print(f'  left out: {last[:200]}', file=sys.stderr)
      continue
    about = {'method': name, 'size': size, 'batch': batch, 'image_size': side}
    about['topology'] = flags.topology
    row = about | json.loads(done.stdout.strip().splitlines()[-1])
    context = report.context(row['device'])
    row |= {'date': context['date'], 'load_average': context['machine']['load_average']}
    rows.append(row)
    report.write_json(
      out, {'what': "What a method's step costs", 'where': where} | context | {'rows': rows}
    )
  if not rows:
    raise UserError('no row came through: their messages stand above')
  cells = [
    (
      row['method'],
      row['size'],
      row['batch'],
      row['image_size'],
      row['counted']['gflop_an_image'],
      row['compiled']['gflop_an_image'],
      row['compiled']['gb_an_image'],
      row['compiled']['memory_gib'],
      (row['measured'] or {}).get('ms_an_image', '-'),
    )
    for row in rows
  ]
  header = ('method', 'size', 'batch', 'px', 'GFLOP', 'compiled', 'GB', 'GiB', 'ms an image')
  print(report.table(header, cells))
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
