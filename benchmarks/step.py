"""Times a recipe's train step over batch sizes and settings, against its products and the chip's own peak.

  python benchmarks/step.py --config=configs/vit_b.py --batches=64,128,256 --settings=xla:none,cudnn:none,cudnn:block
  python benchmarks/step.py --config=configs/vit_s.py --batches=4,8                 # on a CPU

Each batch size and setting (`model.attention`:`model.remat`, and after another colon `model.scan_unroll`, 1 where it is
left out) runs in a process of its own, on a batch that already lies on the device: the loader has no part in it. MFU is
of the model's own products (docs/performance.md says how they are counted) against the largest matrix product's rate,
measured in the same process. What does not fit in memory is said and left out. Rows that stand in the JSON are kept: it
may be stopped and started again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

import report

from folk_jax.errors import UserError


def peak_flops(dtype: str) -> float:
  """The best rate of a square matrix product, FLOP/s: what this chip gives, not what it is sold as."""
  import jax
  import jax.numpy as jnp

  side = 1024 if jax.default_backend() == 'cpu' else 8192
  left = jnp.ones((side, side), dtype)
  product = jax.jit(lambda x: x @ x).lower(left).compile()
  best = min(report.measure({'product': lambda: product(left)}, 7)['product'])
  return 2 * side**3 / (best / 1e3)


def parsed(setting: str) -> dict[str, Any]:
  """The fields of `config.model` that 'attention:remat[:scan_unroll]' stands for.

  Raises:
    UserError: it is something else.
  """
  attention, _, rest = setting.partition(':')
  remat, _, unroll = rest.partition(':')
  if not (attention and remat and (unroll or '1').isdecimal()):
    raise UserError(
      f'--settings={setting}: expected attention:remat or attention:remat:scan_unroll, such as xla:none:12'
    )
  return {'attention': attention, 'remat': remat, 'scan_unroll': int(unroll or 1)}


def one(flags: argparse.Namespace) -> dict[str, Any]:
  """Times one batch size and setting in this process."""
  import jax
  import numpy as np
  import recipe_step

  from folk_jax.compiled.step import Compiler, Target
  from folk_jax.train.run import compute_dtype

  config = recipe_step.load(flags.config)
  setting = parsed(flags.one)
  config.batch_size = int(flags.batches)
  config.model.update(setting)
  if flags.dtype:
    config.model.dtype = flags.dtype
  dtype = compute_dtype(config.model.dtype)
  if not flags.augmentation:
    for view in config.views.values():
      view.update(
        {f'{name}_probability': 0.0 for name in ('jitter', 'grayscale', 'blur', 'solarise')}
      )
  peak = peak_flops(dtype)
  target = Target('', 1, jax.devices(), None, None)
  compiler = Compiler(flags.config, target, recipe_step.IMAGENET, recipe_step.CLASSES)
  own = compiler.expected(config)[0].model_flops
  step, state, batch, compile_seconds = recipe_step.compiled(config)
  seconds, metrics = recipe_step.seconds_a_step(step, state, batch, flags.steps)
  device = jax.devices()[0]
  memory = (device.memory_stats() or {}).get('peak_bytes_in_use', 0)
  planned = step.memory_analysis().temp_size_in_bytes
  return {
    'device': device.device_kind,
    'batch': config.batch_size,
    **setting,
    'dtype': dtype,
    'images_per_second': config.batch_size / seconds,
    'ms_per_step': 1e3 * seconds,
    'mfu': own / seconds / (peak * jax.device_count()),
    'model_gflop_an_image': own / config.batch_size / 1e9,
    'peak_tflops': peak / 1e12,
    'peak_memory_gib': memory / 2**30,
    'temporaries_gib': planned / 2**30,
    'compile_seconds': compile_seconds,
    'finite': bool(np.isfinite(float(metrics['loss']))),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    '--config',
    default='configs/vit_s.py',
    help='recipe, with its argument (default configs/vit_s.py)',
  )
  add('--batches', default='8', help='images a step, several apart by commas (default 8)')
  add(
    '--settings',
    default='xla:none,xla:elementwise,xla:block',
    help='attention:remat[:scan_unroll], several',
  )
  add('--dtype', default='', help='float32 or bfloat16 (default: the recipe: bfloat16 but on CPUs)')
  add('--augmentation', action='store_true', help="with the recipe's colour augmentation")
  add('--steps', type=int, default=5, help='timed steps (default 5)')
  add(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON (default benchmarks/results/step_<recipe>.json)',
  )
  add('--one', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.one:
    print(json.dumps(one(flags)))
    return
  recipe = pathlib.Path(flags.config.partition(':')[0])
  if not (report.ROOT / recipe).is_file():
    raise UserError(f'--config={flags.config}: there is no recipe {recipe}')
  out = flags.out or report.ROOT / 'benchmarks' / 'results' / f'step_{recipe.stem}.json'
  rows = report.read_json(out)['rows'] if out.exists() else []
  rows = [{'scan_unroll': 1} | row for row in rows]  # Those of before it could be chosen lack it.
  for batch in flags.batches.split(','):
    for setting in flags.settings.split(','):
      asked = {'batch': int(batch), **parsed(setting)}
      asked |= {'augmentation': flags.augmentation, 'asked': flags.dtype}
      if any(asked.items() <= row.items() for row in rows):
        continue
      command = [sys.executable, __file__, f'--one={setting}', f'--config={flags.config}']
      command += [f'--batches={batch}', f'--steps={flags.steps}', f'--dtype={flags.dtype}']
      command += ['--augmentation'] * flags.augmentation
      done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
      if done.returncode:
        last = (done.stderr.strip().splitlines() or ['no message'])[-1]
        print(f'batch {batch}, {setting}: {last[:200]}', file=sys.stderr)
        continue
      row = json.loads(done.stdout.strip().splitlines()[-1])
      rows.append(row | {'augmentation': flags.augmentation, 'asked': flags.dtype})
      what = f'one train step of {flags.config}, loader left out'
      report.write_json(out, {'what': what} | report.context(row['device']) | {'rows': rows})
  if not rows:
    raise UserError('no step could be timed; what each said stands above')
  header = (
    'batch',
    'attention',
    'remat',
    'unroll',
    'dtype',
    'augmented',
    'images/s',
    'MFU',
    'GiB',
    'compile s',
  )
  print(
    report.table(
      header,
      [
        (
          r['batch'],
          r['attention'],
          r['remat'],
          r['scan_unroll'],
          r['dtype'],
          'yes' if r['augmentation'] else 'no',
          r['images_per_second'],
          f'{r["mfu"]:.1%}',
          r['peak_memory_gib'] or r['temporaries_gib'],
          r['compile_seconds'],
        )
        for r in rows
      ],
    )
  )
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
