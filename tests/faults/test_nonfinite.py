"""Numbers that are not finite: what a skipped step leaves as it was, what goes on, when a run stops, what is kept."""

import json
import math
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folk_jax import checkpoint, distributed, main, objectives, replay
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.train import faults, loop, metrics, sharding, spikes
from folk_jax.train import run as run_lib
from folk_jax.train.guard import RunStopped
from folk_jax.train.state import teacher_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
BAD = 7

ON_EIGHT = """
import importlib.util, sys
import jax
import numpy as np

spec = importlib.util.spec_from_file_location('test_nonfinite', sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
spec = importlib.util.spec_from_file_location('brittle', sys.argv[2])
brittle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(brittle)
tests.objectives.OBJECTIVES['brittle'] = brittle.Brittle
assert jax.device_count() == 8
# 8 x 16384 numbers in the last layer: enough to be cut over fsdp.
for accumulate in (1, 2):
  config = tests.recipe(brittle, (tests.BAD,), accumulate=accumulate, batch_size=16)
  config.update_from_flattened_dict({'mesh.fsdp': 2, 'objective.outputs': 16384})
  state = tests.check_skipped(config)
  kernel = state.params['projection']['last_layer']['kernel']
  assert not kernel.sharding.is_fully_replicated
print('skipped on eight')
"""


def recipe(brittle, bad=(BAD,), **changes):
  return brittle.make_config(
    config_lib.load_recipe(str(ROOT / 'configs' / 'vit_b.py'), 'smoke'), bad, **changes
  )


@pytest.fixture(scope='module')
def brittle(support):
  method = support('brittle')
  objectives.OBJECTIVES['brittle'] = method.Brittle
  yield method
  del objectives.OBJECTIVES['brittle']


def batch_of(first: int, size: int, seed: int) -> dict[str, np.ndarray]:
  views = np.random.default_rng(seed).integers(0, 256, (size, 2, 16, 16, 3), np.uint8)
  return {'views': views, 'index': np.arange(first, first + size)}


def check_skipped(config):
  """A good step, a step with a bad image, a good one: the second moves nothing but the run's place."""
  made = run_lib.make_run(config, 40)
  mesh = sharding.make_mesh(config.mesh.fsdp)
  with jax.set_mesh(mesh):
    state = loop.new_state(
      config,
      made,
      sharding.state_shardings(jax.eval_shape(made.new_state, jax.random.key(0), {}), mesh),
    )
    step = loop.compile_step(made, state, mesh)
    size = config.batch_size
    # Places 1, 2, ...: the image 7 lies in one microbatch of two.
    batches = [sharding.put_batch(batch_of(first, size, first), mesh) for first in (8, 1, 20)]
    for _ in range(2):  # Until the last layer moves, too.
      state, values = step(state, batches[0])
      assert values['nonfinite'] == 0
    before = jax.tree.map(np.asarray, state)
    state, values = step(state, batches[1])
    assert values['nonfinite'] == 1
    places = 0
    for (path, new), old in zip(
      jax.tree.leaves_with_path(state), jax.tree.leaves(before), strict=True
    ):
      name = jax.tree_util.keystr(path)
      if name.endswith(('.step', '.count')) and 'mu' not in name and new != old:
        assert int(new) == int(old) + 1, name
        places += 1
      else:
        np.testing.assert_array_equal(np.asarray(new), old, err_msg=name)
    # The run's step; the schedules of rate and decay, now and late; the late start; the teacher's momentum.
    assert places == 7
    assert int(state.step) == int(optax.tree.get(state.opt_state[-1], 'count')) == 3
    adams = [
      int(node.count)
      for node in jax.tree.leaves(
        state.opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
      )
      if isinstance(node, optax.ScaleByAdamState)
    ]
    assert all(count <= 2 for count in adams) and max(adams) == 2  # Of updates made.
    stayed = jax.tree.map(np.asarray, state)
    state, values = step(state, batches[2])
    assert values['nonfinite'] == 0
    for part in ('backbone', 'projection'):
      for tree, old in ((state.params, stayed.params), (teacher_of(state), teacher_of(stayed))):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), tree[part], old[part])
        assert max(jax.tree.leaves(moved)) > 0
    return state


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_skipped_step_leaves_everything_as_it_was_but_the_place_in_the_run(brittle, accumulate):
  check_skipped(recipe(brittle, accumulate=accumulate))


@pytest.mark.slow
def test_it_does_on_eight_devices_with_parameters_cut_over_them(run_with_devices):
  script = str(ROOT / 'tests' / 'support' / 'brittle.py')
  assert 'skipped on eight' in run_with_devices(ON_EIGHT, __file__, script)


def test_the_state_is_still_donated(brittle):
  config = recipe(brittle)
  made = run_lib.make_run(config, 40)
  state = made.new_state(jax.random.key(0), {})
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    batch = sharding.put_batch(batch_of(0, 8, 0), mesh)
    memory = loop.compile_step(made, state, mesh).lower(state, batch).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize('where', ['gradient', 'extra'])
def test_a_finite_loss_is_not_enough(brittle, where):
  """1e20 squared overflows in the gradient's norm, and so would it in Adam's; a centre of infinity is for ever."""
  made = run_lib.make_run(recipe(brittle, ()), 40)
  state = made.new_state(jax.random.key(0), {})
  if where == 'gradient':
    # The teacher is the student: a distance of 0.5 squared, whatever the last layer's scale.
    scaled = jax.tree.map(lambda leaf: leaf * 1e25, state.params['projection'])
    state = state.replace(params=state.params | {'projection': scaled})
    teacher = state.opt_state[-1]._replace(
      teacher=jax.tree.map(jnp.copy, {k: state.params[k] for k in ('backbone', 'projection')})
    )
    state = state.replace(opt_state=(*state.opt_state[:-1], teacher))
  else:
    teacher = state.opt_state[-1].teacher
    huge = {
      'last_layer': {'kernel': jnp.full_like(teacher['projection']['last_layer']['kernel'], 3e38)}
    }
    dark = teacher['backbone'] | {'bias': jnp.full_like(teacher['backbone']['bias'], 1.0)}
    state = state.replace(
      opt_state=(
        *state.opt_state[:-1],
        state.opt_state[-1]._replace(teacher={'backbone': dark, 'projection': huge}),
      )
    )
  after, values = jax.jit(made.step)(state, batch_of(0, 8, 0))
  assert values['nonfinite'] == 1
  jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, after.extra, state.extra)
  assert np.isfinite(values['loss']) == (where == 'gradient')


def lines_of(workdir):
  timing = ('images_per_second', 'step_seconds', 'goodput', 'data_wait')
  return {
    line['step']: {k: v for k, v in line.items() if not k.endswith(timing)}
    for line in metrics.read_metrics(str(workdir))
    if 'train/loss' in line
  }


def state_at(workdir, step):
  return checkpoint.read_subtree(str(workdir / 'checkpoints'), (), step)


@pytest.fixture(scope='module')
def skipping(brittle, tmp_path_factory):
  """A whole run with a bad image among its 40: steps 1 and 9 of 12 meet it."""
  workdir = tmp_path_factory.mktemp('skipping')
  loop.pretrain(recipe(brittle), str(workdir))
  return workdir


def test_a_run_skips_counts_and_keeps_the_images(skipping):
  lines = lines_of(skipping)
  bad = [step for step, line in lines.items() if line['train/nonfinite']]
  assert bad == [1, 9] and sorted(lines) == list(range(1, 13))
  assert [lines[step]['train/skipped_steps'] for step in (1, 8, 9, 12)] == [1, 1, 2, 2]
  assert np.isnan(lines[9]['train/loss']) and np.isfinite(lines[10]['train/loss'])
  assert sorted(file.name for file in (skipping / 'faults').iterdir()) == [
    'step_1.json',
    'step_9.json',
  ]
  for step in bad:
    (kept,) = faults.read(str(skipping), step)
    assert BAD in kept['indices'] and len(kept['indices']) == 8 and kept['seed'] == 0
    assert kept['metrics']['loss'] == 'nan'
  tree, meta, _ = state_at(skipping, 12)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
  assert (meta['guard']['skipped'], meta['guard']['row'], meta['guard']['recent']) == (2, 0, [1, 9])


def test_a_run_that_was_told_to_end_at_a_skipped_step_goes_on_as_if_it_had_not(
  brittle, skipping, tmp_path, monkeypatch
):
  with monkeypatch.context() as patched:
    patched.setattr(distributed, 'preempted', lambda step: step == 9)
    with pytest.raises(distributed.Preempted):
      loop.pretrain(recipe(brittle), str(tmp_path))
  assert (tmp_path / 'checkpoints' / '9').exists()  # What a skipped step leaves is whole.
  loop.pretrain(recipe(brittle), str(tmp_path))
  assert str(lines_of(tmp_path)) == str(lines_of(skipping))  # As text: NaN differs from itself.
  (found, meta, _), (expected, whole, _) = state_at(tmp_path, 12), state_at(skipping, 12)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert meta['guard'] == whole['guard']


def test_a_save_due_at_a_skipped_step_waits_for_one_that_counts(brittle, tmp_path):
  loop.pretrain(recipe(brittle, **{'checkpoint.every': 9, 'total_steps': 11}), str(tmp_path))
  steps = sorted(int(path.name) for path in (tmp_path / 'checkpoints').glob('[0-9]*'))
  assert steps == [10, 11]


def test_past_the_limit_the_run_stops_with_words_and_its_last_checkpoint_is_from_before(
  brittle, skipping, tmp_path, capsys
):
  # All images but those of the first steps' batches: what a run that diverges looks like.
  (first,) = faults.read(str(skipping), 1)
  everything = tuple(range(40))
  config = recipe(brittle, everything, **{'guard.max_skipped': 3})
  with pytest.raises(SystemExit) as left:
    main.TASKS['pretrain'](config, str(tmp_path))
  said = capsys.readouterr().err
  assert left.value.code == 1
  assert 'stopped: non-finite numbers at step 4' in said and '4 steps in a row' in said
  for words in ('config.guard.max_skipped', 'learning_rate', 'folk_jax.replay', 'backbone nan'):
    assert words in said
  assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))
  assert len(first['indices']) == 8


def test_on_nonfinite_stop_stops_at_the_first(brittle, tmp_path):
  with pytest.raises(RunStopped, match='non-finite numbers at step 1 .*on_nonfinite is stop'):
    loop.pretrain(recipe(brittle, **{'guard.on_nonfinite': 'stop'}), str(tmp_path))


def test_replay_finds_the_image_and_the_operation(skipping):
  before = {path: path.stat().st_mtime_ns for path in skipping.rglob('*')}
  lines, is_finite = replay.replay(str(skipping), 9)
  assert not is_finite
  said = '\n'.join(lines)
  assert 'weights after step 8 of it, 0 steps older' in said and 'faults/ notes' in said
  (row,) = [line for line in lines if 'not finite' in line and '<-' in line]
  assert row.split()[0] == str(BAD)
  assert 'in image 7: weighing: div gave nan in float32[1] (tests/support/brittle.py:' in said
  assert {path: path.stat().st_mtime_ns for path in skipping.rglob('*')} == before


@pytest.mark.parametrize(
  'loss, last', [(np.nan, 'and 2 more, none of them finite'), (0.5, 'and 2 more, down to 0.5')]
)
def test_replays_table_says_what_it_leaves_out(loss, last):
  loss_B = np.float32([np.nan] * 11 + [loss])
  found = types.SimpleNamespace(loss_B=loss_B, bad_B=np.isnan(loss_B))
  source = types.SimpleNamespace(name='photograph {}'.format)
  lines = replay._table(found, np.arange(12), source)
  assert lines[10].endswith('photograph 9  <- not finite') and lines[11].strip() == last


def test_replay_catches_up_refuses_what_is_not_there_and_other_data(skipping, tmp_path):
  lines, is_finite = replay.replay(str(skipping), 8, at=4, catch_up=True)
  assert is_finite and 'weights after step 7 of it, 0 steps older' in lines[1]
  losses = [float(line.split()[1]) for line in lines[3:11]]
  # Five digits are printed, and each image's loss is its share of the step's.
  assert np.mean(losses) == pytest.approx(lines_of(skipping)[8]['train/loss'], rel=1e-3)
  with pytest.raises(UserError, match='--at=5: there is no such checkpoint .*: 0, 4'):
    replay.replay(str(skipping), 8, at=5)
  with pytest.raises(UserError, match='has 12 steps'):
    replay.replay(str(skipping), 13)
  with pytest.raises(UserError, match='holds no run'):
    replay.replay(str(tmp_path), 1)
  file = skipping / 'faults' / 'step_8.json'
  kept = json.loads((skipping / 'faults' / 'step_9.json').read_text())
  file.write_text(json.dumps(kept | {'step': 8}))
  try:
    with pytest.raises(UserError, match='images of step 8 are not the ones'):
      replay.replay(str(skipping), 8)
  finally:
    file.unlink()


def test_replay_takes_whole_steps_and_the_configuration_of_its_checkpoint(skipping, tmp_path):
  run = tmp_path / 'run'
  shutil.copytree(skipping, run)
  # Neither a file nor an empty folder with a number for its name is a step that can be chosen.
  (run / 'checkpoints' / '7').touch()
  (run / 'checkpoints' / '6.orbax-checkpoint-tmp').mkdir()
  meta = run / 'checkpoints' / '4' / 'meta' / 'metadata'
  about = json.loads(meta.read_text())
  about['config']['data'] |= {'source': 'folder', 'path': str(tmp_path / 'moved')}
  meta.write_text(json.dumps(about))
  shutil.rmtree(run / 'checkpoints' / '8')
  (run / 'checkpoints' / '4' / 'digests.json').unlink()
  with pytest.raises(UserError, match=r'moved. does not exist'):
    replay.replay(str(run), 8)
  with pytest.raises(UserError, match=r'elsewhere. does not exist'):
    replay.replay(str(run), 8, data_path=str(tmp_path / 'elsewhere'))
  (run / 'config.json').write_text('[1]')
  with pytest.raises(UserError, match='config.json is damaged'):
    replay.replay(str(run), 8)


class Refused(Exception):
  """As gcsfs raises after its tries: no OSError."""


def test_logs_in_a_bucket_that_refuses_end_no_run(tmp_path, monkeypatch, caplog):
  def refuse(*_):
    raise Refused('503')

  log = spikes.Spikes(6.0, 32, lambda step: 0.1, str(tmp_path))
  kept = faults.Faults(str(tmp_path), seed=0)
  monkeypatch.setattr(checkpoint, 'replace_text', refuse)
  rows = np.arange(2)
  with pytest.raises(Refused):  # On a disk nothing but the system refuses.
    kept.record(1, rows, {'loss': math.nan})
  monkeypatch.setattr(faults, 'is_remote', lambda path: True)
  assert kept.record(1, rows, {'loss': math.nan}) == ''
  for step in range(1, 40):
    log.offer(step, 1.0 + 0.01 * (step % 2), 1.0, rows)
  assert log.offer(40, 9.0, 1.0, rows)
  said = ' '.join(caplog.messages)
  assert 'cannot keep the images of step 1: 503' in said and 'spikes.jsonl: 503' in said
  with metrics.MetricWriter(str(tmp_path), tensorboard=False) as writer:
    monkeypatch.setattr(writer, '_write', refuse)
    with pytest.raises(UserError, match='cannot write the metrics of step 1 to .*: 503'):
      writer.write(1, {'train/loss': 1.0})
