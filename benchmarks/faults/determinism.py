"""The same configuration and seed, twice on one machine: the same checkpoint and metrics, bit for bit.

  python benchmarks/faults/determinism.py

Each trial is a tiny run of twelve steps on the CPU with a seed of its own, twice: once with compiled programs from a
cache, where there are some, and once compiled anew. Every array of the last checkpoint and every logged number is
compared, what clocks say apart. That another seed gives other numbers is checked too, so that the comparison can fail.
"""

import argparse
import functools
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import children
import common
import report

WHAT = 'runs that are made twice'
STEPS = 12
# By name of the fault: what it does, and the flags of both runs.
KINDS = {
  'the same run twice': ('decodes in two threads', ()),
  'the same run twice, with loader workers': (
    'decodes in two worker processes',
    ('--config.data.workers=2',),
  ),
}


def run(workdir: pathlib.Path, flags: tuple[str, ...], cache: pathlib.Path | str) -> None:
  """A run, to its end, in a workdir that is made anew."""
  shutil.rmtree(workdir, ignore_errors=True)
  process = children.start(
    workdir, *children.TINY, f'--config.total_steps={STEPS}', *flags, cache=cache
  )
  status, _, err = children.end(process, 1800)
  if status:
    raise RuntimeError(f'a run ended with status {status}: {" ".join(err.split())[-400:]}')


def trial(number: int, flags: tuple[str, ...], folder: pathlib.Path, anew: bool = True) -> str:
  """Twice with one seed, from the cache of compiled programs and (`anew`) compiled anew; then with another seed."""
  flags = (*flags, f'--config.seed={number}')
  first, second = folder / 'first', folder / 'second'
  run(first, flags, folder / 'cache')
  run(second, flags, '' if anew else folder / 'cache')
  if lost := children.lost(second, first, range(1, STEPS + 1)):
    return lost
  run(second, (*flags[:-1], f'--config.seed={number + 1000}'), folder / 'cache')
  if not children.differences(children.state(second), children.state(first)):
    return 'another seed gave the same numbers: nothing was compared'
  return ''


def faults(folder: pathlib.Path) -> list[common.Fault]:
  """Both kinds, each with three seeds."""
  return [
    common.Fault(
      name,
      'On one machine the same configuration and seed give the same checkpoint and metrics, bit for bit (CPU).',
      f'A run that {what} is made twice, from cached programs and compiled anew.',
      functools.partial(
        trial, flags=flags, folder=folder / name.replace(' ', '_').replace(',', '')
      ),
      3,
    )
    for name, (what, flags) in KINDS.items()
  ]


def parse() -> argparse.Namespace:
  flags = common.parser(__doc__, __file__).parse_args()
  flags.workdir = flags.workdir.absolute()
  return flags


def main() -> None:
  """Runs both kinds; exit status 1 where runs differ."""
  flags = parse()
  common.main(faults(flags.workdir), flags, WHAT)


if __name__ == '__main__':
  report.main(main)
