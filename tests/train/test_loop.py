"""Whole runs, seconds long: killed and resumed, moved to other devices, begun from weights, stopped."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from folk_jax import checkpoint
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.train import loop, metrics
from folk_jax.train.guard import RunStopped

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 6

# Kills itself, as an out-of-memory killer would, once step 5 is logged and step 4 is on disk.
KILLED = """
import os, pathlib, pickle, signal, sys, time
from folk_jax.train import loop, metrics

config, workdir = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), sys.argv[2]
write = metrics.MetricWriter.write

def write_and_die(self, step, scalars):
  write(self, step, scalars)
  if step == 5:
    while not (pathlib.Path(workdir) / 'checkpoints' / '4').exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

metrics.MetricWriter.write = write_and_die
loop.pretrain(config, workdir)
"""

ON_EIGHT = """
import pathlib, pickle, sys
from folk_jax.train import loop

loop.pretrain(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()), sys.argv[2])
"""


def make_config(**changes):
  """Six steps with every kind of random draw: crops, colours, filters, drop path."""
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.update_from_flattened_dict(
    {
      'image_size': 16,
      'total_steps': STEPS,
      'model.width': 24,
      'model.depth': 1,
      'model.heads': 2,
      'model.drop_path': 0.3,
      'projection.hidden': 32,
      'projection.bottleneck': 16,
      'projection.outputs': 24,
      'data.source': 'synthetic',
      'data.limit': 40,
      'data.test_resize': 0,
      'optimizer.freeze_last_layer_epochs': 1.0,
      'evaluation.knn': (),
      'evaluation.held_out_images': 1,
      'evaluation.at_start': False,
      'logging.tensorboard': False,
      'compilation_cache': '',
    }
    | changes
  )
  for view in (config.views.view_1, config.views.view_2):
    view.update({'jitter_probability': 0.0, 'blur_probability': 0.0})  # long to compile
  return config


def state_at(workdir, step: int):
  return checkpoint.read_subtree(str(workdir / 'checkpoints'), (), step)[0]


def losses(workdir):
  return {
    line['step']: {name: line[name] for name in line if name.startswith('train/loss')}
    for line in metrics.read_metrics(str(workdir))
    if 'train/loss' in line
  }


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('loop')


@pytest.fixture(scope='module')
def uninterrupted(folder):
  workdir = folder / 'uninterrupted'
  loop.pretrain(make_config(), str(workdir))
  return workdir


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(uninterrupted, folder):
  workdir = folder / 'killed'
  (folder / 'config.pickle').write_bytes(pickle.dumps(make_config()))
  died = subprocess.run(
    [sys.executable, '-c', KILLED, str(folder / 'config.pickle'), str(workdir)],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert died.returncode == -9, died.stderr
  assert sorted(losses(workdir)) == [1, 2, 3, 4, 5]
  assert not (workdir / 'checkpoints' / '6').exists()

  # Logging, checkpoints and evaluation are free to change.
  loop.pretrain(make_config(**{'checkpoint.every': 3}), str(workdir))
  assert losses(workdir) == losses(uninterrupted)
  found, expected = state_at(workdir, STEPS), state_at(uninterrupted, STEPS)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(expected)]
  for part in ('params', 'opt_state', 'extra', 'teacher', 'mu', 'nu', 'centre'):
    assert any(f"'{part}'" in path for path in paths), part
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert int(found['step']) == STEPS
  # And the steps moved what there is to move.
  before = state_at(uninterrupted, 4)['params']['backbone']['patch_embed']['kernel']
  assert np.abs(found['params']['backbone']['patch_embed']['kernel'] - before).max() > 0


@pytest.mark.slow
def test_a_finished_run_started_again_says_so_and_changes_nothing(uninterrupted, capsys):
  before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob('*') if path.is_file()}
  loop.pretrain(make_config(), str(uninterrupted))
  out = capsys.readouterr().out
  assert f'the run in {uninterrupted} is complete: nothing is left to train' in out
  after = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob('*') if path.is_file()}
  assert after == before


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_resumes_on_one(uninterrupted, folder, run_with_devices):
  workdir = folder / 'eight'
  (folder / 'eight.pickle').write_bytes(pickle.dumps(make_config(**{'mesh.fsdp': 2})))
  run_with_devices(ON_EIGHT, str(folder / 'eight.pickle'), str(workdir), timeout=600)
  on_eight = losses(workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  saved = state_at(workdir, 4)

  loop.pretrain(make_config(), str(workdir))
  resumed = losses(workdir)
  jax.tree.map(np.testing.assert_array_equal, state_at(workdir, 4), saved)
  for step, expected in losses(uninterrupted).items():
    # Sums in another order, divided by temperatures of 0.04, through Adam: 1e-6 a step grows.
    assert resumed[step] == pytest.approx(expected, rel=1e-4)
    assert on_eight[step] == pytest.approx(expected, rel=1e-4)
    # Up to step 4 the lines are the eight devices' own.
    assert (resumed[step] == on_eight[step]) or step > 4


@pytest.mark.slow
def test_a_run_that_starts_from_another_at_another_image_size(uninterrupted, folder):
  workdir = folder / 'from'
  config = make_config(
    **{
      'init_from': str(uninterrupted),
      'image_size': 24,
      'total_steps': 1,
      'optimizer.warmup_epochs': 0.0,
      'optimizer.learning_rate': 1e-6,
    }
  )
  loop.pretrain(config, str(workdir))
  found = state_at(workdir, 1)
  under = ('opt_state', '**', 'teacher')
  teacher, _, step = checkpoint.read_subtree(str(uninterrupted / 'checkpoints'), under)
  assert step == STEPS
  for name in ('norm', 'blocks', 'patch_embed'):
    # One step of 1e-6 * 16 / 256 from the teacher's weights, the student's among the rest.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      found['params']['backbone'][name],
      teacher['backbone'][name],
    )
  assert found['params']['backbone']['pos_embed'].shape == (1, 10, 24)


@pytest.mark.slow
def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(folder):
  workdir = folder / 'diverged'
  config = make_config(
    **{
      'optimizer.learning_rate': 1e30,
      'optimizer.warmup_epochs': 0.0,
      'log_every': 100,
      'guard.on_nonfinite': 'stop',
    }
  )
  with pytest.raises(RunStopped, match='non-finite numbers at step 2 .*learning_rate'):
    loop.pretrain(config, str(workdir))
  # Step 2 is no log point: the check stands before the checkpoint itself.
  assert not list((workdir / 'checkpoints').glob('[0-9]*'))
  assert json.loads((workdir / 'config.json').read_text())['log_every'] == 100


@pytest.mark.slow
def test_a_run_that_goes_on_after_such_numbers_saves_none_of_them(folder):
  """Every step but the first is skipped: the saves due at 2 and 4 wait for one that counts, the last waits no more."""
  workdir = folder / 'going_on'
  loop.pretrain(
    make_config(**{'optimizer.learning_rate': 1e30, 'optimizer.warmup_epochs': 0.0}), str(workdir)
  )
  assert [path.name for path in (workdir / 'checkpoints').glob('[0-9]*')] == ['6']
  tree, meta, _ = checkpoint.read_subtree(str(workdir / 'checkpoints'), ())
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
  assert (meta['guard']['skipped'], meta['guard']['row']) == (5, 5)


@pytest.mark.slow
def test_other_data_than_the_runs_are_refused(uninterrupted, folder):
  config = make_config(**{'data.limit': 41})
  saved = json.loads((uninterrupted / 'config.json').read_text())
  copied = shutil.copytree(uninterrupted, folder / 'copied')
  # As if the same path held one image more.
  saved['data']['limit'] = 41
  (copied / 'config.json').write_text(json.dumps(saved))
  with pytest.raises(UserError, match='saw .* images and config.data now gives'):
    loop.pretrain(config, str(copied))
