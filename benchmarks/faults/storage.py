"""Faults of storage, injected into real runs: full and read-only disks, damage, two runs in a workdir, a jumping clock.

  python benchmarks/faults/storage.py

A disk is filled, and one made read-only, where the script may mount a small one; elsewhere those faults are left out,
and a limit on the size of files stands for the full disk. hostile.py has the faults of formats, which need no runs.
"""

import functools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import children
import common
import hostile
import report
from storage_runs import FLAGS, STEPS, Runs, disk, may_mount, refusal

WHAT = 'faults of storage and of formats'


def full_disk(runs: Runs, trial: int) -> str:
  """The disk fills up at some step, with more or less of it left."""
  draws = random.Random(trial)
  at, left = draws.randint(2, 6), draws.choice([0, 4, 40, 100])
  with disk(runs) as point:
    workdir = point / 'run'
    status, said = runs.run(workdir, f'fill:{at}:{point}:{left}')
    words = (str(workdir), 'No space left on device', 'are free', 'free some and start the same')
    lost = refusal(status, said, *words)
    (point / 'filler').unlink()
    return lost or runs.resumed(workdir)


def file_limit(runs: Runs, trial: int) -> str:
  """From some step on no file may be larger than a part of a checkpoint."""
  at = random.Random(trial).randint(2, 6)
  workdir = runs.fresh('limited')
  status, said = runs.run(workdir, f'limit:{at}:32')
  words = (str(workdir), 'File too large', 'are free', 'start the same command again')
  lost = refusal(status, said, *words)
  whole = children.steps_on_disk(workdir)
  if not lost and whole and f'step {whole[-1]} is whole' not in said[0]:
    lost = f'{whole} are on disk, and the line says: {said[0]}'
  return lost or runs.resumed(workdir)


def turns_read_only(runs: Runs, trial: int) -> str:
  """From some step on a disk that takes no writes is mounted over the folder of the checkpoints."""
  workdir = runs.fresh('turned')
  folder = workdir / 'checkpoints'
  status, said = runs.run(workdir, f'read_only:{random.Random(trial).randint(2, 6)}:{folder}')
  subprocess.run(['umount', str(folder)], check=True)
  return refusal(status, said, str(folder), 'make it writable') or runs.resumed(workdir)


def read_only(runs: Runs, trial: int) -> str:
  """A new run (even trials), or one that would go on, on a disk that is read-only from the start."""
  with disk(runs) as point:
    workdir = point / 'run'
    if trial % 2:
      shutil.copytree(runs.copied('before', STEPS // 2), workdir)
    subprocess.run(['mount', '-o', 'remount,ro', str(point)], check=True)
    status, said = runs.run(workdir)
    return refusal(status, said, str(workdir), 'Read-only file system', 'make it writable')


def _array_file(step: pathlib.Path) -> pathlib.Path:
  """The file that holds the large arrays."""
  return max((step / 'state').rglob('d/*'), key=lambda file: file.stat().st_size)


def _flip(file: pathlib.Path, draws: random.Random) -> None:
  content = bytearray(file.read_bytes())
  content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
  file.write_bytes(content)


def _truncate(file: pathlib.Path, draws: random.Random) -> None:
  os.truncate(file, draws.randrange(file.stat().st_size))


DAMAGE: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
  'a bit of a large array flipped': lambda step, draws: _flip(_array_file(step), draws),
  'the file of the large arrays cut': lambda step, draws: _truncate(_array_file(step), draws),
  'the metadata of the arrays removed': lambda step, _: (step / 'state' / '_METADATA').unlink(),
  'what the step says of itself cut': lambda step, draws: _truncate(
    step / 'meta' / 'metadata', draws
  ),
  'any file removed': lambda step, draws: draws.choice(
    sorted(
      file for item in ('state', 'meta') for file in (step / item).rglob('*') if file.is_file()
    )
  ).unlink(),
  'all arrays removed': lambda step, _: shutil.rmtree(step / 'state'),
}


def damaged(runs: Runs, trial: int, kind: str) -> str:
  """The newest checkpoint is damaged while nobody looks; in every third trial the one before it, too."""
  draws = random.Random(trial)
  workdir = runs.copied('damaged', 6)
  broken = [6, 4] if trial % 3 == 2 else [6]
  for step in broken:
    DAMAGE[kind](workdir / 'checkpoints' / str(step), draws)
  status, said = runs.run(workdir)
  for step in broken:
    lines = [line for line in said if f'step {step} in' in line]
    if len(lines) != 1 or f'kept aside as {step}.damaged, going on from' not in lines[0]:
      return f'of step {step} it says {lines}, all: {said[-2:]}'
    if not (workdir / 'checkpoints' / f'{step}.damaged').is_dir():
      return f'step {step} is not kept aside'
  return runs.ended(workdir, status, said)


def none_whole(runs: Runs, trial: int) -> str:
  """All checkpoints are damaged, each in some way; the run is started twice."""
  draws = random.Random(trial)
  workdir = runs.copied('none_whole', 4)
  for step in children.steps_on_disk(workdir):
    DAMAGE[draws.choice(sorted(DAMAGE))](workdir / 'checkpoints' / str(step), draws)
  before = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
  for _ in range(2):
    status, said = runs.run(workdir)
    if lost := refusal(status, said, 'no whole checkpoint is left', 'another --workdir'):
      return lost
  after = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
  return '' if before == after else f'{before} have become {after}'


def metrics_cut(runs: Runs, trial: int) -> str:
  """metrics.jsonl ends in mid-line, or in what a lost machine leaves, zeros or noise."""
  draws = random.Random(trial)
  workdir = runs.copied('cut', 4)
  file = workdir / 'metrics.jsonl'
  lines = file.read_bytes().splitlines(keepends=True)
  ends = {0: b'', 1: bytes(300), 2: draws.randbytes(300), 3: b'[1, 2]\n3\n"x"\nnull\n'}
  cut = lines[4][: draws.randrange(len(lines[4]))]
  file.write_bytes(b''.join(lines[:4]) + cut + ends[trial % 4])
  return runs.resumed(workdir)


def two_runs(runs: Runs, trial: int) -> str:
  """A second run starts while one trains; every other time the first is killed, and then started again."""
  workdir = runs.fresh('two')
  first = runs.started(workdir, '', f'--config.total_steps={STEPS}')
  try:
    if not children.within(600, lambda: (workdir / 'lock').exists()):
      return f'no lock was taken: {children.end(first)}'
    os.kill(first.pid, 19)  # SIGSTOP: it keeps its lock for as long as the second needs.
    status, said = runs.run(workdir)
    lost = refusal(status, said, 'another run trains in workdir', f'process {first.pid} on')
    if trial % 2:
      children.kill(first)
      return lost or runs.resumed(workdir)
    os.kill(first.pid, 18)
    status, _, said = children.end(first, 900)
  finally:
    children.kill(first)
  return lost or runs.ended(workdir, status, said.strip().splitlines())


def two_runs_shared(runs: Runs, trial: int) -> str:
  """The same where locks are not to be trusted: a first run that is held up goes on after a second began, or ended."""
  if trial % 2:
    return _second_ends_first(runs)
  workdir = runs.fresh('two_shared')
  first = runs.started(workdir, 'shared:0')
  try:
    if not children.within(600, lambda: (workdir / 'owner.json').exists()):
      return f'nobody wrote owner.json: {children.end(first)}'
    os.kill(first.pid, 19)
    second = runs.started(workdir, 'shared:0')
    mine = f'process {second.pid} on'
    found = children.within(600, lambda: mine in (workdir / 'owner.json').read_text())
    os.kill(second.pid, 19)
    os.kill(first.pid, 18)
    status, _, said = children.end(first, 900)
    lost = '' if found else 'the second run did not take the workdir'
    lost = lost or refusal(status, said.strip().splitlines(), 'another run was started', mine)
    os.kill(second.pid, 18)
    status, _, said = children.end(second, 900)
  finally:
    children.kill(first)
  return lost or runs.ended(workdir, status, said.strip().splitlines())


def _second_ends_first(runs: Runs) -> str:
  """The first run, held up after its first step, finds nobody, but what the second has saved."""
  workdir = runs.fresh('two_shared')
  first = runs.started(workdir, 'held_up:0:1')
  try:
    if not children.within(600, lambda: _state(first) in ('T', 'Z')) or _state(first) == 'Z':
      return f'the first run was not held up: {children.end(first)}'
    status, said = runs.run(workdir, 'shared:0')
    if lost := runs.ended(workdir, status, said):
      return f'the second run: {lost}'
    if (workdir / 'owner.json').exists():
      return 'the second run ended and left owner.json'
    os.kill(first.pid, 18)
    status, _, said = children.end(first, 900)
  finally:
    children.kill(first)
  lost = refusal(status, said.strip().splitlines(), 'another run was started', 'ended since')
  return lost or runs.ended(workdir, 0, [])


def _state(process: subprocess.Popen) -> str:
  """The letter that the kernel has for it: T is stopped, Z has ended."""
  return pathlib.Path(f'/proc/{process.pid}/stat').read_text().rpartition(')')[2].split()[0]


def clock(runs: Runs, trial: int) -> str:
  """The clock jumps by years, back and forth, all the time; half-way the run is started again."""
  workdir = runs.fresh('clock')
  began = time.time()
  status, said = runs.run(workdir, f'clock:0:{trial}')
  if lost := runs.ended(workdir, status, said):
    return lost
  from folk_jax.train import metrics

  logged = [line for line in metrics.read_metrics(str(workdir)) if 'train/step_seconds' in line]
  taken = time.time() - began
  wrong = [line for line in logged if not 0 < line['train/step_seconds'] < taken]
  wrong += [line for line in logged if not 0 <= line['train/goodput'] <= 1]
  if wrong or not logged:
    return f'throughput is wrong in {wrong[:1]}'
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  status, said = runs.run(workdir, f'clock:0:{trial + 1000}')
  return runs.ended(workdir, status, said)


def export_elsewhere(runs: Runs, trial: int) -> str:
  """A run on eight devices, its weights cut over four, is exported by a process with one device and no data library."""
  workdir = runs.folder / 'eight'
  if children.steps_on_disk(workdir)[-1:] != [STEPS]:
    started = children.start(
      runs.fresh('eight'), *FLAGS, '--config.mesh.fsdp=4', cache=runs.cache, devices=8
    )
    status, _, said = children.end(started, 900)
    if status:
      return f'the run on eight devices ended with {status}: {said[-300:]}'
  which = ('teacher', 'student')[trial % 2]
  done = subprocess.run(
    [sys.executable, '-c', hostile.EXPORT, str(workdir), which],
    cwd=children.ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(children.ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  return '' if not done.returncode else done.stderr[-300:]


def faults(runs: Runs) -> list[common.Fault]:
  """A row for each kind of fault."""

  def row(name, promise, trial, times, how=''):
    how = how or ' '.join(trial.__doc__.split())
    return common.Fault(name, promise, how, lambda number: trial(runs, number), times)

  ends = 'The run ends with one line (the folder, the free space, the cure) and status 2; checkpoints before stay whole'
  ends += ', and started again with room it ends as if undisturbed, bit for bit.'
  falls = 'The one before is taken, with one warning that names the step and the damage; the damaged one is kept'
  falls += ' aside; the end is the undisturbed one, bit for bit.'
  rows = []
  if may_mount(runs):
    refused = 'One line and status 2; nothing is lost.'
    rows += [
      row('the disk fills up in mid-run', ends, full_disk, 6),
      row('the checkpoints turn read-only in mid-run', ends, turns_read_only, 3),
      row('a read-only workdir', refused, read_only, 2),
    ]
  rows += [row('files may not grow in mid-run', ends, file_limit, 4)]
  for kind in DAMAGE:
    trial = functools.partial(damaged, kind=kind)
    rows.append(row(f'newest checkpoint: {kind}', falls, trial, 3, damaged.__doc__))
  rows += [
    row(
      'every checkpoint damaged',
      'The run refuses to start, each time, and never begins at step 0; nothing is moved.',
      none_whole,
      3,
    ),
    row(
      'metrics.jsonl cut in mid-line',
      'The run goes on, and every step is logged once.',
      metrics_cut,
      4,
    ),
    row(
      'two runs in a workdir on a disk',
      'The second ends at once with one line and status 2; the first ends as if alone; one that was killed with -9 '
      'can be started again at once.',
      two_runs,
      4,
    ),
    row(
      'two runs in a workdir on shared storage',
      'The newest owns the workdir: the older one ends with one line and status 2 before its next save; the end is '
      'the undisturbed one.',
      two_runs_shared,
      4,
    ),
    row('a clock that jumps', 'Nothing changes, and throughput stays true.', clock, 3),
    row(
      'export without the training machine',
      'One device and none of the data libraries are enough.',
      export_elsewhere,
      2,
    ),
  ]
  return rows + hostile.faults(runs.folder / 'hostile')


def main() -> None:
  """Runs the chosen faults; exit status 1 where a promise was broken."""
  parser = common.parser(__doc__, __file__)
  flags = parser.parse_args()
  runs = Runs(flags.workdir)
  runs.folder.mkdir(parents=True, exist_ok=True)
  runs.prepare()
  common.main(faults(runs), flags, WHAT)


if __name__ == '__main__':
  report.main(main)
