"""Measures the loader against bare decode-and-two-crops on the same cores.

  python benchmarks/loader.py --path=FOLDER_OF_IMAGES

"Bare" is one process a core, each reading its share of the files in a loop, decoding and cutting
two views of 224 pixels with the loader's own functions, and throwing them away: no shuffling, no
batches, no transport. The loader delivers whole batches to this process, from as many workers as
there are cores and from threads of this process. A round times each in turn, and a ratio is taken
within its round, so that what else the machine does hits each alike.
"""

import argparse
import itertools
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Sequence

import numpy as np
import report

from folk_jax.data import DataSettings, make_source, train_batches
from folk_jax.data.decode import decode
from folk_jax.data.views import random_view

RESULT = report.ROOT / 'benchmarks' / 'results' / 'loader_cpu.json'


def bare_share(
  settings: DataSettings,
  indices: range,
  barrier: multiprocessing.Barrier,
  queue: multiprocessing.Queue,
) -> None:
  """Decodes and cuts the samples `indices`, and puts images per second into `queue`."""
  source = make_source(settings, 'train')
  rng = np.random.default_rng(indices.start)
  barrier.wait()
  start = time.perf_counter()
  for index in indices:
    image_HWC = decode(source.fetch(index % len(source)))
    for view in settings.views:
      random_view(image_HWC, settings.image_size, view, settings.interpolation, rng)
  queue.put(len(indices) / (time.perf_counter() - start))


def bare(settings: DataSettings, images: int, cores: int) -> float:
  """Images per second of `cores` processes that only decode and cut."""
  context = multiprocessing.get_context('spawn')
  barrier, queue = context.Barrier(cores), context.Queue()
  shares = [range(core, images, cores) for core in range(cores)]
  processes = [
    context.Process(target=bare_share, args=(settings, share, barrier, queue)) for share in shares
  ]
  for process in processes:
    process.start()
  rate = sum(queue.get() for _ in processes)
  for process in processes:
    process.join()
  return rate


def loader(settings: DataSettings, images: int, batch_size: int) -> float:
  """Images per second of the loader in its steady state."""
  source = make_source(settings, 'train')
  # What was made ahead while workers started would flatter the figure: it is taken first.
  ahead = max(settings.workers, 1) * (settings.prefetch + 2)
  with train_batches(source, settings, seed=0, step=0, batch_size=batch_size) as batches:
    for _ in itertools.islice(batches, ahead):
      pass
    steps = -(-images // batch_size)
    start = time.perf_counter()
    for _ in itertools.islice(batches, steps):
      pass
    return steps * batch_size / (time.perf_counter() - start)


def run(argv: Sequence[str] | None = None) -> None:
  """Times the rounds, prints a table and writes the JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--path', required=True, help='folder of images')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--images', type=int, default=4000, help='images timed in a round')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--out', type=pathlib.Path, default=RESULT)
  args = parser.parse_args(argv)

  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  common = {'source': 'folder', 'path': args.path, 'image_size': args.size}
  variants = {
    f'{cores} workers': DataSettings(**common, workers=cores, threads=1, prefetch=1),
    f'{cores} workers of 2 threads': DataSettings(**common, workers=cores, threads=2, prefetch=2),
    f'{cores} threads': DataSettings(**common, workers=0, threads=cores, prefetch=cores),
  }
  rates = {name: [] for name in ('bare', *variants)}
  for _ in range(args.rounds):
    rates['bare'].append(bare(DataSettings(**common), args.images, cores))
    for name, settings in variants.items():
      rates[name].append(loader(settings, args.images, args.batch))
  ratios = {
    name: statistics.median(a / b for a, b in zip(rates[name], rates['bare'], strict=True))
    for name in variants
  }
  medians = {name: statistics.median(values) for name, values in rates.items()}
  rows = [[name, medians[name], ratios.get(name, 1.0)] for name in rates]
  print(report.table(['', 'images/s', 'of bare'], rows))
  packages = ('grain', 'simplejpeg', 'opencv-python-headless', 'pillow')
  context = report.context()
  context['versions'] |= report._versions(*packages)
  result = {
    'what': f'decode and two views of {args.size} px, batch {args.batch}; images per second',
    **context,
    'images': len(make_source(DataSettings(**common), 'train')),
    'images_per_round': args.images,
    'images_per_second': {name: [round(v, 1) for v in values] for name, values in rates.items()},
    'median': {name: round(value, 1) for name, value in medians.items()},
    'median_ratio_to_bare': {name: round(value, 3) for name, value in ratios.items()},
  }
  report.write_json(args.out, result)


if __name__ == '__main__':
  report.main(run)
