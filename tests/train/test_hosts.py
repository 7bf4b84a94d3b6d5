"""Several real processes on the CPU, over gloo: one run, whatever the number of processes and devices."""

import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A recipe that compiles in seconds. A batch of 16 is two images a device on 8; 40 test images need padding.
STEPS = 8
SMALL = (
  '--config=configs/vit_b.py:smoke,data=synthetic',
  f'--config.total_steps={STEPS}',
  '--config.image_size=16',
  '--config.data.test_resize=18',
  '--config.data.limit=40',
  '--config.model.width=24',
  '--config.model.heads=2',
  '--config.model.drop_path=0.3',
  '--config.projection.hidden=32',
  '--config.projection.bottleneck=16',
  '--config.projection.outputs=24',
  '--config.views.view_1.blur_sigma=(0.1,0.5)',
  '--config.views.view_2.blur_sigma=(0.1,0.5)',
  '--config.evaluation.at_start=False',
  '--config.evaluation.knn=(1,5)',
  '--config.evaluation.knn_headline=5',
)


class Hosts:
  """The processes of one run of main, each with so many CPU devices, started together; `last`: more for the last."""

  def __init__(
    self,
    cache: pathlib.Path,
    processes: int,
    devices: int,
    *flags: str,
    last: tuple[str, ...] = (),
  ):
    with socket.create_server(('127.0.0.1', 0)) as listener:
      port = listener.getsockname()[1]
    flag = f'--xla_force_host_platform_device_count={devices}'
    environment = {
      **os.environ,
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}',
      'PYTHONPATH': str(ROOT),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.all = []
    for process in range(processes):
      places = [f'--coordinator=127.0.0.1:{port}', f'--processes={processes}']
      places = [*places, f'--process={process}', '--meeting_seconds=60'] if processes > 1 else []
      command = [sys.executable, '-m', 'folk_jax.main', *flags, *places]
      command.append(f'--config.compilation_cache={cache}')
      command += last if process == processes - 1 else ()
      self.all.append(
        subprocess.Popen(
          command,
          cwd=ROOT,
          env=environment,
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )

  def end(self, seconds: float = 240) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    said = []
    try:
      for process in self.all:
        out, err = process.communicate(timeout=seconds)
        said.append((process.returncode, out, err))
    finally:
      for process in self.all:
        process.kill()
    return said


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """`run(processes, devices, *flags)` starts main; all runs share a compilation cache."""
  cache = tmp_path_factory.mktemp('cache')
  return functools.partial(Hosts, cache)


def metrics(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
  """What metrics.jsonl says, by step; a step that stands there twice fails."""
  steps = {}
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    known = steps.setdefault(record.pop('step'), {})
    assert not known.keys() & record.keys()
    known |= record
  return steps


def same(found: dict[str, float], expected: dict[str, float]) -> None:
  """Equal but for the order of float32 sums over 16 images and a few thousand parameters, and for what clocks say.

  Rounding of 1e-7 a step moves the parameters of the next, and what was measured by the eighth is below 1e-5. A wrong
  row, draw or mean moves the first digits.
  """
  names = [n for n in expected if not re.search('second|data_wait|goodput', n)]
  assert set(names) <= found.keys()
  for name in names:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope='module')
def runs(run, tmp_path_factory):
  """Workdirs: of one process with one device, and of two with four each; and what the two said."""
  folder = tmp_path_factory.mktemp('runs')
  one = run(1, 1, *SMALL, f'--workdir={folder}/one')
  (status, _, err) = one.end()[0]
  assert status == 0, err
  two = run(2, 4, *SMALL, f'--workdir={folder}/two').end()
  assert [status for status, _, _ in two] == [0, 0], two[0][2] + two[1][2]
  return folder / 'one', folder / 'two', two


@pytest.mark.slow
def test_two_processes_train_and_judge_as_one_does(runs):
  one, two, _ = runs
  expected, found = metrics(one), metrics(two)
  assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
  assert 'train/loss_distillation' in expected[1] and 'eval/knn_top1' in expected[STEPS]
  for step, values in expected.items():
    same(found[step], values)


@pytest.mark.slow
def test_one_process_speaks_and_writes(runs):
  _, two, ((_, out, err), other) = runs
  assert f'done: {STEPS} steps in' in out and f'step {STEPS}/{STEPS}' in err
  status, out, err = other
  assert (status, err) == (0, '')
  assert 'step' not in out and 'kNN' not in out  # gloo prints there itself, past Python
  assert len(list((two / 'tensorboard').iterdir())) == 1
  # Nothing is left of how the processes made sure that they share the workdir.
  assert {path.name for path in two.iterdir()} == {
    'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints'
  }  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_both_and_one_process_goes_on(runs, run, tmp_path):
  """With the data and the draws of the uninterrupted run, on another number of devices."""
  workdir = tmp_path / 'run'
  # An evaluation and a save at each step leave time for a signal, of which jax looks for one a second.
  slow = ('--config.eval_every=1', '--config.checkpoint.every=1')
  hosts = run(2, 4, *SMALL, *slow, f'--workdir={workdir}')
  wait_for(workdir / 'config.json', hosts)
  hosts.all[1].send_signal(signal.SIGTERM)
  said = hosts.end()
  assert [status for status, _, _ in said] == [143, 143], said
  step = int(re.search(rf'stopped: told to end after step (\d+) of {STEPS}', said[0][2])[1])
  assert max(int(path.name) for path in (workdir / 'checkpoints').iterdir()) == step < STEPS

  ((status, _, err),) = run(1, 8, *SMALL, f'--workdir={workdir}').end()
  assert status == 0, err
  assert f'resuming {workdir} at step {step} of {STEPS}' in err
  found, expected = metrics(workdir), metrics(runs[0])
  assert sorted(found) == sorted(expected)
  for at, values in expected.items():
    same(found[at], values)


def wait_for(file: pathlib.Path, hosts: Hosts) -> None:
  end = time.monotonic() + 120
  while not file.exists():
    assert time.monotonic() < end and all(p.poll() is None for p in hosts.all), hosts.end()
    time.sleep(0.02)


@pytest.mark.slow
def test_processes_that_were_told_different_things(run, tmp_path):
  """Both are told so, before anything is trained or written."""
  said = run(2, 1, *SMALL, f'--workdir={tmp_path}/run', last=('--config.seed=1',)).end(60)
  line = "error: configuration of process 1 differs from process 0's: start all of them alike"
  assert [status for status, _, _ in said] == [2, 2]
  assert [err.splitlines()[-1] for _, _, err in said] == [line, line]
  assert not (tmp_path / 'run').exists()
