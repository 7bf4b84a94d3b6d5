"""What happens at the start and at the end of a run: processes that do not meet, and SIGTERM to all at once."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from folk_jax import distributed
from folk_jax.distributed import leaving
from folk_jax.distributed.cluster import Cluster
from folk_jax.distributed.rendezvous import NotMet
from folk_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = '--config=configs/vit_b.py:smoke,data=synthetic'
# Compiles in seconds; far more steps than a test waits for.
SMALL = (
  RECIPE,
  '--config.total_steps=100000',
  '--config.image_size=16',
  '--config.data.test_resize=18',
  '--config.data.limit=40',
  '--config.data.workers=1',
  '--config.model.width=24',
  '--config.model.heads=2',
  '--config.model.depth=1',
  '--config.projection.hidden=32',
  '--config.projection.bottleneck=16',
  '--config.projection.outputs=24',
  '--config.views.view_1.blur_sigma=(0.1,0.5)',
  '--config.views.view_2.blur_sigma=(0.1,0.5)',
  '--config.eval_every=0',
  '--config.evaluation.at_start=False',
  '--config.log_every=1',
)


def start(*command: str | pathlib.Path) -> subprocess.Popen:
  """A Python program at the head of a process group of its own."""
  return subprocess.Popen(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def ended(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str, str]:
  """Its status, stdout and stderr; nothing of its group is left behind."""
  try:
    out, err = process.communicate(timeout=seconds)
  finally:
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
  return process.returncode, out, err


@pytest.fixture
def initialize(monkeypatch):
  """`initialize(error)` puts what raises it, or notes whether SIGTERM is jax's, in the place of jax's own."""
  before = {
    'jax_cpu_enable_async_dispatch': jax.config.read('jax_cpu_enable_async_dispatch'),
    'jax_enable_preemption_service': jax.config.jax_enable_preemption_service,
  }
  heeded = []

  def put(error: Exception | None) -> list[bool]:
    def stand_in(**_):
      heeded.append(jax.config.jax_enable_preemption_service)
      if error:
        raise error

    monkeypatch.setattr(jax.distributed, 'initialize', stand_in)
    return heeded

  yield put
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(
  'error, expected, words',
  [
    # A slice that comes late: jax says so of the coordinator's name, and of its service.
    (RuntimeError('Failed to recognize coordinator\naddress a'), NotMet, 'coordinator address a$'),
    (ValueError('coordinator_address should be defined.'), UserError, 'package.s extra tpu$'),
  ],
)
def test_what_jax_says_of_those_it_cannot_join(error, expected, words, initialize):
  initialize(error)
  with pytest.raises(expected, match=words) as raised:
    with distributed.joined(Cluster('GKE')):
      pass
  assert str(raised.value).startswith('GKE says that this is one of several processes, but jax')


@pytest.mark.parametrize('heeds', [True, False])
def test_jax_takes_sigterm_where_somebody_looks(heeds, initialize):
  heeded = initialize(None)
  with distributed.joined(Cluster('GKE'), heed_signals=heeds):
    pass
  assert heeded == [heeds]


def test_main_says_in_one_line_who_did_not_come_and_may_be_started_again(tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as closed:
    port = closed.getsockname()[1]
  places = (
    f'--coordinator=127.0.0.1:{port}',
    '--processes=2',
    '--process=1',
    '--meeting_seconds=1',
  )
  status, _, err = ended(start('-m', 'folk_jax.main', RECIPE, f'--workdir={tmp_path}/run', *places))
  assert status == 1
  (line,) = err.splitlines()
  assert line.startswith(
    f'error: process 1 could not meet process 0 at 127.0.0.1:{port} within 1 s'
  )


@pytest.mark.parametrize('task, heeds', [('pretrain', True), ('evaluate', False)])
def test_only_training_heeds_sigterm(task, heeds, tmp_path):
  script = tmp_path / 'looks.py'
  script.write_text(
    'import signal\n'
    'from folk_jax import cli, main\n'
    'def look(config, workdir):\n'
    '  print(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)\n'
    'main.TASKS.update(pretrain=look, evaluate=look)\n'
    'cli.run(main.main)\n'
  )
  said = ended(start(script, RECIPE, f'--config.task={task}', f'--workdir={tmp_path}/run'))
  assert said[:2] == (0, f'{heeds}\n'), said


WORKER = """
import multiprocessing, os, sys, time
from folk_jax.data import transport

def work(pipe):
  transport.set_worker(0, 1)
  pipe.send(os.getpid())
  time.sleep(600)

if __name__ == '__main__':
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe()
  worker = context.Process(target=work, args=(there,), daemon=True, name='grain-worker')
  worker.start()
  print(here.recv(), flush=True)
  sys.stdin.readline()
  worker.terminate()
  worker.join(0.5)
  print(worker.is_alive(), flush=True)
  sys.stdin.readline()
"""


@pytest.mark.parametrize('killed', [False, True])
def test_a_loaders_worker_leaves_sigterm_to_its_parent_and_ends_with_it(killed, tmp_path):
  script = tmp_path / 'parent.py'
  script.write_text(WORKER)
  parent = subprocess.Popen(
    [sys.executable, script],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    worker = int(parent.stdout.readline())
    parent.stdin.write('\n')
    parent.stdin.flush()
    assert parent.stdout.readline() == 'True\n'
    if killed:
      parent.kill()
    else:
      parent.stdin.write('\n')
      parent.stdin.close()
    # Not the time that multiprocessing would wait for it: for ever.
    assert parent.wait(10) == (-signal.SIGKILL if killed else 0)
    assert leaving.within(5, lambda: not is_running(worker))
  finally:
    parent.kill()
    parent.wait()
    parent.stdout.close()
    if not parent.stdin.closed:
      parent.stdin.close()


def children(pid: int) -> list[int]:
  """The loader's workers of a process."""
  found = []
  for thread in pathlib.Path(f'/proc/{pid}/task').iterdir():
    found += map(int, (thread / 'children').read_text().split())
  return [
    one for one in found if b'spawn_main' in pathlib.Path(f'/proc/{one}/cmdline').read_bytes()
  ]


def is_running(pid: int) -> bool:
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
  except OSError:
    return False


@pytest.mark.slow
def test_sigterm_to_every_process_of_a_run_saves_it(tmp_path):
  """As Slurm and systemd send it: the loader's worker gets it too, while the run waits for a batch, and makes it."""
  workdir = tmp_path / 'run'
  run = start('-m', 'folk_jax.main', *SMALL, f'--workdir={workdir}')
  try:
    written = workdir / 'metrics.jsonl'
    assert leaving.within(60, lambda: written.exists() and written.read_text())
    workers = children(run.pid)
    for worker in workers:
      os.kill(worker, signal.SIGSTOP)
    lines = -1
    while lines < (lines := len(written.read_text().splitlines())):
      time.sleep(1)  # Until it has used up what was made before: a step takes milliseconds.
    os.killpg(run.pid, signal.SIGTERM)
    for worker in workers:
      os.kill(worker, signal.SIGCONT)
  finally:
    status, _, err = ended(run)
  assert len(workers) == 1
  assert status == 143, err
  assert 'stopped: told to end after step ' in err.splitlines()[-1] and 'Traceback' not in err
  assert [path.name for path in (workdir / 'checkpoints').iterdir()]
