"""Times an attack of ten steps and every corruption at its third severity.

  python benchmarks/robustness.py --help

PGD-10 goes through a ViT-S/16 with a linear classifier of 1000 classes; beside it stands that
classifier's forward pass, so that an attack's cost is a number of passes. The corruptions take the
same images. All programs are compiled and run by turns in one process, so that whatever else the
machine does hits each alike. Killed and started again, it goes on after the last round.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import parts
import report

from folk_jax import models
from folk_jax.evals import robustness
from folk_jax.signal import corruptions
from folk_jax.signal.augment import normalise

MODEL = {'width': 384, 'depth': 12, 'heads': 6, 'patch': 16}
CLASSES = 1000
SEVERITY = 3


def programs(images: np.ndarray, names: list[str]) -> dict[str, Callable[[], Any]]:
  """Compiled programs by name, on float32 images [B, H, W, 3] in [0, 1]."""
  image_BHWC = jax.device_put(images)
  label_B = np.arange(len(images)) % CLASSES
  keys_B = jax.random.split(jax.random.key(0), len(images))
  backbone = models.make_backbone('vit', images.shape[1], **MODEL)
  params = jax.jit(backbone.init)(jax.random.key(1), image_BHWC)['params']
  weight = jax.random.normal(jax.random.key(2), (backbone.features, CLASSES))

  def logits(params: Any, image_BHWC: jax.Array) -> jax.Array:
    output, _ = models.encode(backbone, params, {}, normalise(image_BHWC), patches=False)
    return output.pooled @ weight

  def attacked(params: Any, image_BHWC: jax.Array) -> jax.Array:
    return robustness.pgd()(functools.partial(logits, params), image_BHWC, label_B, keys_B)

  compiled = {
    name: jax.jit(fn).lower(*arguments).compile()
    for name, fn, arguments in (
      ('forward', logits, (params, image_BHWC)),
      ('pgd-10', attacked, (params, image_BHWC)),
    )
  }
  runs = {
    name: lambda program=program: program(params, image_BHWC) for name, program in compiled.items()
  }
  for name in names:
    fn = functools.partial(corruptions.corrupt, name, severity=SEVERITY)
    program = jax.jit(fn).lower(image_BHWC, keys_B).compile()
    runs[name] = lambda program=program: program(image_BHWC, keys_B)
  return runs


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--images', type=int, default=16, help='images a run (default 16)')
  parser.add_argument('--size', type=int, default=224, help='side in pixels (default 224)')
  parser.add_argument('--rounds', type=int, default=5, help='runs of each program (default 5)')
  parser.add_argument(
    '--only', nargs='*', default=list(corruptions.CORRUPTIONS), help='corruptions (default all)'
  )
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON file (default benchmarks/results/robustness_<platform>.json)',
  )
  flags = parser.parse_args()
  device = jax.devices()[0]
  out = flags.out or (report.ROOT / 'benchmarks' / 'results' / f'robustness_{device.platform}.json')

  context = report.context(device.device_kind)
  about = {'settings': vars(flags) | {'out': str(out)}, 'commit': context['commit']}
  found = parts.Parts(out, about | {'device': device.device_kind})
  shape = (flags.images, flags.size, flags.size, 3)
  images = np.random.default_rng(0).random(shape, dtype=np.float32)
  milliseconds = found.rounds(lambda: programs(images, flags.only), flags.rounds)
  median = {name: float(np.median(times)) for name, times in milliseconds.items()}
  forward = median['forward']
  result = {
    'what': f'PGD of ten steps on ViT-S/16 and corruptions at severity {SEVERITY}, of '
    f'{flags.images} images of {flags.size}x{flags.size}x3, float32',
    **context,
    'rounds': flags.rounds,
    'ms': {name: round(value, 2) for name, value in median.items()},
    'in_forward_passes': {name: round(value / forward, 3) for name, value in median.items()},
  }
  found.finish(out, result)

  print(f'{result["what"]}, median of {flags.rounds} runs by turns, {device.device_kind}')
  rows = [(name, value, value / forward) for name, value in median.items()]
  print(report.table(('program', 'ms', 'forward passes'), rows))
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
