"""Times a step of the linear probe's sweep beside that of a single head, on augmented images.

  python benchmarks/linear.py --help

Both steps are the program's own, of configs/linear.py with ViT-S/16: one forward pass of the frozen
backbone, then every learning rate and feature of the recipe, or DINO's one feature at one rate. They
are compiled and run by turns in one process, so that whatever else the machine does hits each alike.
Trained one after the other, the heads of the sweep would take as many single probes as there are.
Killed and started again, it goes on after the last round.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import parts
import report

from folk_jax.config import load_recipe
from folk_jax.train import loop, sharding
from folk_jax.train.run import make_run

# The sweep may cost this many single probes at most.
MOST = 2.0
CLASSES = 1000
_IMAGENET = 1_281_167  # images of an epoch: the schedules' length


def step_program(
  view_BVHWC: np.ndarray, **objective: tuple
) -> tuple[Callable[[], Any], tuple[str, ...]]:
  """The compiled train step on uint8 views [B, 1, H, W, 3], a step further at each call; and its heads' names."""
  batch, _, side = view_BVHWC.shape[:3]
  config = load_recipe(str(report.ROOT / 'configs' / 'linear.py'), 'model=vit_s')
  config.batch_size, config.image_size = batch, side
  config.objective.update(objective)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    run = make_run(config, _IMAGENET, CLASSES)
    state = jax.jit(run.new_state)(jax.random.key(0), {})
    arrays = sharding.put_batch(
      {
        'views': view_BVHWC,
        'label': np.arange(batch, dtype=np.int32) % CLASSES,
        'index': np.arange(batch),
        'valid': np.ones(batch, bool),
      },
      mesh,
    )
    step = loop.compile_step(run, state, mesh).lower(state, arrays).compile()

  def advance():
    nonlocal state
    state, metrics = step(state, arrays)
    return metrics

  return advance, run.objective.head_names


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--images', type=int, default=32, help='images a step (default 32)')
  parser.add_argument('--size', type=int, default=224, help='side in pixels (default 224)')
  parser.add_argument('--rounds', type=int, default=9, help='runs of each step (default 9)')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON file (default benchmarks/results/linear_<platform>.json)',
  )
  flags = parser.parse_args()
  device = jax.devices()[0]
  out = flags.out or (report.ROOT / 'benchmarks' / 'results' / f'linear_{device.platform}.json')

  context = report.context(device.device_kind)
  about = {'settings': vars(flags) | {'out': str(out)}, 'commit': context['commit']}
  found = parts.Parts(out, about | {'device': device.device_kind})
  shape = (flags.images, 1, flags.size, flags.size, 3)

  def runs() -> dict[str, Callable[[], Any]]:
    view_BVHWC = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sweep, names = step_program(view_BVHWC)
    single, _ = step_program(view_BVHWC, learning_rates=(0.001,), features=('last4',))
    found.get('heads', lambda: list(names))
    return {'sweep': sweep, 'single': single}

  milliseconds = found.rounds(runs, flags.rounds)
  heads = found.get('heads', list)
  median = {name: float(np.median(times)) for name, times in milliseconds.items()}
  ratio = median['sweep'] / median['single']
  result = {
    'what': f'a step of the linear probe of ViT-S/16 on {flags.images} images of '
    f'{flags.size}x{flags.size}x3 and {CLASSES} classes: {len(heads)} heads at once, and one',
    **context,
    'rounds': flags.rounds,
    'heads': heads,
    'step_ms': {name: round(value, 1) for name, value in median.items()},
    'sweep_over_single': round(ratio, 3),
  }
  found.finish(out, result)

  print(f'{result["what"]}, median of {flags.rounds} runs by turns, {device.device_kind}')
  rows = [(name, value, value / median['single']) for name, value in median.items()]
  print(report.table(('step', 'ms', 'of the single'), rows))
  verdict = 'within' if ratio < MOST else 'ABOVE'
  print(f'the sweep costs {ratio:.2f} single probes: {verdict} the {MOST:g} that it may')
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
