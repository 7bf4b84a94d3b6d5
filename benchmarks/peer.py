"""Times our FOLK train step beside the same step in PyTorch.

  python benchmarks/peer.py --peer=PATH/torch_folk.py --model=vit_s --batch=8

Both take the same uint8 pairs that already lie on the device, the same model, head (2048-2048-256,
8192 outputs), filter, losses, clip, AdamW and EMA teacher. Ours is the program's own step:
configs/vit_s.py through `make_run` and `compile_step`. Colour augmentation is off, because the peer
has none; the side `ours_augmented` has it. The sides run by turns, each in a process of its own
with the same environment, so that whatever else the machine does hits each alike. An image is a
pair of views.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import report

from folk_jax.errors import UserError

# Width, depth, heads: what the peer's --model names mean.
MODELS = {
  'vit_ti': (192, 12, 3),
  'vit_s': (384, 12, 6),
  'vit_b': (768, 12, 12),
  'vit_l': (1024, 24, 16),
}
SIDES = ('ours', 'ours_augmented', 'peer_eager', 'peer_compiled')
DTYPES = {'fp32': 'float32', 'bf16': 'bfloat16'}
_IMAGENET = 1_281_167  # images of an epoch: the schedules' length
_AUGMENTATIONS = ('jitter', 'grayscale', 'blur', 'solarise')


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  peer = report.ROOT.parent / 'shared' / 'bench' / 'torch_folk.py'
  add(
    '--peer',
    type=pathlib.Path,
    default=peer,
    help='the PyTorch script (default ../shared/bench/torch_folk.py)',
  )
  add(
    '--peer-python', default=sys.executable, help='interpreter that has torch (default: this one)'
  )
  add(
    '--peer-flags',
    default='',
    help="further flags of the peer's, separated by spaces, such as --sdpa=cudnn",
  )
  add('--device', choices=('cpu', 'cuda'), default='cpu')
  add('--model', choices=tuple(MODELS), default='vit_s')
  add('--batch', type=int, default=8, help='images (pairs of views) a step')
  add('--image-size', type=int, default=224)
  add('--patch', type=int, default=16)
  add('--dtype', choices=tuple(DTYPES), default='fp32')
  add(
    '--sides',
    default='',
    help=f'of {", ".join(SIDES)} (default ours,peer_eager; on cuda peer_compiled too)',
  )
  add('--rounds', type=int, default=3, help='turns of each side')
  add('--steps', type=int, default=5, help='timed steps a turn')
  add('--warmup', type=int, default=2)
  add(
    '--wait-policy',
    choices=('PASSIVE', 'ACTIVE'),
    default='PASSIVE',
    help='OMP_WAIT_POLICY, PASSIVE on shared cores',
  )
  add(
    '--keep-memory',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='glibc keeps freed memory, all sides',
  )
  add(
    '--remat',
    choices=('none', 'elementwise', 'block'),
    default='none',
    help='what our step recomputes (default none)',
  )
  add(
    '--attention',
    choices=('auto', 'xla', 'cudnn', 'pallas'),
    default='auto',
    help='of our step (default auto, as the recipes)',
  )
  add(
    '--scan-unroll',
    type=int,
    default=0,
    help='blocks a turn of our loop over layers (default 0: as the recipes, on CPUs 1, else all)',
  )
  add(
    '--quick', action='store_true', help='a ViT-Ti at 64 px, one short round: does it run at all?'
  )
  add(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON (default benchmarks/results/peer_<device>.json)',
  )
  add('--side', choices=SIDES, help=argparse.SUPPRESS)  # what the child processes of ours are given
  flags = parser.parse_args()
  if flags.quick:
    flags.model, flags.batch, flags.image_size = 'vit_ti', 2, 64
    flags.rounds, flags.steps, flags.warmup = 1, 2, 1
  flags.sides = (flags.sides or default_sides(flags.device)).split(',')
  return flags


def default_sides(device: str) -> str:
  # torch.compile gains nothing on a CPU and takes minutes.
  return 'ours,peer_eager' if device == 'cpu' else 'ours,peer_eager,peer_compiled'


def ours(flags: argparse.Namespace) -> dict[str, Any]:
  """Times our step in this process: the last line that it prints is this dict."""
  import jax
  import numpy as np

  from folk_jax.config import load_recipe
  from folk_jax.train import loop, sharding
  from folk_jax.train.run import make_run

  width, depth, heads = MODELS[flags.model]
  config = load_recipe(str(report.ROOT / 'configs' / 'vit_s.py'), None)
  config.batch_size, config.image_size = flags.batch, flags.image_size
  config.model.update({'width': width, 'depth': depth, 'heads': heads, 'patch': flags.patch})
  config.model.update(
    {
      'dtype': DTYPES[flags.dtype],
      'remat': flags.remat,
      'attention': flags.attention,
      'scan_unroll': flags.scan_unroll,
    }
  )
  config.projection.norm_last_layer = True  # as the peer
  config.optimizer.clip_by = 'global'  # as the peer
  if flags.side == 'ours':
    for view in config.views.values():
      view.update({f'{name}_probability': 0.0 for name in _AUGMENTATIONS})

  mesh = sharding.make_mesh()
  shape = (flags.batch, 2, flags.image_size, flags.image_size, 3)
  rng = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    run = make_run(config, _IMAGENET)
    state = jax.jit(run.new_state)(jax.random.key(0), {})
    batches = [
      sharding.put_batch(
        {
          'views': rng.integers(0, 256, shape, np.uint8),
          'label': np.full(flags.batch, -1, np.int32),
          'index': np.arange(flags.batch) + flags.batch * i,
          'valid': np.ones(flags.batch, bool),
        },
        mesh,
      )
      for i in range(4)
    ]
    began = time.perf_counter()
    step = loop.compile_step(run, state, mesh).lower(state, batches[0]).compile()
    compile_seconds = time.perf_counter() - began
    for i in range(flags.warmup):
      state, metrics = step(state, batches[i % 4])
    jax.block_until_ready(state)
    marks = [time.perf_counter()]
    for i in range(flags.steps):
      state, metrics = step(state, batches[i % 4])
      if flags.device == 'cpu':
        jax.block_until_ready(metrics['loss'])
        marks.append(time.perf_counter())
    jax.block_until_ready(state)
    wall = time.perf_counter() - marks[0]
  device = jax.devices()[0]
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  steps = [1e3 * (after - before) for before, after in zip(marks, marks[1:], strict=False)]
  return {
    'framework': f'jax {jax.__version__}',
    'device': device.device_kind,
    'ms_per_step': statistics.median(steps) if steps else 1e3 * wall / flags.steps,
    'wall_ms_per_step': 1e3 * wall / flags.steps,
    'first_step_s': compile_seconds,
    'peak_mem_gib': (peak or own) / 2**30,
    'finite': bool(np.isfinite(float(metrics['loss']))),
  }


def command(side: str, flags: argparse.Namespace) -> list[str]:
  """The child process of one turn of a side."""
  same = [
    f'--{name}={getattr(flags, name.replace("-", "_"))}'
    for name in ('device', 'model', 'batch', 'image-size', 'patch', 'dtype', 'steps', 'warmup')
  ]
  if side.startswith('ours'):
    return [
      sys.executable,
      str(pathlib.Path(__file__).resolve()),
      f'--side={side}',
      f'--remat={flags.remat}',
      f'--attention={flags.attention}',
      f'--scan-unroll={flags.scan_unroll}',
      *same,
    ]
  compiled = '--compile' if side == 'peer_compiled' else '--no-compile'
  return [flags.peer_python, str(flags.peer), *same, compiled, *flags.peer_flags.split()]


def turn(side: str, flags: argparse.Namespace) -> dict[str, Any]:
  """Runs one side once and returns what it says of itself."""
  environment = os.environ | {'OMP_WAIT_POLICY': flags.wait_policy}
  environment['JAX_PLATFORMS'] = flags.device
  # The peer uses one GPU.
  environment.setdefault('CUDA_VISIBLE_DEVICES', '0')
  environment['PYTHONPATH'] = os.pathsep.join(
    [str(report.ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  )
  done = subprocess.run(command(side, flags), env=environment, capture_output=True, text=True)
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise UserError(f'{side} ended with status {done.returncode}: {last}')
  return json.loads(done.stdout.strip().splitlines()[-1])


def check(flags: argparse.Namespace) -> None:
  unknown = [side for side in flags.sides if side not in SIDES]
  if unknown:
    raise UserError(f'unknown side {unknown[0]!r}: known are {", ".join(SIDES)}')
  if 'ours' not in flags.sides:
    raise UserError('--sides lacks ours: every ratio is ours over another side')
  if not any(side.startswith('peer') for side in flags.sides):
    return
  if not flags.peer.is_file():
    raise UserError(f'there is no PyTorch peer at {flags.peer}: name the script with --peer=PATH')
  has_torch = subprocess.run([flags.peer_python, '-c', 'import torch'], capture_output=True)
  if has_torch.returncode:
    raise UserError(
      f'{flags.peer_python} has no torch: install the extra `parity`, '
      'or name another Python with --peer-python'
    )


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """All turns of all sides, and their ratios."""
  # Steps on a CPU are timed one by one; on a GPU they are queued, and only the whole counts.
  key = 'ms_per_step' if flags.device == 'cpu' else 'wall_ms_per_step'
  turns: dict[str, list[dict[str, Any]]] = {side: [] for side in flags.sides}
  for number in range(flags.rounds):
    for side in flags.sides:
      result = turn(side, flags)
      result['images_per_second'] = 1e3 * flags.batch / result[key]
      turns[side].append(result)
      print(
        f'round {number + 1}/{flags.rounds}  {side:15} {result["images_per_second"]:9.2f} images/s',
        flush=True,
      )
  speed = {
    side: [result['images_per_second'] for result in results] for side, results in turns.items()
  }
  pairs = {
    side: [mine / other for mine, other in zip(speed['ours'], theirs, strict=True)]
    for side, theirs in speed.items()
    if side != 'ours'
  }
  names = ('device', 'model', 'batch', 'image_size', 'patch', 'dtype', 'rounds', 'steps', 'warmup')
  return {
    'settings': {
      name: getattr(flags, name)
      for name in (
        *names,
        'remat',
        'attention',
        'scan_unroll',
        'wait_policy',
        'keep_memory',
        'peer_flags',
      )
    },
    'images_per_second': {
      side: round(statistics.median(values), 3) for side, values in speed.items()
    },
    'ours_over': {side: round(statistics.median(ratios), 3) for side, ratios in pairs.items()},
    'ours_over_by_round': {
      side: [round(ratio, 3) for ratio in ratios] for side, ratios in pairs.items()
    },
    'turns': turns,
  }


def main() -> None:
  flags = parse()
  if flags.side:
    print(json.dumps(ours(flags)))
    return
  check(flags)
  if flags.keep_memory:
    os.environ['GLIBC_TUNABLES'] = report.KEEP_MEMORY
  result = measure(flags)
  device = result['turns']['ours'][0]['device']
  s = result['settings']
  what = (
    f'{s["model"]}, {s["batch"]} pairs of {s["image_size"]} px, patch {s["patch"]}, {s["dtype"]}'
  )
  result = {'what': f'one FOLK train step: {what}'} | report.context(device) | result
  rows = [
    (
      side,
      speed,
      result['ours_over'].get(side, 1.0),
      max(t['peak_mem_gib'] for t in result['turns'][side]),
    )
    for side, speed in result['images_per_second'].items()
  ]
  print(what)
  print(report.table(('side', 'images/s', 'ours over it', 'peak GiB'), rows))
  out = flags.out or report.ROOT / 'benchmarks' / 'results' / f'peer_{flags.device}.json'
  if flags.quick and not flags.out:
    return
  report.write_json(out, result)
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
