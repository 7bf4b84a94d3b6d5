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
from typing import NamedTuple

import numpy as np
import report

from folk_jax.data import DataSettings, make_source, train_batches
from folk_jax.data.decode import decode
from folk_jax.data.views import random_view

RESULT = report.ROOT / 'benchmarks' / 'results' / 'loader_cpu.json'


class Speed(NamedTuple):
  """Images per second, and milliseconds of processor time per image over all processes."""

  rate: float
  cost: float


def bare_share(
  settings: DataSettings,
  indices: range,
  barrier: multiprocessing.Barrier,
  queue: multiprocessing.Queue,
) -> None:
  """Decodes and cuts the samples `indices`, and puts images per second and processor seconds into `queue`."""
  source = make_source(settings, 'train')
  rng = np.random.default_rng(indices.start)
  barrier.wait()
  start, busy = time.perf_counter(), time.process_time()
  for index in indices:
    image_HWC = decode(source.fetch(index % len(source)))
    for view in settings.views:
      random_view(image_HWC, settings.image_size, view, settings.interpolation, rng)
  queue.put((len(indices) / (time.perf_counter() - start), time.process_time() - busy))


def bare(settings: DataSettings, images: int, cores: int) -> Speed:
  """The speed of `cores` processes that only decode and cut."""
  context = multiprocessing.get_context('spawn')
  barrier, queue = context.Barrier(cores), context.Queue()
  shares = [range(core, images, cores) for core in range(cores)]
  processes = [
    context.Process(target=bare_share, args=(settings, share, barrier, queue)) for share in shares
  ]
  for process in processes:
    process.start()
  rates, busy = zip(*[queue.get() for _ in processes], strict=True)
  for process in processes:
    process.join()
  return Speed(sum(rates), 1000 * sum(busy) / images)


def busy_seconds() -> float:
  """Processor time, user and system, of this process and its workers so far; Linux only."""
  pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
  stats = [pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split() for pid in pids]
  return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf('SC_CLK_TCK')


def loader(settings: DataSettings, images: int, batch_size: int) -> Speed:
  """The loader's speed in its steady state."""
  source = make_source(settings, 'train')
  # What was made ahead while workers started would flatter the figure: it is taken first.
  ahead = max(settings.workers, 1) * (settings.prefetch + 2)
  with train_batches(source, settings, seed=0, step=0, batch_size=batch_size) as batches:
    for _ in itertools.islice(batches, ahead):
      pass
    steps = -(-images // batch_size)
    start, busy = time.perf_counter(), busy_seconds()
    for _ in itertools.islice(batches, steps):
      pass
    images = steps * batch_size
    wall = time.perf_counter() - start
    return Speed(images / wall, 1000 * (busy_seconds() - busy) / images)


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
  speeds = {name: [] for name in ('bare', *variants)}
  for _ in range(args.rounds):
    speeds['bare'].append(bare(DataSettings(**common), args.images, cores))
    for name, settings in variants.items():
      speeds[name].append(loader(settings, args.images, args.batch))

  def ratio(name: str, field: str) -> float:
    pairs = zip(speeds[name], speeds['bare'], strict=True)
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)

  summary = {
    name: {
      'images_per_second': round(statistics.median(speed.rate for speed in found), 1),
      'rate_over_bare': round(ratio(name, 'rate'), 3),
      'processor_ms_per_image': round(statistics.median(speed.cost for speed in found), 3),
      'processor_time_over_bare': round(ratio(name, 'cost'), 3),
    }
    for name, found in speeds.items()
  }
  rows = [[name, *values.values()] for name, values in summary.items()]
  print(report.table(['', 'images/s', 'over bare', 'processor ms', 'over bare'], rows))
  packages = ('grain', 'simplejpeg', 'opencv-python-headless', 'pillow')
  context = report.context()
  context['versions'] |= report._versions(*packages)
  result = {
    'what': f'decode and two views of {args.size} px, batch {args.batch}; images per second',
    **context,
    'images': len(make_source(DataSettings(**common), 'train')),
    'images_per_round': args.images,
    'median': summary,
    'rounds_images_per_second': {
      name: [round(speed.rate, 1) for speed in found] for name, found in speeds.items()
    },
  }
  report.write_json(args.out, result)


if __name__ == '__main__':
  report.main(run)
