"""A few kills of benchmarks/faults/kill.py, which makes a hundred: what a restart finds, and what the run comes to."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import children  # noqa: E402  # Programs are found where they are run from, and tests are no package.
import common  # noqa: E402
import kill  # noqa: E402

from folk_jax.errors import UserError  # noqa: E402


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Of kills; the undisturbed run is in it."""
  made = tmp_path_factory.mktemp('kill')
  (made / 'cache').symlink_to(children.shared_cache(tmp_path_factory.getbasetemp()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kill, 'STEPS', children.TOTAL)
    patch.setattr(kill, 'FLAGS', (*children.TINY_TOTAL, '--config.checkpoint.every=20'))
    patch.setattr(kill, 'KILLS', 1)
    kill.reference(made)
    yield made


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_save_ends_as_if_nothing_had_been(folder):
  """In the middle of one in the background; then it ends, and is compared bit for bit."""
  kind = kill.KINDS[1]
  compared = []

  class Killer(kill.Killer):
    def _finished(self) -> str:
      # What the next start finds: a folder that is no checkpoint yet.
      compared.extend(self._temporary())
      return super()._finished()

  assert Killer(kind, folder, folder / 'reference', seed=0)(0) == ''
  assert len(compared) == 1
  moments = json.loads((folder / kind.name.replace(' ', '_') / 'moments.json').read_text())
  assert 0 < moments['opened'] < moments['first step']
  assert not (folder / kind.name.replace(' ', '_') / 'run').exists()  # Compared, and removed.


@pytest.mark.slow
def test_what_is_lost_is_found(folder, tmp_path):
  """The comparison itself: of a run with another number logged, one step twice, one bit of a checkpoint changed."""
  reference, steps = folder / 'reference', range(1, kill.STEPS + 1)
  assert children.lost(reference, reference, steps) == ''
  workdir = pathlib.Path(shutil.copytree(reference, tmp_path / 'run'))
  metrics = workdir / 'metrics.jsonl'
  lines = metrics.read_text().splitlines(keepends=True)
  metrics.write_text(''.join([*lines[:5], lines[4], *lines[5:]]))
  assert children.lost(workdir, reference, steps) == 'step 5 stands in metrics.jsonl twice'
  metrics.write_text(''.join(lines[:7] + lines[8:]))
  assert children.lost(workdir, reference, steps).startswith('metrics.jsonl has the steps [1, 2')
  metrics.write_text(''.join(lines).replace('"train/loss": ', '"train/loss": 1', 1))
  assert children.lost(workdir, reference, steps) == 'the numbers logged at step 1 are others'
  shutil.rmtree(workdir / 'checkpoints' / str(kill.STEPS))
  assert children.lost(workdir, reference, steps).startswith('the newest checkpoints are ')

  state = children.state(reference)
  parts = ('params', 'opt_state', 'teacher', 'extra', 'step')
  assert all(any(f"'{part}'" in name for name in state) for part in parts)
  other = state | {
    (name := sorted(state)[0]): np.nextafter(state[name], np.inf, dtype=state[name].dtype)
  }
  assert children.differences(other, state) == f'1 of {len(state)} arrays differ, first {name}'
  assert children.differences({}, state).startswith('other arrays: ')


@pytest.fixture
def at_commit(monkeypatch):
  """Sets the commit that trials are made at."""

  def set_to(commit: str | None) -> None:
    monkeypatch.setattr(common.report, 'context', lambda: {'commit': commit, 'date': 'today'})

  return set_to


def test_trials_keep_their_commit_and_stages_and_go_on_at_no_other(tmp_path, at_commit):
  out, stages = tmp_path / 'faults.json', iter(['steps', 'save', 'steps'])
  fault = common.Fault('f', 'p', 'h', lambda _: '', 2, lambda: next(stages))
  at_commit('abc')
  common.Trials(out, 'faults').run(fault)
  at_commit('abc+')  # The file has changed, and may be in git.
  common.Trials(out, 'faults').run(common.dataclasses.replace(fault, times=3))
  (row,) = json.loads(out.read_text())['rows']
  assert (row['trials'], row['commit'], row['stages']) == (3, 'abc+', {'steps': 2, 'save': 1})
  at_commit('def')
  with pytest.raises(UserError, match=r'trials of "f" made at commit abc\+, and this is def: name'):
    common.Trials(out, 'faults')
  common.Trials(out, 'faults', any_commit=True)
  at_commit(None)  # Outside of git.
  common.Trials(out, 'faults')


@pytest.mark.parametrize(
  ('left', 'stage'),
  [
    ((), kill.IMPORTS),
    (('lock',), kill.OPENING),
    (('lock', 'kept'), kill.OPENING),
    (('lock', 'step'), kill.STEP),
    (('lock', 'step', 'save'), kill.SAVE),
    (('save',), kill.IMPORTS),  # Of the start before.
  ],
)
def test_the_stage_of_a_kill_is_what_the_run_has_left(tmp_path, left, stage):
  killer = kill.Killer(kill.KINDS[0], tmp_path, tmp_path / 'reference', seed=0)
  run = killer._run
  temporary = run / 'checkpoints' / '8.orbax-checkpoint-tmp'
  (temporary if 'save' in left else run).mkdir(parents=True)
  (run / 'lock').write_text(f'process {7 if "lock" in left else 6} on host')
  lines = [json.dumps({'step': step}) + '\n' for step in (3, 4, 5)]
  if 'kept' in left or 'step' in left:  # Opened, and cut behind the checkpoint.
    (run / 'metrics.jsonl').write_text(''.join(lines[: 3 if 'step' in left else 2]) + '{"st')
  process = type('Process', (), {'pid': 7})
  assert killer._stage(process, began=0.0, resumed_from=4) == stage
