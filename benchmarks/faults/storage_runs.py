"""The runs that storage.py disturbs: small, on small disks, and compared with one that nothing disturbed."""

import contextlib
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import children

STEPS, EVERY = 8, 2
FLAGS = (
  *children.TINY,
  f'--config.total_steps={STEPS}',
  f'--config.checkpoint.every={EVERY}',
  '--config.checkpoint.keep=9',
  '--config.eval_every=0',
)
LOGGED = range(1, STEPS + 1)
_DISK_MEGABYTES = 24


class Runs:
  """The runs of the trials: where they are made, what they share, and the one that nothing disturbed."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder.absolute()
    self.cache = self.folder / 'cache'
    self.reference = self.folder / 'reference'

  def prepare(self) -> None:
    """Runs the reference, where it is not there."""
    if children.steps_on_disk(self.reference)[-1:] == [STEPS]:
      return
    status, said = self.run(self.reference)
    assert status == 0, said

  def fresh(self, name: str) -> pathlib.Path:
    """A workdir's path where nothing is."""
    path = self.folder / name
    shutil.rmtree(path, ignore_errors=True)
    return path

  def started(self, workdir: pathlib.Path, fault: str = '', *flags: str) -> subprocess.Popen:
    """A run, with a fault as storage_child.py takes it."""
    if not fault:
      return children.start(workdir, *FLAGS, *flags, cache=self.cache)
    program = str(pathlib.Path(__file__).with_name('storage_child.py'))
    environment = {'FAULT': fault}
    return children.start(
      workdir, *FLAGS, *flags, cache=self.cache, program=(program,), environment=environment
    )

  def run(self, workdir: pathlib.Path, fault: str = '', *flags: str) -> tuple[int, list[str]]:
    """Exit status, and the lines on stderr."""
    status, _, said = children.end(self.started(workdir, fault, *flags), seconds=900)
    return status, said.strip().splitlines()

  def copied(self, name: str, last: int) -> pathlib.Path:
    """The reference as it was when step `last` had been saved."""
    workdir = self.fresh(name)
    shutil.copytree(self.reference, workdir)
    for step in children.steps_on_disk(workdir):
      if step > last:
        shutil.rmtree(workdir / 'checkpoints' / str(step))
    return workdir

  def resumed(self, workdir: pathlib.Path) -> str:
    """Starts the run again; '' where it ends as the reference did."""
    status, said = self.run(workdir)
    return self.ended(workdir, status, said)

  def ended(self, workdir: pathlib.Path, status: int, said: list[str]) -> str:
    """'' where a run ended well, and as the reference did."""
    if status:
      return f'the run ended with status {status}: {said[-1:]}'
    return children.lost(workdir, self.reference, LOGGED)


def refusal(status: int, said: list[str], *words: str) -> str:
  """'' where a run ended with status 2 and one line of stderr that has the words."""
  if status != 2:
    return f'status {status}, expected 2: {said[-1:]}'
  if len(said) != 1:
    return f'{len(said)} lines on stderr, expected one: {said[:3]}'
  missing = [word for word in words if word not in said[0]]
  return f'the line lacks {missing}: {said[0]}' if missing else ''


@contextlib.contextmanager
def disk(runs: Runs) -> Iterator[pathlib.Path]:
  """A disk of some megabytes, mounted for as long as it takes."""
  point = runs.fresh('disk')
  point.mkdir(parents=True)
  size = f'size={_DISK_MEGABYTES}m'
  subprocess.run(['mount', '-t', 'tmpfs', '-o', size, 'tmpfs', str(point)], check=True)
  try:
    yield point
  finally:
    subprocess.run(['umount', '-l', str(point)], check=True)


def may_mount(runs: Runs) -> bool:
  """Whether this process may mount disks."""
  try:
    with disk(runs):
      return True
  except (OSError, subprocess.CalledProcessError):
    return False
