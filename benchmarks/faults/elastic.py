"""A run that goes on elsewhere: on fewer devices or processes, with other loader workers or microbatches.

  python benchmarks/faults/elastic.py

Each trial is a tiny run of eight steps on the CPU in several legs, each a start of its own on other resources; it is
compared with the run of one process on one device that nobody stopped: the numbers of the images in every batch, in
their order, and every number that is logged at every step, of training and of the evaluation at the end.

Where only the loader differs, numbers must be equal bit for bit. Elsewhere sums are taken in another order: float32
rounding of 1e-7 a step is divided by temperatures of 0.04 and goes through Adam, and what was measured after eight
steps is below 1e-5. An image, a draw or a mean that is another one moves the first digits.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
import socket
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import children
import common
import numpy as np
import report

WHAT = 'runs that go on elsewhere'
STEPS = 8
FLAGS = (*children.TINY, f'--config.total_steps={STEPS}', '--config.checkpoint.every=100')
RELATIVE, ABSOLUTE = 1e-4, 1e-5
# Numbers about a batch as a whole, which microbatches change: each is looked at alone, and their mean is logged. A loss
# that is pooled over the batch would be one, and so would BatchNorm's statistics; this recipe has neither.
POOLED = ('train/effective_rank', 'train/feature_std', 'train/teacher_entropy_of_mean')


@dataclasses.dataclass(frozen=True)
class Leg:
  """A start of the run.

  Attributes:
    stop: the step after which it is told to end; 0 for none.
    devices: of each process.
    processes: how many there are.
    flags: of this start alone.
  """

  stop: int = 0
  devices: int = 1
  processes: int = 1
  flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Move:
  """A run in legs.

  Attributes:
    name: a few words.
    how: one sentence.
    legs: the starts.
    exactly: whether the numbers must be equal bit for bit.
    without: names of numbers that may differ.
  """

  name: str
  how: str
  legs: tuple[Leg, ...]
  exactly: bool = False
  without: tuple[str, ...] = ()


def _workers(number: int) -> tuple[str, ...]:
  return (f'--config.data.workers={number}',)


def _microbatches(number: int) -> tuple[str, ...]:
  return (f'--config.accumulate={number}',)


MOVES = (
  Move(
    'resumed on fewer devices',
    'A run on 8 devices is told to end after step 3, goes on on 4, and after step 6 on 1.',
    (Leg(3, devices=8), Leg(6, devices=4), Leg()),
  ),
  Move(
    'resumed on more devices',
    'A run on 1 device is told to end after step 3, goes on on 4, and after step 6 on 8 that share the parameters in '
    'pairs.',
    (Leg(3), Leg(6, devices=4), Leg(devices=8, flags=('--config.mesh.fsdp=2',))),
  ),
  Move(
    'resumed on fewer processes',
    'A run of 2 processes with 2 devices each is told to end after step 4; one process with one device goes on.',
    (Leg(4, devices=2, processes=2), Leg()),
  ),
  Move(
    'resumed with other loader workers',
    'A run that decodes in threads is told to end after step 3, goes on with 2 workers, and after step 6 with 1.',
    (Leg(3), Leg(6, flags=_workers(2)), Leg(flags=_workers(1))),
    exactly=True,
  ),
  Move(
    'resumed with other microbatches',
    'A run is told to end after step 3, goes on with the same batch in 4 microbatches, and after step 6 in 2.',
    (Leg(3), Leg(6, flags=_microbatches(4)), Leg(flags=_microbatches(2))),
    without=POOLED,
  ),
)


def run(
  workdir: pathlib.Path, leg: Leg, cache: pathlib.Path, flags: tuple[str, ...] = FLAGS
) -> str:
  """One leg, to its end; '' or what went wrong."""
  with socket.create_server(('127.0.0.1', 0)) as listener:
    port = listener.getsockname()[1]
  started = []
  for process in range(leg.processes):
    places = (f'--coordinator=127.0.0.1:{port}', f'--processes={leg.processes}')
    places = (*places, f'--process={process}') if leg.processes > 1 else ()
    started.append(
      children.start(
        workdir,
        *flags,
        *leg.flags,
        *places,
        cache=cache,
        devices=leg.devices,
        program=(str(children.ROOT / 'benchmarks' / 'faults' / 'recorded_main.py'),),
        environment={'RECORD': f'{workdir}.images', 'STOP_AFTER': str(leg.stop)},
      )
    )
  expected = 143 if leg.stop else 0
  for process in started:
    status, _, err = children.end(process, 1800)
    if status != expected:
      for other in started:
        children.kill(other)
      return f'a start ended with status {status}, not {expected}: {" ".join(err.split())[-400:]}'
  return ''


def images(workdir: pathlib.Path) -> dict[int, list[int]]:
  """The image numbers of each step, those of process 0 first."""
  by_step: dict[int, list[int]] = {}
  for file in sorted(workdir.parent.glob(f'{workdir.name}.images.*')):
    for line in file.read_text(encoding='utf-8').splitlines():
      record = json.loads(line)
      by_step.setdefault(record['step'], []).extend(record['index'])
  return by_step


def differences(
  workdir: pathlib.Path, reference: pathlib.Path, move: Move, steps: int = STEPS
) -> str:
  """'' where a run saw the reference's images and came to its numbers, else a sentence."""
  seen, expected_images = images(workdir), images(reference)
  if sorted(seen) != list(range(1, steps + 1)):
    return f'images were recorded for the steps {sorted(seen)}'
  for step in seen:
    if seen[step] != expected_images[step]:
      return f'step {step} saw the images {seen[step]}, not {expected_images[step]}'
  found, twice = children.metrics(workdir)
  expected, _ = children.metrics(reference)
  if twice or sorted(found) != sorted(expected):
    return twice or f'metrics.jsonl has the steps {sorted(found)}'
  for step, numbers in expected.items():
    for name in numbers.keys() - set(move.without):
      number, other = numbers[name], found[step].get(name)
      if other is None or (move.exactly and other != number):
        return f'{name} at step {step} is {other}, not {number}'
      if not np.isclose(other, number, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True):
        return f'{name} at step {step} is {other}, not {number} within {RELATIVE:g}'
  return ''


def trial(number: int, move: Move, folder: pathlib.Path) -> str:
  """A run in legs with a seed of its own, against one that nobody stopped."""
  flags = (*FLAGS, f'--config.seed={number}')
  reference, workdir = folder / f'reference_{number}', folder / move.name.replace(' ', '_')
  if children.steps_on_disk(reference)[-1:] != [STEPS]:
    _remove(reference)
    if wrong := run(reference, Leg(), folder / 'cache', flags):
      raise RuntimeError(wrong)
  _remove(workdir)
  for leg in move.legs:
    if wrong := run(workdir, leg, folder / 'cache', flags):
      return wrong
  return differences(workdir, reference, move)


def _remove(workdir: pathlib.Path) -> None:
  shutil.rmtree(workdir, ignore_errors=True)
  for file in workdir.parent.glob(f'{workdir.name}.images.*'):
    file.unlink()


def faults(folder: pathlib.Path) -> list[common.Fault]:
  """The moves, each with two seeds."""
  same = 'Same images and draws at every step; '
  equal = {
    True: same + 'the numbers are equal bit for bit.',
    False: same + f'losses and evaluation agree to {RELATIVE:g}, which is rounding.',
  }
  return [
    common.Fault(
      move.name,
      equal[move.exactly],
      move.how,
      functools.partial(trial, move=move, folder=folder),
      2,
    )
    for move in MOVES
  ]


def parse() -> argparse.Namespace:
  flags = common.parser(__doc__, __file__).parse_args()
  flags.workdir = flags.workdir.absolute()
  return flags


def main() -> None:
  """Runs the chosen moves; exit status 1 where one changed something."""
  flags = parse()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  common.main(faults(flags.workdir), flags, WHAT)


if __name__ == '__main__':
  report.main(main)
