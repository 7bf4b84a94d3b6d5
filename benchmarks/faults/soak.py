"""One training for an hour, watched from outside: memory, open files, threads and children must not grow.

  python benchmarks/faults/soak.py --minutes=60 --workdir=/tmp/soak
  python benchmarks/faults/soak.py --redraw        # figure and judgement again, from the JSON

A tiny run with two loader workers, an evaluation every 1000 steps and a checkpoint every 100 trains in a child process;
every few seconds the child and all that it started are counted from /proc. Samples are kept line by line in
<workdir>/samples.jsonl: a soak that was killed and started again goes on for the minutes that are left, and the longest
stretch without a break is judged. At the end the run gets SIGTERM, and must save and leave with status 143.

Memory is the resident set of the tree (RSS, in which pages that two processes share count twice) and its proportional
share (PSS, in which they count once).
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import children
import common
import report

from folk_jax.errors import UserError

WHAT = 'an hour of training, watched from outside'
# Evaluations and saves are the rare events of a run: a soak has hundreds of them.
FLAGS = (
  '--config.total_steps=100000000',
  '--config.data.workers=2',
  '--config.log_every=10',
  '--config.eval_every=1000',
  '--config.checkpoint.every=100',
  '--config.logging.tensorboard=True',
)
# Compilation, the first evaluation and saves, and the allocator's arenas come in the first tenth of it.
WARM_UP = 0.1
# Growth that a whole ViT-B run could bear: under 1 GiB, a percent of a host's memory, in 300 epochs of ImageNet at a
# batch of 1024. A dict of scalars kept at every step is about this much; a batch or a state kept now and then is more.
LONGEST_RUN_STEPS, BEARABLE_MIB = 375_300, 1024
# Medians move by a few MiB without any leak: the arenas of glibc, and what is seen in the middle of a save.
NOISE_MIB = 8
# Between the medians: a machine that is busy with other work starves a run, which then cannot leak.
LEAST_STEPS = 2000
# Of files, threads and children the least of a quarter counts: a leak raises the floor. How many samples fall into a
# save, which has files and threads of its own, says how busy the machine was. One leaked at each evaluation is dozens.
FEW = 2
_PAGE_MIB = os.sysconf('SC_PAGE_SIZE') / 2**20
_CURVE_POINTS = 240
_MEMORY = ('rss', 'rss_trainer', 'pss')


def tree(pid: int) -> list[int]:
  """The process and all below it."""
  found, waiting = [], [pid]
  while waiting:
    one = waiting.pop()
    found.append(one)
    try:
      for thread in pathlib.Path(f'/proc/{one}/task').iterdir():
        waiting += map(int, (thread / 'children').read_text().split())
    except OSError:
      continue  # It has just ended, or the thread has.
  return found


def count(pid: int) -> dict[str, float] | None:
  """RSS and PSS in MiB, open files, threads and number of children of the tree; None where the process is gone."""
  total = {'rss': 0.0, 'rss_trainer': 0.0, 'pss': 0.0, 'files': 0, 'threads': 0, 'children': -1}
  for one in tree(pid):
    folder = pathlib.Path(f'/proc/{one}')
    try:
      rss = int((folder / 'statm').read_text().split()[1]) * _PAGE_MIB
      rollup = (folder / 'smaps_rollup').read_text().splitlines()
      files, threads = len(os.listdir(folder / 'fd')), len(os.listdir(folder / 'task'))
    except OSError:
      if one == pid:
        return None
      continue
    total['rss'] += rss
    total['rss_trainer'] += rss if one == pid else 0
    total['pss'] += next(int(x.split()[1]) for x in rollup if x.startswith('Pss:')) / 1024
    total['files'] += files
    total['threads'] += threads
    total['children'] += 1
  return {name: round(value, 2) for name, value in total.items()}


def last_step(workdir: pathlib.Path) -> int:
  """The last step in metrics.jsonl, read from its end."""
  file = workdir / 'metrics.jsonl'
  if not file.exists():
    return 0
  with file.open('rb') as stream:
    stream.seek(max(0, file.stat().st_size - 8192))
    lines = stream.read().splitlines()
  for line in reversed(lines):
    try:
      return int(json.loads(line)['step'])
    except (ValueError, KeyError):
      continue  # Cut in the middle: being written.
  return 0


def stretches(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
  """Samples of each start, in order."""
  by_start: dict[int, list[dict[str, Any]]] = {}
  for sample in samples:
    by_start.setdefault(sample['start'], []).append(sample)
  return list(by_start.values())


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """The samples that are kept; a last line that was cut short is not one."""
  samples = []
  for line in file.read_text(encoding='utf-8').splitlines() if file.exists() else []:
    try:
      samples.append(json.loads(line))
    except ValueError:
      continue
  return samples


def slope(minutes: list[float], values: list[float]) -> float:
  """Least squares, an hour."""
  mean_x, mean_y = statistics.fmean(minutes), statistics.fmean(values)
  spread = sum((x - mean_x) ** 2 for x in minutes)
  shared = sum((x - mean_x) * (y - mean_y) for x, y in zip(minutes, values, strict=True))
  return 60 * shared / spread if spread else 0.0


def judge(samples: list[dict[str, Any]]) -> dict[str, Any]:
  """Medians (of counts the least) of the second and last quarters after the warm-up, slopes, bounds, what was lost.

  Raises:
    UserError: too few samples to judge.
  """
  longest = max(stretches(samples), key=len, default=[])
  settled = longest[round(WARM_UP * len(longest)) :]
  if len(settled) < 8:
    raise UserError(f'{len(longest)} samples are too few to judge: give more --minutes')
  quarter = len(settled) // 4
  second, last = settled[quarter : 2 * quarter], settled[-quarter:]
  minutes = [sample['minute'] for sample in settled]
  steps = statistics.median(s['step'] for s in last) - statistics.median(s['step'] for s in second)
  if steps < LEAST_STEPS:
    raise UserError(
      f'{steps:.0f} steps lie between the medians, too few to judge: give more --minutes'
    )
  memory_bound = round(NOISE_MIB + BEARABLE_MIB * steps / LONGEST_RUN_STEPS, 1)
  bounds = dict.fromkeys(_MEMORY, memory_bound)
  bounds |= {'files': FEW, 'threads': FEW, 'children': 0}
  judged: dict[str, Any] = {
    'minutes': round(longest[-1]['minute'] - longest[0]['minute'], 1),
    'samples': len(longest),
    'steps': longest[-1]['step'] - longest[0]['step'],
    'steps_between_medians': round(steps),
    'numbers': {},
  }
  lost = []
  for name, bound in bounds.items():
    typical = statistics.median if name in _MEMORY else min
    medians = [typical(sample[name] for sample in part) for part in (second, last)]
    judged['numbers'][name] = {
      'second_quarter': round(medians[0], 2),
      'last_quarter': round(medians[1], 2),
      'bound': bound,
      'slope_an_hour': round(slope(minutes, [sample[name] for sample in settled]), 2),
      'most': max(sample[name] for sample in settled),
    }
    if medians[1] - medians[0] > bound:
      lost.append(f'{name} grew from {medians[0]:g} to {medians[1]:g}, more than {bound:g}')
  judged['lost'] = lost
  return judged


def watch(flags: argparse.Namespace) -> str:
  """Trains and samples for the minutes that are left; returns what was lost at the end ('' for nothing)."""
  flags.workdir.mkdir(parents=True, exist_ok=True)
  kept = flags.workdir / 'samples.jsonl'
  before = read(kept)
  done = sum(part[-1]['minute'] - part[0]['minute'] for part in stretches(before))
  left = 60 * (flags.minutes - done)
  if left <= 0:
    return ''
  number = 1 + max((sample['start'] for sample in before), default=-1)
  run, log = flags.workdir / 'run', flags.workdir / 'run.log'
  with kept.open('a', encoding='utf-8') as samples, log.open('a', encoding='utf-8') as said:
    process = children.start(
      run,
      *children.TINY,
      *FLAGS,
      cache=flags.workdir / 'cache',
      stdout=said,
      stderr=subprocess.STDOUT,
    )
    try:
      began = time.monotonic()
      while (passed := time.monotonic() - began) < left:
        if process.poll() is not None:
          return (
            f'the run ended with status {process.returncode} after {passed / 60:.1f} minutes: {log}'
          )
        if found := count(process.pid):
          about = {'start': number, 'minute': round(passed / 60, 3), 'step': last_step(run)}
          samples.write(json.dumps(about | found) + '\n')
          samples.flush()
        time.sleep(flags.every)
      process.send_signal(signal.SIGTERM)
      try:
        status = process.wait(300)
      except subprocess.TimeoutExpired:
        return 'SIGTERM at its end did not end the run within 5 minutes'
    finally:
      children.kill(process)
  newest = children.steps_on_disk(run)
  if status != 143 or not newest:
    return f'SIGTERM at its end left status {status} and the checkpoints {newest}'
  return ''


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Every so many samples, the last among them."""
  every = -(-len(samples) // _CURVE_POINTS)
  return samples[::-1][::every][::-1]


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  """Memory above; open files, threads and children below."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  curve, judged = found['curve'], found['judged']
  figure, (memory, counts) = plt.subplots(
    2, 1, figsize=(9, 6), sharex=True, constrained_layout=True
  )
  minutes = [sample['minute'] for sample in curve]
  for name, label in (
    ('rss', 'resident, trainer and workers'),
    ('pss', 'proportional share'),
    ('rss_trainer', 'resident, trainer'),
  ):
    memory.plot(minutes, [sample[name] for sample in curve], linewidth=1, label=label)
  rss = judged['numbers']['rss']
  growth = rss['last_quarter'] - rss['second_quarter']
  title = f'{judged["steps"]:,} steps; resident memory {growth:+.1f} MiB from the second to the last quarter (medians)'
  memory.set_title(title, fontsize='medium')
  memory.set_ylabel('MiB')
  memory.set_ylim(bottom=0)
  for name, label in (('files', 'open files'), ('threads', 'threads'), ('children', 'children')):
    counts.plot(minutes, [sample[name] for sample in curve], linewidth=1, label=label)
  counts.set(xlabel='minutes', ylabel='number')
  counts.set_ylim(bottom=0)
  for axes in (memory, counts):
    axes.axvspan(0, WARM_UP * minutes[-1], color='grey', alpha=0.15, linewidth=0)
    axes.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def parse() -> argparse.Namespace:
  parser = common.parser(__doc__, __file__)
  add = parser.add_argument
  add('--minutes', type=float, default=60, help='how long to train (default 60)')
  add('--every', type=float, default=5, help='seconds between samples (default 5)')
  add('--figure', type=pathlib.Path, default=report.ROOT / 'docs' / 'figures' / 'soak.png')
  add('--redraw', action='store_true', help='only judge and draw, from the JSON')
  flags = parser.parse_args()
  flags.workdir = flags.workdir.absolute()
  return flags


def main() -> None:
  """Watches, judges, writes the JSON and the figure; exit status 1 where something grew."""
  flags = parse()
  if flags.redraw:
    if not flags.out.exists():
      raise UserError(f'there is no {flags.out}: leave --redraw out')
    draw(report.read_json(flags.out), flags.figure)
    return
  began = time.monotonic()
  ending = watch(flags)
  samples = read(flags.workdir / 'samples.jsonl')
  judged = judge(samples)
  lost = judged['lost'] + ([ending] if ending else [])
  numbers = judged['numbers']
  row = {
    'fault': 'a long run',
    'promise': 'Memory, open files, threads and child processes stay flat for as long as a run trains.',
    'how': f'{judged["minutes"]:.0f} minutes of training with loader workers, an evaluation every 1000 steps and a '
    'checkpoint every 100, counted from outside; the second and the last quarter are compared.',
    'trials': 1,
    'kept': int(not lost),
    'lost': lost,
    'seconds': round(time.monotonic() - began, 1),
    'date': report.context()['date'],
  }
  longest = max(stretches(samples), key=len)
  found = {'what': WHAT, 'rows': [row], 'judged': judged, 'curve': thinned(longest)}
  report.write_json(flags.out, found | report.context())
  draw(found, flags.figure)
  header = ('number', 'second quarter', 'last quarter', 'bound', 'an hour')
  keys = ('second_quarter', 'last_quarter', 'bound', 'slope_an_hour')
  print(
    report.table(header, [(name, *(one[key] for key in keys)) for name, one in numbers.items()])
  )
  print('\n'.join(lost) or f'flat over {judged["steps"]} steps in {judged["minutes"]} minutes')
  sys.exit(bool(lost))


if __name__ == '__main__':
  report.main(main)
