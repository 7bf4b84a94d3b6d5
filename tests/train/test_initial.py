"""Starting from other weights: which trees are taken, resampled, left fresh, and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from folk_jax import checkpoint, models
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.interop import timm
from folk_jax.train import initial, run
from folk_jax.train import state as state_lib


def make_config(**changes):
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.update_from_flattened_dict(
    {'image_size': 16, 'model.width': 24, 'model.heads': 2} | changes
  )
  return config


def abstract_state(config):
  return jax.eval_shape(run.make_run(config, 256).new_state, jax.random.key(0), {})


def load(path, which='teacher', **changes):
  config = make_config(**changes)
  params = abstract_state(config).params
  loaded = initial.load(
    str(path), params, image_size=config.image_size, patch=config.model.patch, which=which
  )
  for name, tree in loaded.items():
    shapes = jax.tree.map(lambda leaf: leaf.shape, params[name])
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == shapes
  return loaded


def save(path, **changes):
  """A workdir with one checkpoint of random weights, teacher and student apart; gives the state."""
  config = make_config(**changes)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract_state(config)
  )
  path.mkdir()
  (path / 'config.json').write_text(config_lib.to_json(config))
  with checkpoint.Checkpoints(str(path / 'checkpoints'), every=1, keep=1) as checkpoints:
    checkpoints.save(3, state, {}, force=True)
  return state


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('initial') / 'run'
  return path, save(path)


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_workdir_gives_its_teacher_and_the_heads_that_only_the_student_has(workdir):
  path, state = workdir
  loaded = load(path)
  teacher = state_lib.teacher_of(state)
  assert set(loaded) == {'backbone', 'projection', 'reconstruction'}
  assert_equal(loaded['backbone'], teacher['backbone'])
  assert_equal(loaded['projection'], teacher['projection'])
  assert_equal(loaded['reconstruction'], state.params['reconstruction'])


def test_the_student_is_there_for_the_asking(workdir):
  path, state = workdir
  loaded = load(path, which='student')
  assert_equal(loaded['backbone'], state.params['backbone'])
  assert_equal(loaded['projection'], state.params['projection'])


def test_a_run_without_a_teacher_gives_its_student(tmp_path):
  state = save(tmp_path / 'run', **{'teacher.enabled': False, 'objective.distillation_weight': 0.0})
  loaded = load(tmp_path / 'run')
  assert_equal(loaded['backbone'], state.params['backbone'])
  assert_equal(loaded['reconstruction'], state.params['reconstruction'])
  assert 'projection' not in loaded  # starts fresh


def test_positions_are_resampled_to_another_image_size(workdir):
  path, state = workdir
  backbone = load(path, image_size=32)['backbone']
  saved = state_lib.teacher_of(state)['backbone']
  resampled = models.resample_position_embedding(saved['pos_embed'], (2, 2), (4, 4))
  np.testing.assert_array_equal(backbone['pos_embed'], resampled)
  assert_equal(backbone['blocks'], saved['blocks'])
  assert_equal(backbone['patch_embed'], saved['patch_embed'])


def test_heads_of_other_shapes_start_fresh(workdir):
  path, state = workdir
  loaded = load(path, **{'projection.outputs': 64})
  assert set(loaded) == {'backbone', 'reconstruction'}


@pytest.mark.parametrize('image_size', [16, 24])
def test_a_timm_file_gives_the_backbone(workdir, tmp_path, image_size):
  saved = workdir[1].params['backbone']
  names = timm.to_timm(saved) | {'head.weight': np.zeros((10, 24), np.float32)}
  safetensors.numpy.save_file(names, tmp_path / 'vit.safetensors')
  loaded = load(tmp_path / 'vit.safetensors', image_size=image_size)
  side = image_size // 8
  assert set(loaded) == {'backbone'}
  expected = saved | {
    'pos_embed': models.resample_position_embedding(saved['pos_embed'], (2, 2), (side, side))
  }
  assert_equal(loaded['backbone'], expected)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'model.depth': 3}, 'blocks.2.norm1.weight'),
    ({'model.depth': 1}, 'blocks.1.norm1.weight'),
    ({'model.width': 48}, 'cls_token (file [1, 1, 24], model [1, 1, 48])'),
    ({'model.layer_scale': 0.1}, 'blocks.0.ls1.gamma'),
  ],
)
def test_another_architecture_is_refused_by_name(workdir, changes, words):
  with pytest.raises(UserError) as refused:
    load(workdir[0], **changes)
  assert words in str(refused.value) and '\n' not in str(refused.value)


def test_paths_that_hold_no_weights_are_refused(tmp_path, workdir):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'begun').mkdir()
  (tmp_path / 'begun' / 'config.json').write_text((workdir[0] / 'config.json').read_text())
  (tmp_path / 'cut.safetensors').write_bytes(b'\x10')
  for name, words in {
    'nowhere': "nowhere' does not exist: give a workdir, or a .safetensors",
    'empty': 'is no workdir (it has no config.json)',
    'begun': 'no checkpoint in ',
    'cut.safetensors': 'cut.safetensors: damaged',
  }.items():
    with pytest.raises(UserError) as refused:
      load(tmp_path / name)
    assert words in str(refused.value)


@pytest.fixture(scope='module')
def resnet_variables():
  """A small ResNet's parameters and the statistics of two networks, random."""
  model = models.make_backbone('resnet', 32, depth=10, width=4)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)
  trees = (shapes['params'], shapes['params'], shapes['batch_stats'], shapes['batch_stats'])
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trees)


def test_a_timm_file_of_a_resnet_gives_its_statistics_too(resnet_variables, tmp_path):
  params, _, statistics, _ = resnet_variables
  file = tmp_path / 'resnet.safetensors'
  safetensors.numpy.save_file(timm.to_timm(params, statistics), file)
  loaded = initial.load(str(file), {'backbone': params}, image_size=96, patch=32)
  assert set(loaded) == {'backbone', 'batch_stats'}
  assert_equal(loaded['backbone'], params)
  assert_equal(loaded['batch_stats'], statistics)


@pytest.mark.parametrize('teacher_enabled', [True, False])
def test_a_workdir_of_a_resnet_gives_one_network_and_its_clean_statistics(
  resnet_variables, tmp_path, teacher_enabled
):
  student, teacher, seen, clean = resnet_variables
  config = make_config(**{'teacher.enabled': teacher_enabled})
  (tmp_path / 'config.json').write_text(config_lib.to_json(config))
  networks = ('student', 'teacher') if teacher_enabled else ('student',)
  state = {
    'params': {'backbone': student},
    'opt_state': {'teacher': {'backbone': teacher}} if teacher_enabled else {'count': np.zeros(1)},
    'extra': {
      'batch_stats': dict.fromkeys(networks, seen),
      'clean_stats': {'student': clean},
    },
  }
  with checkpoint.Checkpoints(str(tmp_path / 'checkpoints'), every=1, keep=1) as checkpoints:
    checkpoints.save(3, state, {}, force=True)
  loaded = initial.load(str(tmp_path), {'backbone': student}, image_size=32, patch=32)
  assert set(loaded) == {'backbone', 'batch_stats'}
  assert_equal(loaded['backbone'], teacher if teacher_enabled else student)
  assert_equal(loaded['batch_stats'], seen if teacher_enabled else clean)


def test_a_resnet_does_not_start_from_a_vit(workdir, resnet_variables):
  with pytest.raises(UserError, match='conv1.weight.*unknown to the model: cls_token'):
    initial.load(str(workdir[0]), {'backbone': resnet_variables[0]}, image_size=32, patch=32)


@pytest.mark.parametrize('image_size', [16, 24])
def test_an_npz_gives_the_backbone_in_either_naming(workdir, tmp_path, image_size):
  saved = workdir[1].params['backbone']
  np.savez(tmp_path / 'timm.npz', **timm.to_timm(saved))
  np.savez(tmp_path / 'big_vision.npz', **timm.to_big_vision(saved, heads=2))
  side = image_size // 8
  for name in ('timm', 'big_vision'):
    expected = dict(saved)
    if name == 'big_vision':  # Where the class token holds its position.
      expected['cls_token'] = saved['cls_token'] + saved['pos_embed'][:, :1]
      expected['pos_embed'] = saved['pos_embed'].at[:, 0].set(0.0)
    expected['pos_embed'] = models.resample_position_embedding(
      expected['pos_embed'], (2, 2), (side, side)
    )
    loaded = load(tmp_path / f'{name}.npz', image_size=image_size)
    assert set(loaded) == {'backbone'}
    assert_equal(loaded['backbone'], expected)


def test_an_npz_of_another_architecture_or_of_something_else_is_refused(workdir, tmp_path):
  saved = workdir[1].params['backbone']
  np.savez(tmp_path / 'timm.npz', **timm.to_timm(saved))
  np.savez(tmp_path / 'big_vision.npz', **timm.to_big_vision(saved, heads=2))
  np.savez(tmp_path / 'foreign.npz', **{name: np.zeros(3) for name in 'abcde'})
  (tmp_path / 'cut.npz').write_bytes((tmp_path / 'timm.npz').read_bytes()[:900])
  for name, words in {
    'timm.npz': '12 unknown to the model: blocks.1.norm1.weight',
    'big_vision.npz': '16 unknown to the model: params/Transformer/encoderblock_1/',
    'foreign.npz': "neither big_vision's names .* it holds a, b, c, d, ...; export one",
    'cut.npz': 'damaged or not what its ending says',
  }.items():
    with pytest.raises(UserError, match=words):
      load(tmp_path / name, **{'model.depth': 1})


def test_heads_of_an_npz_are_checked_where_they_are_known(workdir, tmp_path):
  saved = workdir[1].params['backbone']
  np.savez(tmp_path / 'vit.npz', **timm.to_big_vision(saved, heads=2))
  sizes = {'image_size': 16, 'patch': 8}
  path, params = str(tmp_path / 'vit.npz'), {'backbone': saved}
  assert_equal(initial.load(path, params, **sizes), initial.load(path, params, **sizes, heads=2))
  with pytest.raises(UserError, match=r'query/kernel \(file \[24, 2, 12\], model \[24, 4, 6\]'):
    initial.load(path, params, **sizes, heads=4)


def test_an_npz_of_a_resnet_gives_its_statistics_too(resnet_variables, tmp_path):
  params, _, statistics, _ = resnet_variables
  np.savez(tmp_path / 'resnet.npz', **timm.to_timm(params, statistics))
  file = str(tmp_path / 'resnet.npz')
  loaded = initial.load(file, {'backbone': params}, image_size=96, patch=32)
  assert_equal(loaded, {'backbone': params, 'batch_stats': statistics})
