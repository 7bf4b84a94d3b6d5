"""The launch scripts: what they say, what they refuse, and what they would run, with the clouds' tools replaced."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / 'launch'
RUN = ('--', '--config=configs/vit_b.py:data=folder,path="/a b,c"', '--workdir=gs://bucket/run')
POD = ('--name=folk', '--zone=us-west4-a')
GKE = ('--name=folk', '--image=registry/folk:tpu', '--topology=4x4')


def bash(*command: str | pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ['bash', *map(str, command)],
    cwd=ROOT,
    env={'PATH': os.environ['PATH'], 'HOME': os.environ.get('HOME', '/'), **environment},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def printed(script: str, *arguments: str, **environment: str) -> list[list[str]]:
  """The commands that a dry run prints, as lists of words."""
  done = bash(LAUNCH / script, *arguments, '--dry-run', *RUN, **environment)
  assert done.returncode == 0, done.stderr
  lines = re.split(r'^\+ ', done.stdout, flags=re.MULTILINE)[1:]
  return [unquoted(line) for line in lines]


def unquoted(line: str) -> list[str]:
  """The words of a line that bash printed with %q; its $'...' is beyond shlex."""
  script = 'eval "words=($1)"; printf "%s\\0" "${words[@]}"'
  done = bash('-c', script, 'bash', line)
  assert done.returncode == 0, done.stderr
  return done.stdout.split('\0')[:-1]


@pytest.mark.parametrize('script', ['gke/submit.sh', 'slurm.sbatch'])
def test_shellcheck_finds_nothing(script):
  shellcheck = pathlib.Path(sys.executable).parent / 'shellcheck'
  done = subprocess.run(
    [shellcheck, '-x', '-P', 'SCRIPTDIR', LAUNCH / script], capture_output=True, text=True, check=False
  )  # fmt: skip
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'gke/submit.sh', 'gpu.sh', 'slurm.sbatch'])
def test_scripts_explain_themselves(script):
  done = bash(LAUNCH / script, '--help')
  assert done.returncode == 0 and done.stderr == ''
  assert done.stdout.startswith('Usage: ') and f'launch/{script} ' in done.stdout
  assert '--dry-run' in done.stdout and 'Example: ' in done.stdout


@pytest.mark.parametrize(
  'script, arguments, words',
  [
    ('tpu_pod.sh', (), 'which command? create, install,'),
    ('tpu_pod.sh', ('destroy',), 'unknown command destroy: expected create,'),
    ('tpu_pod.sh', ('create', '--zone=z', '--type=v5p-8'), '--name=... is missing'),
    ('tpu_pod.sh', ('create', *POD), '--type=... is missing'),
    ('tpu_pod.sh', ('create', *POD, '--type=v9-8', '--dry-run'), '--type=v9-8: no runtime version is known'),
    ('tpu_pod.sh', ('create', *POD, '--type=v4-8', '--slices=two'), '--slices=two is no number'),
    ('tpu_pod.sh', ('create', *POD, '--type=v4-8', '--slices=2', '--direct'), '--direct makes one slice'),
    ('tpu_pod.sh', ('create', *POD, '--tpye=v4-8'), 'unknown argument --tpye=v4-8'),
    ('tpu_pod.sh', ('create', *POD, '--type=v4-8', '--retries=0'), '--retries=0 is no number'),
    ('tpu_pod.sh', ('create', '--name=', '--zone=z'), '--name is empty: write --name=VALUE'),
    ('tpu_pod.sh', ('run', *POD), 'after -- the run needs --config=...'),
    ('tpu_pod.sh', ('run', *POD, '--', '--config=c.py'), 'after -- the run needs --workdir=...'),
    ('tpu_pod.sh', ('stop', *POD, *RUN), 'stop takes no flags of the run'),
    ('gke/submit.sh', ('apply',), 'unknown command apply: expected render,'),
    ('gke/submit.sh', ('render', '--name=Folk_1'), '--name=Folk_1; expected at most 40 lower-case'),
    ('gke/submit.sh', ('render', '--name=folk', *RUN), '--image=... is missing'),
    ('gke/submit.sh', ('render', *GKE, '--topology=4by4', *RUN), '--topology=4by4; expected such as 4x4'),
    ('gke/submit.sh', ('render', *GKE, '--topology=3x3', *RUN), '3x3 has 9 chips, no multiple of'),
    ('gke/submit.sh', ('render', *GKE, '--type=v7', *RUN), 'unknown --type=v7: expected v4,'),
    ('gke/submit.sh', ('render', *GKE, '--', '--config=c.py', '--workdir=runs/x'), 'the workdir must be in a bucket'),
    ('gpu.sh', ('--gpus=a', '--dry-run', *RUN), '--gpus=a; expected numbers such as 0,1'),
    ('gpu.sh', ('--config=c.py',), 'unknown argument --config=c.py: flags of the run stand after --'),
    ('slurm.sbatch', ('--requeues=x', *RUN), '--requeues=x is no number'),
    ('slurm.sbatch', RUN, 'this is no Slurm job: submit it with sbatch'),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line(script, arguments, words):
  done = bash(LAUNCH / script, *arguments)
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.splitlines()
  assert line.startswith(f'{pathlib.Path(script).name}: ') and words in line


def test_create_asks_for_what_was_said():
  (create,) = printed_alone('create', '--type=v5litepod-64', '--spot', '--project=p')
  assert create[:6] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'folk']
  assert {
    '--zone=us-west4-a',
    '--project=p',
    '--accelerator-type=v5litepod-64',
    '--runtime-version=v2-alpha-tpuv5-lite',
    '--node-id=folk',
    '--spot',
    '--valid-until-duration=6h',
  } == set(create[6:])
  (create,) = printed_alone('create', '--type=v6e-16', '--slices=3', '--service-account=a@b')
  assert {'--node-count=3', '--node-prefix=folk', '--service-account=a@b'} < set(create)
  assert '--node-id=folk' not in create
  (create,) = printed_alone('create', '--type=v4-8', '--direct')
  assert create[3:5] == ['tpu-vm', 'create'] and '--version=tpu-ubuntu2204-base' in create


def printed_alone(*arguments: str) -> list[list[str]]:
  """What tpu_pod.sh would run, of a command that takes no flags of the run."""
  done = bash(LAUNCH / 'tpu_pod.sh', arguments[0], *POD, *arguments[1:], '--dry-run')
  assert done.returncode == 0, done.stderr
  return [unquoted(line) for line in re.split(r'^\+ ', done.stdout, flags=re.MULTILINE)[1:]]


def test_every_command_reaches_every_slice():
  nodes = ['folk-0', 'folk-1']
  assert [words[5] for words in printed('tpu_pod.sh', 'run', *POD, '--slices=2')] == nodes
  archive, *rest = printed_alone('install', '--slices=2')
  assert archive[0] == 'git' and archive[-1] == 'HEAD'
  assert [words[4] for words in rest] == ['scp', 'scp', 'ssh', 'ssh']
  assert all('--worker=all' in words for words in rest)
  assert [words[5] for words in printed_alone('status', '--slices=2')] == nodes
  assert [words[5] for words in printed_alone('logs', '--slices=2', '--out=/x')] == nodes
  assert [words[5] for words in printed_alone('stop', '--slices=2')] == nodes
  (delete,) = printed_alone('delete')
  assert delete[3:6] == ['queued-resources', 'delete', 'folk'] and '--force' in delete


@pytest.fixture
def worker(tmp_path):
  """A worker's home: `worker(script)` runs a remote command there; its Python notes what it was given."""
  python = tmp_path / 'folk_jax' / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(
    f'#!{sys.executable}\n'
    'import json, signal, sys, time\n'
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n'
    'json.dump(sys.argv[1:], open("given.tmp", "w"))\n'
    'import os; os.rename("given.tmp", "given.json")\n'
    'time.sleep(60)\n'
  )
  python.chmod(0o755)

  def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ['bash', '-c', script], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )

  run.home = tmp_path / 'folk_jax'
  yield run
  run('kill -9 $(cat folk_jax/run.pid)')


def wait_for(path: pathlib.Path) -> str:
  end = time.monotonic() + 20
  while not (path.exists() and path.read_text()):
    assert time.monotonic() < end, f'{path} never came'
    time.sleep(0.02)
  return path.read_text()


def remote(words: list[str]) -> str:
  (command,) = [word for word in words if word.startswith('--command=')]
  return command.removeprefix('--command=')


def test_a_worker_runs_what_was_said_once_and_stops(worker):
  (run,) = printed('tpu_pod.sh', 'run', *POD)
  assert worker(remote(run)).returncode == 0
  given = json.loads(wait_for(worker.home / 'given.json'))
  cache = '--config.compilation_cache=gs://bucket/run/compilation_cache'
  assert given == ['-m', 'folk_jax.main', *RUN[1:], cache]
  again = worker(remote(run))
  assert again.returncode == 1 and 'a run is under way: stop it first' in again.stderr
  (stop,) = printed_alone('stop')
  assert worker(remote(stop)).returncode == 0
  assert wait_for(worker.home / 'run.status').strip() == '143'


@pytest.fixture
def tools(tmp_path):
  """A PATH of tools that only note what they are called with: `tools(name, script)`."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def add(name: str, script: str) -> pathlib.Path:
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    return folder

  add('sleep', '#!/bin/sh\n')
  add('git', '#!/bin/sh\n')
  return add


@pytest.mark.parametrize(
  'arguments, environment, expected',
  [
    ((), {}, ['--kill-on-bad-exit=1']),
    ((), {'SLURM_CPUS_PER_TASK': '64'}, ['--kill-on-bad-exit=1', '--cpus-per-task=64']),
    (
      ('--task-a-gpu',),
      {'SLURM_JOB_NUM_NODES': '2', 'SLURM_GPUS_ON_NODE': '4', 'SLURM_CPUS_PER_TASK': '64'},
      ['--kill-on-bad-exit=1', '--ntasks=8', '--ntasks-per-node=4', '--gpu-bind=none', '--cpus-per-task=16'],
    ),
  ],
)  # fmt: skip
def test_a_slurm_step_has_a_process_a_node_or_a_gpu(arguments, environment, expected):
  (srun,) = printed('slurm.sbatch', *arguments, **environment)
  place = srun.index('-m')
  assert srun[0] == 'srun' and srun[1 : place - 1] == expected
  assert srun[place + 1 : place + 4] == ['folk_jax.main', *RUN[1:]]


@pytest.mark.parametrize(
  'status, said, restarts, requeued',
  [
    (0, '', 0, False),
    (143, '', 0, True),
    (143, '', 5, False),
    (130, '', 0, False),
    (1, '', 0, False),
    (75, '', 0, True),
    (75, '', 5, False),
    (137, 'srun: error: n1: task 0: Exited with exit code 75', 0, True),
    (137, 'srun: error: n1: task 0: Killed', 4, True),
    (137, 'srun: error: n1: task 0: Killed', 5, False),
    # A mistake, that one task found first: the others were killed for it.
    (137, 'srun: error: n1: task 3: Exited with exit code 2', 0, False),
  ],
)
def test_a_slurm_job_that_was_told_to_end_or_hung_goes_back_into_the_queue(
  status, said, restarts, requeued, tools, tmp_path
):
  checkout = tmp_path / 'checkout'
  shutil.copytree(LAUNCH, checkout / 'launch')
  (checkout / '.venv' / 'bin').mkdir(parents=True)
  (checkout / '.venv' / 'bin' / 'python').symlink_to('/bin/true')
  folder = tools('srun', f'#!/bin/sh\necho shown\necho "{said}" >&2\nexit {status}\n')
  tools('scontrol', f'#!/bin/sh\necho "$@" >{folder}/requeued\n')
  done = bash(
    checkout / 'launch' / 'slurm.sbatch', '--requeues=5', *RUN,
    PATH=f'{folder}:{os.environ["PATH"]}', SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(checkout),
    SLURM_RESTART_COUNT=str(restarts),
  )  # fmt: skip
  assert done.returncode == status, done.stderr
  assert 'shown\n' in done.stdout and f'{said}\n' in done.stderr
  assert (folder / 'requeued').exists() == requeued
  if requeued:
    assert (folder / 'requeued').read_text() == 'requeue 7\n'


def test_sbatch_reads_its_options_before_any_command():
  """sbatch stops at the first line that is no comment."""
  lines = (LAUNCH / 'slurm.sbatch').read_text().splitlines()
  options = [shlex.split(line)[1] for line in lines if line.startswith('#SBATCH ')]
  assert {'--requeue', '--signal=TERM@120', '--open-mode=append'} <= set(options)
  last = max(i for i, line in enumerate(lines) if line.startswith('#SBATCH '))
  assert all(line.startswith('#') for line in lines[: last + 1])


def test_one_gpu_host():
  export, run = printed('gpu.sh', '--gpus=0,2')
  assert export == ['export', 'CUDA_VISIBLE_DEVICES=0,2']
  assert run[1:] == ['-m', 'folk_jax.main', *RUN[1:]]
