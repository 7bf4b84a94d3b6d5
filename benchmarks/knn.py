"""Times the kNN evaluation, measures its memory, and says what ImageNet-1K would take.

  python benchmarks/knn.py                                  # 100,000 images in the bank, 10,000 to classify
  python benchmarks/knn.py --bank=20000 --images=2000       # a minute

The features are drawn at random around 1,000 class centres: the search does the same work on any. The
extrapolation to ImageNet-1K (1,281,167 x 50,000) assumes time in proportion to the number of pairs,
which the half-sized bank, timed beside the whole one, bears out or does not; it is an estimate, and
the JSON file calls it one. Killed and started again, it goes on after the last measurement.
"""

import argparse
import pathlib
import resource
import time

import jax
import numpy as np
import parts
import report

from folk_jax.evals.knn import knn

CLASSES, KS = 1000, (10, 20, 100, 200)
IMAGENET = (1_281_167, 50_000)
MIB = 2**20


def make_features(bank: int, images: int, width: int) -> tuple[np.ndarray, ...]:
  """Float32 features and labels of the bank, then of the images to classify."""
  rng = np.random.default_rng(0)
  centre_KD = rng.standard_normal((CLASSES, width), np.float32)
  arrays = []
  for count in (bank, images):
    labels = np.arange(count, dtype=np.int32) % CLASSES
    features = rng.standard_normal((count, width), np.float32)
    features *= 4.0
    features += centre_KD[labels]
    arrays += [features, labels]
  return tuple(arrays)


def timed(arrays: tuple[np.ndarray, ...], bank: int) -> dict[str, float]:
  """One evaluation with the first `bank` images of the bank: seconds on the wall and of all cores, top-1 at k = 20."""
  train, train_labels, test, test_labels = arrays
  arguments = train[:bank], train_labels[:bank], test, test_labels
  start, work = time.perf_counter(), time.process_time()
  accuracy = knn(*arguments, ks=KS, classes=CLASSES)
  return {
    'seconds': time.perf_counter() - start,
    'core_seconds': time.process_time() - work,
    'top1_k20': accuracy[20][0],
  }


def measured(arrays: tuple[np.ndarray, ...], bank: int) -> dict[str, float]:
  """The second of two evaluations: the first of each size compiles."""
  first = timed(arrays, bank)
  second = timed(arrays, bank)
  compiling = first['core_seconds'] - second['core_seconds']
  return second | {'compile_core_seconds': compiling, 'peak_bytes': peak_bytes()}


def peak_bytes() -> int:
  """The largest resident size of this process so far; Linux counts it in KiB."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--bank', type=int, default=100_000, help='labelled images (default 100000)')
  parser.add_argument('--images', type=int, default=10_000, help='to classify (default 10000)')
  parser.add_argument('--width', type=int, default=768, help='of a feature (default 768)')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON file (default benchmarks/results/knn_<platform>.json)',
  )
  flags = parser.parse_args()
  device = jax.devices()[0]
  out = flags.out or (report.ROOT / 'benchmarks' / 'results' / f'knn_{device.platform}.json')

  context = report.context(device.device_kind)
  about = {'settings': vars(flags) | {'out': str(out)}, 'commit': context['commit']}
  found = parts.Parts(out, about | {'device': device.device_kind})
  arrays = make_features(flags.bank, flags.images, flags.width)
  half = found.get('half', lambda: measured(arrays, flags.bank // 2))
  whole = found.get('whole', lambda: measured(arrays, flags.bank))
  seconds, peak = whole['seconds'], whole['peak_bytes']
  feature_bytes = sum(array.nbytes for array in arrays)
  pairs = flags.bank * flags.images
  factor = IMAGENET[0] * IMAGENET[1] / pairs
  imagenet_bytes = 4 * flags.width * sum(IMAGENET)
  result = {
    'what': f'kNN with {flags.bank} images in the bank and {flags.images} to classify, {flags.width} features, '
    f'float32, k = {", ".join(map(str, KS))} from one search',
    **context,
    'seconds': round(seconds, 2),
    'core_seconds': round(whole['core_seconds'], 2),
    'seconds_half_bank': round(half['seconds'], 2),
    'core_seconds_half_bank': round(half['core_seconds'], 2),
    'compile_core_seconds': round(half['compile_core_seconds'], 2),
    'pairs_per_second': round(pairs / seconds),
    'peak_mib': round(peak / MIB),
    'features_mib': round(feature_bytes / MIB),
    'peak_beside_features_mib': round((peak - feature_bytes) / MIB),
    'peak_above_that_of_half_the_bank_mib': round((peak - half['peak_bytes']) / MIB),
    'top1_k20': round(whole['top1_k20'], 4),
    'imagenet_estimate': {
      'how': f'not run: seconds, and seconds of cores, times {factor:.1f}, the ratio of pairs to {IMAGENET[0]} x '
      f'{IMAGENET[1]}; memory is the features and what a block takes beside them here',
      'hours': round(seconds * factor / 3600, 2),
      'core_hours': round(whole['core_seconds'] * factor / 3600, 2),
      'features_mib': round(imagenet_bytes / MIB),
      'peak_mib': round((imagenet_bytes + peak - feature_bytes) / MIB),
    },
  }
  found.finish(out, result)

  print(f'{result["what"]}, {device.device_kind}')
  estimate = result['imagenet_estimate']
  rows = [
    ('half the bank', half['seconds'], half['core_seconds'], '', ''),
    ('measured', seconds, whole['core_seconds'], result['peak_mib'], result['features_mib']),
    (
      'ImageNet-1K, estimated',
      seconds * factor,
      whole['core_seconds'] * factor,
      estimate['peak_mib'],
      estimate['features_mib'],
    ),
  ]
  print(report.table(('', 'seconds', 'of cores', 'peak MiB', 'of it features'), rows))
  times = whole['core_seconds'] / half['core_seconds']
  print(f'the whole bank took {times:.2f} times the work of the half: 2 is in proportion')
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
