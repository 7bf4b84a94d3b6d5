"""kill -9, a hundred times: every restart goes on from a whole checkpoint, to the undisturbed run's end, bit for bit.

  python benchmarks/faults/kill.py
  python benchmarks/faults/kill.py --times=3 --out=/tmp/kill.json --workdir=/tmp/kill

A tiny run on the CPU is killed ten times, then let to its end and compared with a run that nobody disturbed: every
array of the final checkpoint (parameters, optimiser, teacher, centre, step) bit for bit, and the numbers in
metrics.jsonl, each logged step exactly once. After each kill the newest checkpoint is read whole.

When to kill is drawn from (--seed, kind of fault, number of the trial), the stage of the run first: its imports, what
it restores and compiles, its steps, its saves, each within the time that it took in earlier starts. At which stage a
kill fell is read from what the run left, and counted in the row (`stages`). A kill in the middle of a save is one that
leaves a temporary folder of Orbax's behind: one that came too early or too late is made, but not counted. Started again
with the same command, the script goes on where it stood, in the middle of a run too.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import children
import common
import report

WHAT = 'runs that are killed'
STEPS, EVERY = 120, 4
FLAGS = (*children.TINY, f'--config.total_steps={STEPS}', f'--config.checkpoint.every={EVERY}')
# So many kills in one run, which then ends and is compared.
KILLS = 10
_TEMPORARY = 'orbax-checkpoint-tmp'
_PATIENCE_SECONDS = 600
_TRIES = 30
IMPORTS, OPENING, STEP, SAVE = STAGES = ('imports', 'restore or compile', 'steps', 'save')


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of kill.

  Attributes:
    asynchronous: whether checkpoints are written in the background.
    saving: whether the kill must fall into a save.
  """

  asynchronous: bool
  saving: bool

  @property
  def name(self) -> str:
    how = 'in the background' if self.asynchronous else 'that the run waits for'
    return f'kill -9 in the middle of a save {how}' if self.saving else 'kill -9 at any moment'


KINDS = (Kind(True, False), Kind(True, True), Kind(False, True))
TIMES = {KINDS[0]: 40, KINDS[1]: 30, KINDS[2]: 30}


class Killer:
  """Trials of one kind, in a folder of their own."""

  def __init__(self, kind: Kind, folder: pathlib.Path, reference: pathlib.Path, seed: int):
    self._kind, self._reference, self._seed = kind, reference, seed
    self._folder = folder / kind.name.replace(' ', '_')
    self._run = self._folder / 'run'
    self._count = self._folder / 'kills'
    self._cache = folder / 'cache'
    # Seconds from the start to the lock on the workdir, and to the first step, as last measured.
    self._moments = self._folder / 'moments.json'
    self.stage = ''  # Of the last kill.

  def __call__(self, number: int) -> str:
    """One kill; after the tenth of a run, its end."""
    draw = random.Random(f'{self._seed} {self._kind.name} {number}')
    self._folder.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
      before = children.steps_on_disk(self._run)[-1:]
      if self._ended_by_itself(draw, number):
        if lost := self._compared():
          return lost
        continue
      if lost := self._kept(before):
        return lost
      if not self._kind.saving or self._temporary():
        break
    else:
      raise RuntimeError(f'{_TRIES} kills in a row did not fall into a save')
    kills = 1 + (int(self._count.read_text()) if self._count.exists() else 0)
    self._count.write_text(str(kills))
    return self._finished() if kills >= KILLS else ''

  def _start(self) -> subprocess.Popen:
    flags = (*FLAGS, f'--config.checkpoint.asynchronous={self._kind.asynchronous}')
    with (self._folder / 'log').open('w', encoding='utf-8') as said:
      return children.start(self._run, *flags, cache=self._cache, stdout=said, stderr=said)

  def _ended_by_itself(self, draw: random.Random, number: int) -> bool:
    """Starts the run and kills it; whether it came to its end before that."""
    resumed_from = max(children.steps_on_disk(self._run), default=0)
    process, began = self._start(), time.time()

    def ended() -> bool:
      return process.poll() is not None

    def opened() -> bool:
      return self._opened(process) or ended()

    def stepped() -> bool:
      return self._stepped(began, resumed_from) or ended()

    try:
      moments = json.loads(self._moments.read_text()) if self._moments.exists() else {}
      # By turns, so that few trials have them all; the first start is measured.
      stage = STAGES[number % len(STAGES)] if moments else STEP
      if self._kind.saving:
        stage = SAVE
      if stage == IMPORTS:
        children.within(draw.uniform(0, moments['opened']), ended)
      else:
        self._await(opened, 'lock')
        moments['opened'] = time.time() - began
        if stage == OPENING and 'first step' in moments:
          children.within(draw.uniform(0, moments['first step'] - moments['opened']), ended)
        else:
          self._await(stepped, 'step')
          moments['first step'] = time.time() - began
          if stage == SAVE:
            self._await_save(draw, process)
          else:
            children.within(draw.uniform(0, 2), ended)
            # Between saves, which take most of the time of steps so short.
            children.within(5, lambda: not self._temporary() or ended(), pause=0.0005)
          self._moments.write_text(json.dumps(moments))
      status = process.poll()
    finally:
      children.kill(process)
    if status:
      raise RuntimeError(f'the run ended with status {status}: {self._said()}')
    self.stage = self._stage(process, began, resumed_from)
    return status == 0

  def _await(self, condition: Callable[[], bool], what: str) -> None:
    if not children.within(_PATIENCE_SECONDS, condition):
      raise RuntimeError(f'no {what} in {_PATIENCE_SECONDS} s: {self._said()}')

  def _opened(self, process: subprocess.Popen) -> bool:
    """Whether the process, all of its imports done, has taken the workdir."""
    lock = self._run / 'lock'
    return lock.exists() and f'process {process.pid} on' in lock.read_text(encoding='utf-8')

  def _stepped(self, began: float, resumed_from: int) -> bool:
    """Whether a step is done; a temporary folder that is older has been removed by then.

    What an earlier start logged beyond its last checkpoint goes when the file is opened, which makes it a newer file.
    """
    metrics = self._run / 'metrics.jsonl'
    if not metrics.exists() or metrics.stat().st_mtime <= began:
      return False
    lines = metrics.read_text(encoding='utf-8').splitlines(keepends=True)
    whole = [line for line in lines if line.endswith('\n')]
    return bool(whole) and json.loads(whole[-1])['step'] > resumed_from

  def _stage(self, process: subprocess.Popen, began: float, resumed_from: int) -> str:
    """At which stage the run was killed, by what it has left."""
    if self._stepped(began, resumed_from):
      return SAVE if self._temporary() else STEP
    return OPENING if self._opened(process) else IMPORTS

  def _await_save(self, draw: random.Random, process: subprocess.Popen) -> None:
    """Waits for one of the next saves, and for a moment in it."""
    seen: set[str] = set()
    wanted = draw.randint(1, 5)
    pause = draw.choice((0, 0.002, 0.01, 0.03))

    def begun() -> bool:
      seen.update(self._temporary())
      return len(seen) >= wanted or process.poll() is not None

    children.within(_PATIENCE_SECONDS, begun, pause=0.0005)
    time.sleep(pause)

  def _temporary(self) -> list[str]:
    """Names of the folders of saves that are not complete."""
    folder = self._run / 'checkpoints'
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [name for name in found if _TEMPORARY in name]

  def _said(self) -> str:
    return ' '.join((self._folder / 'log').read_text(encoding='utf-8').split())[-600:]

  def _kept(self, before: list[int]) -> str:
    """'' where the newest checkpoint after a kill is whole and not behind the newest before it."""
    steps = children.steps_on_disk(self._run)
    if before and steps[-1:] < before:
      return f'the newest checkpoint was {before[0]} and is {steps[-1:]}'
    if steps:
      saved = children.state(self._run)
      found = [int(array) for name, array in saved.items() if name == "['step']"]
      if found != [steps[-1]]:
        return f'checkpoint {steps[-1]} holds step {found}'
    return ''

  def _finished(self) -> str:
    """Lets the run come to its end."""
    process = self._start()
    status, _, _ = children.end(process, 2 * _PATIENCE_SECONDS)
    if status:
      return f'the run ended with status {status} after the kills: {self._said()}'
    return self._compared()

  def _compared(self) -> str:
    """Compares a run that has ended with the one that nobody disturbed, and makes room for the next."""
    lost = children.lost(self._run, self._reference, range(1, STEPS + 1))
    if lost:
      self._run.rename(self._run.with_name(f'lost_{int(time.time())}'))  # To be looked at.
    else:
      shutil.rmtree(self._run)
    self._count.unlink(missing_ok=True)
    return lost


def reference(folder: pathlib.Path) -> pathlib.Path:
  """The workdir of a run that nobody disturbs; made where it is missing, and compiled programs with it."""
  workdir = folder / 'reference'
  if children.steps_on_disk(workdir)[-1:] != [STEPS]:
    shutil.rmtree(workdir, ignore_errors=True)
    status, _, err = children.end(children.start(workdir, *FLAGS, cache=folder / 'cache'), 1200)
    if status:
      raise RuntimeError(f'the undisturbed run ended with status {status}: {err[-600:]}')
  return workdir


def faults(folder: pathlib.Path, seed: int) -> list[common.Fault]:
  """The kinds of kill; the undisturbed run is made at the first trial."""
  killer = functools.cache(lambda kind: Killer(kind, folder, reference(folder), seed))
  moments = {
    False: 'A tiny run is killed at a random moment of its imports, of its start, of its steps or of a save, by turns',
    True: 'A tiny run is killed while a temporary folder of a checkpoint is there',
  }
  return [
    common.Fault(
      kind.name,
      'Every restart goes on from a whole checkpoint, and the final state equals the undisturbed run bit for bit.',
      f'{moments[kind.saving]}; after {KILLS} kills it ends, and all arrays and logged numbers are compared.',
      lambda number, kind=kind: killer(kind)(number),
      TIMES[kind],
      lambda kind=kind: killer(kind).stage,
    )
    for kind in KINDS
  ]


def parse() -> argparse.Namespace:
  parser = common.parser(__doc__, __file__)
  parser.add_argument('--seed', type=int, default=0, help='of the moments (default 0)')
  flags = parser.parse_args()
  flags.workdir = flags.workdir.absolute()
  return flags


def main() -> None:
  """Runs the chosen kinds; exit status 1 where something was lost."""
  flags = parse()
  common.main(faults(flags.workdir, flags.seed), flags, WHAT)


if __name__ == '__main__':
  report.main(main)
