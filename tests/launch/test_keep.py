"""What `tpu_pod.sh keep` does about preemptions, failures and a gcloud that cannot say, with gcloud replaced."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEEP = (
  'launch/tpu_pod.sh',
  'keep',
  '--name=folk',
  '--zone=us-west4-a',
  '--type=v6e-16',
  '--retries=2',
)
RUN = ('--', '--config=configs/vit_b.py', '--workdir=gs://bucket/run')

# Notes what changes something; takes what it is asked for from a list, a line an answer. A line `no CALL` is for the
# next such call, which fails.
GCLOUD = r"""#!/usr/bin/env bash
answer() { head -n 1 "$TOOLS/answers"; sed -i 1d "$TOOLS/answers"; }
changes() {
  echo "$1" >>"$TOOLS/calls"
  [[ $(head -n 1 "$TOOLS/answers") != "no $1" ]] || { answer >&2; exit 1; }
}
case "$*" in
  *describe*)
    said=$(answer)
    case $said in
      NONE) echo 'ERROR: (gcloud) NOT_FOUND: Resource folk was not found.' >&2; exit 1 ;;
      DOWN) echo 'ERROR: (gcloud) There was a problem refreshing your tokens' >&2; exit 1 ;;
      *) echo "$said" ;;
    esac ;;
  *'cat run.status'*) answer ;;
  *' create '*) changes create ;;
  *' delete '*) changes delete ;;
  *' scp '*) changes install ;;
  *nohup*) changes run ;;
  *'cat folk_jax/run.log'*) changes logs ;;
esac
"""


@pytest.fixture
def keep(tmp_path):
  """`keep(*answers)`: the ended process, what it changed in order, and the answers that nobody asked for."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name, script in {'gcloud': GCLOUD, 'sleep': '#!/bin/sh\n', 'git': '#!/bin/sh\n'}.items():
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
  (folder / 'calls').touch()

  def run(*answers: str) -> tuple[subprocess.CompletedProcess, str, list[str]]:
    (folder / 'answers').write_text(''.join(f'{answer}\n' for answer in answers))
    done = subprocess.run(
      ['bash', *KEEP, f'--out={tmp_path}/logs', *RUN],
      cwd=ROOT,
      env={'PATH': f'{folder}:{os.environ["PATH"]}', 'HOME': '/', 'TOOLS': str(folder)},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )
    calls = ' '.join((folder / 'calls').read_text().split())
    return done, calls, (folder / 'answers').read_text().splitlines()

  return run


@pytest.mark.parametrize(
  'answers, calls',
  [
    # Made, installed and run; preempted, and all of it again; told to end (143), and only run again.
    (
      'NONE,PROVISIONING,ACTIVE,ACTIVE,running,SUSPENDED,ACTIVE,ACTIVE,143,ACTIVE,0',
      'create install run delete create install run run',
    ),
    # A gcloud that cannot say changes nothing, while the run goes on or while the TPU comes.
    ('ACTIVE,running,DOWN,ACTIVE,running,DOWN,ACTIVE,0', ''),
    ('NONE,DOWN,ACTIVE,ACTIVE,0', 'create install run'),
    # What jax's end of the first worker looks like, two looks before the TPU's state says why.
    ('ACTIVE,134,ACTIVE,134,SUSPENDED,ACTIVE,ACTIVE,0', 'delete create install run'),
    # A failure that stays is started again.
    ('ACTIVE,1,ACTIVE,1,ACTIVE,1,ACTIVE,running,ACTIVE,0', 'logs run'),
    # Without capacity there is nothing to install on; a TPU that is there then, others have made.
    ('NONE,no create,NONE,ACTIVE,ACTIVE,0', 'create create install run'),
    ('NONE,no create,ACTIVE,running,ACTIVE,0', 'create'),
    # A machine that does not answer yet is installed once it does; the run is started only then.
    ('NONE,ACTIVE,no install,ACTIVE,,ACTIVE,bare,ACTIVE,0', 'create install install run'),
    # A run that did not start everywhere is not installed over.
    ('NONE,ACTIVE,no run,ACTIVE,none,ACTIVE,0', 'create install run run'),
    # Such as after a reboot, of what others have made.
    ('ACTIVE,none,ACTIVE,0', 'run'),
  ],
)
def test_keep_ends_with_the_run(answers, calls, keep):
  done, changed, left = keep(*answers.split(','))
  assert done.returncode == 0, done.stderr
  assert (changed, left) == (calls, [])
  assert 'the run has ended; launch/tpu_pod.sh delete' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  'answers, calls, words',
  [
    ('ACTIVE,2', 'logs', 'the run ended with status 2; its logs are in {logs}'),
    (
      ','.join(['ACTIVE,1'] * 9),
      'logs run logs run logs',
      'the run ended with status 1; its logs are in {logs}',
    ),
    ('ACTIVE,bare', '', 'folk was there before, with nothing installed'),
  ],
)
def test_keep_gives_up(answers, calls, words, keep, tmp_path):
  done, changed, left = keep(*answers.split(','))
  assert done.returncode == 2
  assert (changed, left) == (calls, [])
  assert done.stderr.splitlines()[-1].startswith(
    f'tpu_pod.sh: {words.format(logs=tmp_path / "logs")}'
  )
  assert (tmp_path / 'logs' / 'folk').is_dir() == bool(calls)


def test_what_a_person_has_ended_is_not_started_again(keep):
  done, changed, left = keep('ACTIVE', '130')
  assert (done.returncode, changed, left) == (130, '', [])
  assert done.stderr.splitlines()[-1].startswith('the run was saved and ended by hand')


def test_a_gcloud_that_cannot_say_is_heard(keep):
  done, _, _ = keep('DOWN', 'ACTIVE', '0')
  assert 'There was a problem refreshing your tokens' in done.stderr


def test_what_a_worker_says_of_the_run(tmp_path):
  """Its first worker is asked with a script, which is run here."""
  asked, home = tmp_path / 'asked', tmp_path / 'home'
  home.mkdir()
  gcloud = tmp_path / 'gcloud'
  gcloud.write_text(
    f'#!/bin/bash\ncase "$*" in\n*describe*) echo ACTIVE ;;\n*) printf %s "${{@: -1}}" >{asked}; echo 0 ;;\nesac\n'
  )
  gcloud.chmod(0o755)

  def bash(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ['bash', *command],
      cwd=ROOT if environment else home,
      env={**os.environ, **environment},
      capture_output=True,
      text=True,
      timeout=30,
      check=True,
    )

  bash(*KEEP, *RUN, PATH=f'{tmp_path}:{os.environ["PATH"]}')
  ask = ('-c', asked.read_text().removeprefix('--command='))
  assert bash(*ask).stdout == 'bare\n'
  (home / 'folk_jax').mkdir()
  assert bash(*ask).stdout == 'none\n'
  bash('-c', 'sleep 60 >/dev/null 2>&1 & echo $! >folk_jax/run.pid')
  assert bash(*ask).stdout == 'running\n'
  bash('-c', 'kill -9 $(cat folk_jax/run.pid); true & echo $! >folk_jax/run.pid; wait')
  assert bash(*ask).stdout == 'none\n'  # Such as after a reboot: the run is started again.
  (home / 'folk_jax' / 'run.status').write_text('143\n')
  assert bash(*ask).stdout == '143\n'
