"""Checkpoints through the real Orbax on a real disk: keeping, resuming, reading, refusing."""

import os
import pathlib
import shutil
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import SingleDeviceSharding

from folk_jax import checkpoint
from folk_jax.errors import UserError


class TeacherState(NamedTuple):
  count: jax.Array
  teacher: Any


@flax.struct.dataclass
class TrainState:
  step: jax.Array
  params: Any
  opt_state: Any
  extra: Any


def follow() -> optax.GradientTransformation:
  """The form of the EMA teacher: parameters held in an optax state under the name `teacher`."""
  return optax.GradientTransformation(
    lambda params: TeacherState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: -x, params)),
    lambda updates, state, params=None: (updates, state),
  )


def make_state(step: int = 0) -> TrainState:
  """A state with every kind of node that ours holds: masked, empty, None, bfloat16, scalars."""
  rng = np.random.default_rng(step)
  params = {
    'backbone': {
      'blocks': {'kernel': jnp.asarray(rng.normal(size=(8, 16, 32)), jnp.float32)},
      'norm': {'scale': jnp.asarray(rng.normal(size=(32,)), jnp.bfloat16)},
    },
    'projection': {'kernel': jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)},
  }
  decayed = jax.tree.map(lambda x: x.ndim > 1, params)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.add_decayed_weights(0.1), decayed),
    optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    follow(),
  )
  extra = {'centre': jnp.arange(8.0) + step, 'absent': None, 'empty': {}}
  return TrainState(jnp.int32(step), params, optimizer.init(params), extra)


def here(state: TrainState) -> TrainState:
  sharding = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, one), other in zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
  ):
    assert one.dtype == other.dtype, path
    np.testing.assert_array_equal(one, other, err_msg=str(path))


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with steps 3 and 5, to read or to copy."""
  directory = tmp_path_factory.mktemp('saved')
  with checkpoint.Checkpoints(str(directory), every=0, keep=9) as checkpoints:
    for step in (3, 5):
      checkpoints.save(step, make_state(step), {'seed': 7, 'name': 'a run'}, force=True)
  return directory


def test_restores_what_was_saved_bit_for_bit_with_its_meta(saved):
  with checkpoint.Checkpoints(str(saved), every=0, keep=9) as checkpoints:
    state, meta = checkpoints.restore(here(make_state()))
    assert_same(state, make_state(5))
    assert isinstance(state.opt_state[-1], TeacherState)
    assert meta == {'seed': 7, 'name': 'a run', 'format_version': checkpoint.FORMAT_VERSION}
    earlier, _ = checkpoints.restore(here(make_state()), step=3)
    assert_same(earlier, make_state(3))


def test_resumed_training_equals_uninterrupted(tmp_path):
  optimizer = optax.chain(optax.adamw(0.1), follow())

  @jax.jit
  def advance(params, opt_state):
    grads = jax.tree.map(jnp.sin, params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  state = {'params': make_state().params, 'opt_state': None}
  state['opt_state'] = optimizer.init(state['params'])
  with checkpoint.Checkpoints(str(tmp_path), every=2, keep=1) as checkpoints:
    for step in range(1, 5):
      state = dict(zip(('params', 'opt_state'), advance(**state), strict=True))
      checkpoints.save(step, state, {})
      if step == 2:
        checkpoints.wait()
        resumed, _ = checkpoints.restore(here(state))
  for _ in range(2):
    resumed = dict(zip(('params', 'opt_state'), advance(**resumed), strict=True))
  assert_same(resumed, state)


@pytest.mark.parametrize(
  ('every', 'keep', 'permanent_every', 'left'),
  [(1, 1, 0, [12]), (2, 2, 0, [10, 12]), (2, 1, 4, [4, 8, 12]), (3, 2, 5, [9, 12]), (0, 3, 0, [])],
)
def test_keeps_the_latest_and_the_permanent(tmp_path, every, keep, permanent_every, left):
  state = {'x': jnp.zeros(4)}
  with checkpoint.Checkpoints(str(tmp_path), every, keep, permanent_every) as checkpoints:
    begun = [step for step in range(1, 13) if checkpoints.save(step, state, {})]
    assert begun == [step for step in range(1, 13) if every and step % every == 0]
    checkpoints.wait()
    assert checkpoints.all_steps() == left
    assert checkpoints.latest_step() == (left[-1] if left else None)
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == left


def test_forced_save_of_a_saved_step_leaves_it(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path), every=2, keep=3) as checkpoints:
    assert checkpoints.save(2, {'x': jnp.ones(2)}, {})
    assert not checkpoints.save(2, {'x': jnp.zeros(2)}, {}, force=True)
    assert checkpoints.save(3, {'x': jnp.zeros(2)}, {}, force=True)
  node, _, _ = checkpoint.read_subtree(str(tmp_path), (), step=2)
  np.testing.assert_array_equal(node['x'], np.ones(2))


def test_donating_the_state_after_a_save_is_safe(tmp_path):
  state = {'x': jnp.arange(1 << 20, dtype=jnp.float32)}
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  with checkpoint.Checkpoints(str(tmp_path), every=1, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    jax.block_until_ready(overwrite(state))
  node, _, _ = checkpoint.read_subtree(str(tmp_path), ())
  np.testing.assert_array_equal(node['x'], np.arange(1 << 20, dtype=np.float32))


def test_waits_when_an_exception_ends_the_run(tmp_path):
  with pytest.raises(KeyError, match='mine'), checkpoint.Checkpoints(str(tmp_path), 1, 1) as saving:
    saving.save(1, make_state(1), {})
    raise KeyError('mine')
  with checkpoint.Checkpoints(str(tmp_path), 1, 1) as checkpoints:
    assert_same(checkpoints.restore(here(make_state()))[0], make_state(1))


def test_mismatches_name_paths_and_both_sides(saved):
  abstract = here(make_state())
  sharding = abstract.step.sharding
  params = {
    'backbone': abstract.params['backbone'],
    'projection': {'kernel': jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding)},
    'reconstruction': abstract.step,
  }
  extra = {**abstract.extra, 'absent': abstract.step}
  extra['centre'] = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding)
  with checkpoint.Checkpoints(str(saved), every=0, keep=9) as checkpoints:
    with pytest.raises(UserError) as error:
      checkpoints.restore(abstract.replace(params=params, extra=extra))
    assert str(error.value) == (
      f'step 5 in {saved} does not fit this configuration:'
      ' params.projection.kernel: found float32[32, 8], expected float32[32, 16];'
      ' params.reconstruction: found nothing, expected int32[];'
      ' extra.absent: found nothing, expected int32[]; and 1 more;'
      ' use the configuration it was trained with'
    )
    # A cast would be silent in Orbax, and so would what the checkpoint alone holds.
    with pytest.raises(
      UserError, match=r'extra.centre: found float32\[8\], expected bfloat16\[8\]'
    ):
      checkpoints.restore(abstract.replace(extra={'centre': extra['centre']}))
    with pytest.raises(
      UserError, match=r'projection.kernel: found float32\[32, 8\], expected noth'
    ):
      checkpoints.restore(abstract.replace(params={'backbone': abstract.params['backbone']}))
    with pytest.raises(ValueError, match='params.x has no sharding'):
      checkpoints.restore({'params': {'x': jax.ShapeDtypeStruct((), jnp.int32)}})


def test_missing_steps_are_named_with_those_there_are(saved, tmp_path):
  with checkpoint.Checkpoints(str(saved), every=0, keep=9) as checkpoints:
    with pytest.raises(UserError, match=r'no checkpoint of step 4 in .*; there are: 3, 5$'):
      checkpoints.restore(here(make_state()), step=4)
  with pytest.raises(UserError, match=r'no checkpoint of step 4 in .*; there are: 3, 5$'):
    checkpoint.read_subtree(str(saved), ('params',), step=4)
  with pytest.raises(UserError, match='no checkpoint in .*nowhere'):
    checkpoint.read_subtree(str(tmp_path / 'nowhere'), ('params',))
  assert not (tmp_path / 'nowhere').exists()


def test_reads_one_node_and_its_meta(saved):
  node, meta, step = checkpoint.read_subtree(str(saved), ('params', 'backbone'))
  assert_same(node, jax.tree.map(np.asarray, make_state(5).params['backbone']))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(node))
  assert (meta['seed'], step) == (7, 5)
  under = ('opt_state', '**', 'teacher', 'backbone')
  teacher, _, step = checkpoint.read_subtree(str(saved), under, step=3)
  assert_same(teacher, jax.tree.map(lambda x: -np.asarray(x), make_state(3).params['backbone']))
  assert step == 3


def test_a_node_must_be_there_and_be_one(saved):
  with pytest.raises(UserError) as error:
    checkpoint.read_subtree(str(saved), ('params', 'backbones'))
  assert str(error.value) == (
    f'step 5 in {saved}: 0 nodes match params/backbones, expected one; there are: '
    'extra (absent, centre, empty), opt_state (0, 1, 2, 3), params (backbone, projection), step'
  )
  with pytest.raises(UserError, match='4 nodes match .*opt_state/3/teacher/projection'):
    checkpoint.read_subtree(str(saved), ('**', 'projection'))


def remove(file: pathlib.Path) -> None:
  file.unlink()


def truncate(file: pathlib.Path) -> None:
  os.truncate(file, file.stat().st_size // 2)


def flip(file: pathlib.Path) -> None:
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0xFF
  file.write_bytes(content)


@pytest.mark.parametrize(
  ('pattern', 'damage'),
  [
    ('state/manifest.ocdbt', remove),
    ('state/d/*', truncate),
    ('state/ocdbt.process_0/d/*', truncate),
    ('state/d/*', flip),
    ('state/_METADATA', truncate),
    ('meta/metadata', truncate),
    ('meta/metadata', remove),
  ],
)
def test_damage_is_one_line_that_names_the_step(saved, tmp_path, capfd, pattern, damage):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  for file in (tmp_path / '5').glob(pattern):
    damage(file)
  with checkpoint.Checkpoints(str(tmp_path), every=0, keep=9) as checkpoints:
    with pytest.raises(UserError) as error:
      checkpoints.restore(here(make_state()), step=5)
    message = str(error.value)
    assert message.startswith(f'step 5 in {tmp_path} cannot be read') and '\n' not in message
    assert f'remove {tmp_path / "5"}' in message
    with pytest.raises(UserError, match='step 5 in .* cannot be read'):
      checkpoint.read_subtree(str(tmp_path), ())
    assert capfd.readouterr().err == ''
    assert_same(checkpoints.restore(here(make_state()), step=3)[0], make_state(3))


def test_meta_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
  with checkpoint.Checkpoints(str(tmp_path), every=1, keep=1) as checkpoints:
    with pytest.raises(TypeError, match='not JSON serializable'):
      checkpoints.save(1, {'x': jnp.zeros(2)}, {'bad': object()})
  assert list(tmp_path.iterdir()) == []


def test_bad_settings_and_places_are_refused(tmp_path):
  with pytest.raises(UserError, match='checkpoint.keep is 0; expected 1 or more'):
    checkpoint.Checkpoints(str(tmp_path), every=1, keep=0)
  with pytest.raises(UserError, match='checkpoint.every is -1; expected 0 or more'):
    checkpoint.Checkpoints(str(tmp_path), every=-1, keep=1)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot keep checkpoints in .*file/here'):
    checkpoint.Checkpoints(str(tmp_path / 'file' / 'here'), every=1, keep=1)


def test_addresses_of_buckets_stay_as_they_are():
  assert (
    str(checkpoint.reading.absolute('gs://bucket/run/checkpoints')) == 'gs://bucket/run/checkpoints'
  )
  assert checkpoint.reading.absolute('run').is_absolute()


def test_orbax_is_quiet_and_we_are_not(tmp_path, caplog):
  before = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    with caplog.at_level('INFO'), checkpoint.Checkpoints(str(tmp_path), 1, 1) as checkpoints:
      checkpoints.save(1, {'x': jnp.zeros(2)}, {})
      logging.info('ours')
  finally:
    logging.set_verbosity(before)
  assert [record.getMessage() for record in caplog.records] == ['ours']
