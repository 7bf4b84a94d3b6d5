"""SIGTERM and SIGINT to real processes: the first is a save and a status, the second leaves at once."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import children  # noqa: E402  # Programs are found where they are run from, and tests are no package.

# More than what a launcher that passes a signal on needs, which counts as one signal (distributed/signals.py).
PAUSE_SECONDS = 0.4

# What stands in for a phase that lasts: says that it has begun, and would take ten minutes.
SCRIPT = """
import os, pathlib, time
from folk_jax import cli, main

def for_minutes(what):
  print(what, flush=True)
  time.sleep(600)

def save():
  from folk_jax.train import loop
  rename = os.rename
  def slow(source, target, *rest, **named):
    if pathlib.Path(target).parent.name == 'checkpoints' and pathlib.Path(target).name == '4':
      for_minutes('saving')
    return rename(source, target, *rest, **named)
  os.rename = os.replace = slow
  return loop.pretrain

def evaluation():
  from folk_jax.train import evaluation, loop
  evaluation.Evaluation.__call__ = lambda self, state, due: for_minutes('evaluating')
  return loop.pretrain

def compilation():
  import jax
  def compiles(config, workdir):
    # Half a minute of XLA's time, in which no instruction of Python's is run in the main thread.
    def long(x):
      for _ in range(600):
        x = jax.numpy.sort(x @ x, axis=0)
      return x
    lowered = jax.jit(long).lower(jax.numpy.ones((64, 64)))
    print('compiling', flush=True)
    lowered.compile()
    print('compiled', flush=True)
    time.sleep(600)
  return compiles

if __name__ == '__main__':
  PHASE = {'saving': save, 'evaluating': evaluation, 'compiling': compilation}[os.environ['PHASE']]
  main.TASKS['pretrain'] = lambda config, workdir: PHASE()(config, workdir)
  cli.run(main.main)
"""


def program(script: pathlib.Path, *flags: str, **environment: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, str(script), *flags],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return children.shared_cache(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_ctrl_c_saves_and_says_that_it_was_no_preemption(cache, tmp_path):
  """To all processes of the terminal, the loader's workers among them, as a terminal sends it; then it goes on."""
  workdir = tmp_path / 'run'
  flags = (*children.TINY_TOTAL, '--config.checkpoint.every=0', '--config.eval_every=0')
  run = children.start(workdir, *flags, '--config.data.workers=1', cache=cache)
  try:
    written = workdir / 'metrics.jsonl'
    assert children.within(240, lambda: written.exists() and written.read_text().count('\n') > 3)
    os.killpg(run.pid, signal.SIGINT)
  finally:
    status, _, err = children.end(run)
  assert status == 130, err
  (step,) = children.steps_on_disk(workdir)
  lines = err.strip().splitlines()
  assert (
    lines[-1]
    == f'stopped: told to end after step {step} of {children.TOTAL}; the same command goes on from there'
  )
  assert lines[-2].startswith(
    'interrupted: this step ends and is saved; Ctrl-C again leaves at once'
  )
  assert len(lines) == 2, err
  logged, twice = children.metrics(workdir)
  assert not twice and sorted(logged) == list(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
  'phase, signals, status',
  [
    ('saving', (signal.SIGTERM, signal.SIGTERM), 143),
    ('evaluating', (signal.SIGINT, signal.SIGINT), 130),
    # A person's word counts, whoever else has said something.
    ('compiling', (signal.SIGTERM, signal.SIGINT), 130),
  ],
)
def test_a_second_signal_leaves_at_once(phase, signals, status, cache, tmp_path):
  """Whatever the run is at; the checkpoint before stays whole."""
  script, workdir = tmp_path / 'script.py', tmp_path / 'run'
  script.write_text(SCRIPT)
  flags = (
    *children.TINY_TOTAL, f'--workdir={workdir}', f'--config.compilation_cache={cache}',
    '--config.eval_every=3', '--config.checkpoint.every=2', '--config.checkpoint.asynchronous=False',
  )  # fmt: skip
  if phase == 'saving':
    flags += ('--config.eval_every=0',)
  run = program(script, *flags, PHASE=phase, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  try:
    assert run.stdout.readline() == f'{phase}\n', run.communicate()
    run.send_signal(signals[0])
    time.sleep(PAUSE_SECONDS)
    assert run.poll() is None
    run.send_signal(signals[1])
    sent = time.monotonic()
    assert run.wait(30) == status
    # What it waits for would take more than half a minute; leaving takes a moment, also on a busy machine.
    assert time.monotonic() - sent < 10
  finally:
    _, out, err = children.end(run)
  lines = [line for line in err.splitlines() if line]
  assert 'this step ends and is saved' in lines[0] and lines[1].startswith(
    'told again: leaving at once'
  )
  assert out == '' and 'Traceback' not in err
  if phase == 'compiling':
    return
  assert children.steps_on_disk(workdir) == [2]
  assert int(children.state(workdir)["['step']"]) == 2
  unfinished = [path.name for path in (workdir / 'checkpoints').iterdir() if path.name != '2']
  assert bool(unfinished) == (phase == 'saving')


# Two processes that take steps until they are told to end, or one long one.
HOSTS = """
import sys, time
from folk_jax import distributed
from folk_jax.distributed.cluster import Cluster

if __name__ == '__main__':
  port, process, long = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'long'
  with distributed.joined(Cluster('flags', f'127.0.0.1:{port}', 2, process)):
    step = 0
    while not distributed.preempted(step):
      step += 1
      if step == 5:
        print('stepping', file=sys.stderr, flush=True)
        time.sleep(600 * long)
      time.sleep(0.01)
    sys.exit(distributed.Preempted('').status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  'long, to_first, to_second, statuses',
  [
    # One is told, and both leave after the same step, both with the status that says by whom.
    (False, [signal.SIGINT], [], [130, 130]),
    # In the middle of a step, as Slurm does at a time limit: once to all, and later again.
    (True, [signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [143, 143]),
  ],
)
def test_signals_to_several_processes(long, to_first, to_second, statuses, tmp_path):
  script = tmp_path / 'hosts.py'
  script.write_text(HOSTS)
  with socket.create_server(('127.0.0.1', 0)) as listener:
    port = str(listener.getsockname()[1])
  hosts = [program(script, port, str(i), 'long' if long else 'short') for i in range(2)]
  try:
    for host in hosts:
      assert 'stepping\n' in host.stderr  # Reads on until it is there.
    for number in range(max(len(to_first), len(to_second))):
      for host, numbers in zip(hosts, (to_first, to_second), strict=True):
        if number < len(numbers):
          host.send_signal(numbers[number])
      time.sleep(PAUSE_SECONDS)
    # jax passes a notice on within two seconds.
    assert [host.wait(60) for host in hosts] == statuses
  finally:
    for host in hosts:
      children.end(host)
