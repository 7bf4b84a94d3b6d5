"""Times every filter of the table beside one FOLK training step on the same images.

  python benchmarks/filters.py --help

The step is the program's own, of configs/vit_s.py: ViT-S/16, 8 pairs of 224 px, augmentation,
filter, student, teacher, gradients, optimiser. The filters take the 16 views of those pairs. All
programs are compiled and run by turns in one process, so that whatever else the machine does hits
each alike.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import report

from folk_jax.config import load_recipe
from folk_jax.signal.filters import FILTERS, Filter
from folk_jax.train import loop, sharding
from folk_jax.train.run import make_run

# FOLK's list of portions and MFM's radius.
SETTINGS = Filter('com_rcom', (0.005, 0.01, 0.05), 0.5, 'shared', radius=16.0, clamp=False)
# No filter may take more of the step than this.
MOST_PERCENT = 5.0
_IMAGENET = 1_281_167  # images of an epoch: the schedules' length


def filter_programs(images: np.ndarray) -> dict[str, Callable[[], Any]]:
  """Compiled filters by name, on float32 images [B, H, W, C] in [0, 1]."""
  image_BHWC = jax.device_put(images)
  keys_B = jax.random.split(jax.random.key(0), len(images))
  compiled = {
    name: jax.jit(dataclasses.replace(SETTINGS, name=name)).lower(image_BHWC, keys_B).compile()
    for name in FILTERS
  }
  return {
    name: lambda program=program: program(image_BHWC, keys_B) for name, program in compiled.items()
  }


def step_program(views_BVHWC: np.ndarray) -> Callable[[], Any]:
  """The compiled train step on uint8 pairs of views; each call is a step further."""
  batch, _, side = views_BVHWC.shape[:3]
  config = load_recipe(str(report.ROOT / 'configs' / 'vit_s.py'), None)
  config.batch_size, config.image_size = batch, side
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    run = make_run(config, _IMAGENET)
    state = jax.jit(run.new_state)(jax.random.key(0), {})
    arrays = sharding.put_batch(
      {
        'views': views_BVHWC,
        'label': np.full(batch, -1, np.int32),
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

  return advance


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--pairs', type=int, default=8, help='pairs of views a step (default 8)')
  parser.add_argument('--size', type=int, default=224, help='side in pixels (default 224)')
  parser.add_argument('--rounds', type=int, default=9, help='runs of each program (default 9)')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON file (default benchmarks/results/filters_<platform>.json)',
  )
  flags = parser.parse_args()
  device = jax.devices()[0]
  out = flags.out or (report.ROOT / 'benchmarks' / 'results' / f'filters_{device.platform}.json')

  shape = (flags.pairs, 2, flags.size, flags.size, 3)
  views_BVHWC = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  images = views_BVHWC.reshape(-1, *shape[2:]).astype(np.float32) / 255
  runs = {'step': step_program(views_BVHWC)} | filter_programs(images)
  milliseconds = report.measure(runs, flags.rounds)
  median = {name: float(np.median(times)) for name, times in milliseconds.items()}
  step = median.pop('step')
  percent = {name: 100 * value / step for name, value in median.items()}
  result = {
    'what': f'filters of {len(images)} images of {flags.size}x{flags.size}x3, float32, and a FOLK '
    f'train step of ViT-S/16 on the {flags.pairs} pairs that they make',
    **report.context(device.device_kind),
    'settings': dataclasses.asdict(SETTINGS),
    'rounds': flags.rounds,
    'step_ms': round(step, 1),
    'filter_ms': {name: round(value, 2) for name, value in median.items()},
    'percent_of_step': {name: round(value, 3) for name, value in percent.items()},
  }
  report.write_json(out, result)

  print(f'{result["what"]}, median of {flags.rounds} runs by turns, {device.device_kind}')
  rows = [(name, value, percent[name]) for name, value in median.items()]
  print(report.table(('filter', 'ms', '% of step'), [*rows, ('step', step, 100.0)]))
  dear = [name for name, share in percent.items() if share > MOST_PERCENT]
  print(f'above {MOST_PERCENT:g} % of the step: {", ".join(dear) or "none"}')
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
