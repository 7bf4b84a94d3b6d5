"""folk_jax.main to whose storage, or clock, something happens: FAULT=kind:step:argument in the environment.

The kinds are the functions below. Step 0 is before anything is imported that matters; any other is right after that
step's metrics are logged.
"""

import os
import random
import resource
import signal
import subprocess
import time

_KILOBYTE = 1024


def fill(folder: str, left: str) -> None:
  """Fills the disk of `folder` but for so many kilobytes."""
  file = os.path.join(folder, 'filler')
  with open(file, 'wb', buffering=0) as filler:
    try:
      while True:
        filler.write(bytes(64 * _KILOBYTE))
    except OSError:
      pass
    filler.truncate(max(filler.tell() - int(left) * _KILOBYTE, 0))


def limit(kilobytes: str) -> None:
  """No file may grow beyond this: what a full disk is to those who may mount none."""
  size = int(kilobytes) * _KILOBYTE
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def read_only(folder: str) -> None:
  """`folder` takes no writes any more: a disk that is read-only is mounted over it."""
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', folder], check=True)


def clock(seed: str) -> None:
  """The clock jumps by up to ten years, back and forth, at every tenth look on average."""
  draws, look, jump = random.Random(int(seed)), time.time, [0.0]

  def jumping() -> float:
    if draws.random() < 0.1:
      jump[0] = draws.uniform(-3e8, 3e8)
    return look() + jump[0]

  time.time = jumping
  time.time_ns = lambda: int(jumping() * 1e9)


def shared() -> None:
  """The workdir looks like one on a network file system."""
  from folk_jax.train import lock

  lock.on_this_machine = lambda path: False


def held_up(step: str) -> None:
  """As `shared`, and the process stops once that step's metrics are logged."""
  shared()
  from folk_jax.train import metrics

  write = metrics.MetricWriter.write

  def write_and_stop(self, at, scalars):
    write(self, at, scalars)
    if at == int(step) and 'train/loss' in scalars:
      os.kill(os.getpid(), signal.SIGSTOP)

  metrics.MetricWriter.write = write_and_stop


KINDS = {one.__name__: one for one in (fill, limit, read_only, clock, shared, held_up)}


def main() -> None:
  """Runs folk_jax.main with the fault that FAULT names."""
  kind, step, *arguments = os.environ['FAULT'].split(':')
  if step == '0':
    KINDS[kind](*arguments)
  from folk_jax import cli
  from folk_jax import main as command

  if step != '0':
    from folk_jax.train import metrics

    write = metrics.MetricWriter.write

    def write_and_break(self, at, scalars):
      write(self, at, scalars)
      if at == int(step) and 'train/loss' in scalars:
        KINDS[kind](*arguments)

    metrics.MetricWriter.write = write_and_break
  cli.run(command.main)


if __name__ == '__main__':
  main()
