"""Times a recipe's train step on 1, 2, 4 and 8 devices of this machine at a constant batch a device.

  python benchmarks/scaling.py --platform=gpu --config=configs/vit_s.py --batch=64       # several GPUs
  python benchmarks/scaling.py                                                           # a CPU

Each number of devices runs in a process of its own. On GPUs `CUDA_VISIBLE_DEVICES` chooses them. On a CPU they are
simulated and share its cores: speed means nothing there, and is left out; what is kept is each device's products in the
compiled program, which must not grow, and what it sends. benchmarks/dryrun.py has the same for 8 to 256 TPU chips.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import report

from folk_jax.errors import UserError

DEVICES = (1, 2, 4, 8)


def one(flags: argparse.Namespace) -> dict[str, Any]:
  """Compiles, and times where that means something, on this process's devices."""
  import jax
  import recipe_step

  from folk_jax.compiled import cost, hlo

  config = recipe_step.load(flags.config)
  devices = jax.device_count()
  config.batch_size = flags.batch * devices
  step, state, batch, _ = recipe_step.compiled(config)
  seconds = None
  if jax.default_backend() != 'cpu':
    seconds, _ = recipe_step.seconds_a_step(step, state, batch, flags.steps)
  visits, _ = cost.visits(hlo.parse(step.as_text()))
  return {
    'device': jax.devices()[0].device_kind,
    'devices': devices,
    'images_per_second': config.batch_size / seconds if seconds else None,
    'gflop_a_device': sum(visit.times * cost.flops(visit) for visit in visits) / 1e9,
  }


def environment(devices: int, platform: str) -> dict[str, str]:
  """For a process that sees so many devices."""
  changed = {'PYTHONPATH': os.pathsep.join([str(report.ROOT), os.environ.get('PYTHONPATH', '')])}
  if platform == 'cpu':
    flag = f'--xla_force_host_platform_device_count={devices}'
    changed |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag}
  else:
    changed |= {'CUDA_VISIBLE_DEVICES': ','.join(map(str, range(devices)))}
  return os.environ | changed


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--config', default='configs/vit_s.py:smoke', help='recipe (default configs/vit_s.py:smoke)')
  add('--batch', type=int, default=8, help='images a device (default 8)')
  add('--platform', choices=('cpu', 'gpu'), default='cpu')
  add('--devices', default=','.join(map(str, DEVICES)), help='how many, several (default 1,2,4,8)')
  add('--steps', type=int, default=20)
  add('--out', type=pathlib.Path, default=None)
  add('--one', action='store_true', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.one:
    print(json.dumps(one(flags)))
    return
  rows = []
  for count in map(int, flags.devices.split(',')):
    command = [sys.executable, __file__, '--one', f'--config={flags.config}']
    command += [f'--batch={flags.batch}', f'--steps={flags.steps}']
    where = environment(count, flags.platform)
    done = subprocess.run(command, env=where, cwd=report.ROOT, capture_output=True, text=True)
    if done.returncode:
      last = (done.stderr.strip().splitlines() or ['no message'])[-1]
      raise UserError(f'{count} devices: ended with status {done.returncode}: {last[:200]}')
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found['devices'] != count:
      raise UserError(f'asked for {count} devices and this machine has {found["devices"]}')
    rows.append(found)
  first = rows[0]
  for row in rows:
    speed, base = row['images_per_second'], first['images_per_second']
    row['efficiency'] = speed / base * first['devices'] / row['devices'] if speed else None
    row['products_over_first'] = row['gflop_a_device'] / first['gflop_a_device']
  what = f'one train step of {flags.config}, {flags.batch} images a device'
  print(what)
  header = ('devices', 'images/s', 'efficiency', 'GFLOP a device', 'against the first')
  print(
    report.table(
      header,
      [
        (
          row['devices'],
          row['images_per_second'] or '-',
          row['efficiency'] or '-',
          row['gflop_a_device'],
          f'{row["products_over_first"]:.4f}',
        )
        for row in rows
      ],
    )
  )
  out = flags.out or report.ROOT / 'benchmarks' / 'results' / f'scaling_{flags.platform}.json'
  report.write_json(out, {'what': what} | report.context(first['device']) | {'rows': rows})
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
