"""The export command on a real checkpoint: what it writes, what it refuses, and that timm
agrees."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from folk_jax import checkpoint, config, export, models
from folk_jax.errors import UserError
from folk_jax.interop import timm as interop
from folk_jax.train.run import make_run


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A workdir with a checkpoint at step 3 whose teacher and student differ."""
  path = tmp_path_factory.mktemp('run')
  recipe = config.load_recipe('configs/vit_b.py', 'smoke')
  (path / 'config.json').write_text(config.to_json(recipe))
  state = jax.jit(make_run(recipe, images=64).new_state)(jax.random.key(0), {})
  state = state.replace(params=jax.tree.map(lambda leaf: leaf + 0.1, state.params))
  with checkpoint.Checkpoints(str(path / 'checkpoints'), every=1, keep=1) as checkpoints:
    checkpoints.save(3, state, {}, force=True)
  return path, state


MODEL = {'depth': 14, 'width': 8, 'dtype': 'bfloat16'}


@pytest.fixture(scope='module')
def resnet_workdir(tmp_path_factory):
  """A ResNet's workdir, and its trees by network: the student's statistics are recalibrated."""
  path = tmp_path_factory.mktemp('resnet')
  recipe = config.load_recipe('configs/vit_b.py', 'smoke').to_dict()
  recipe['model'] = {'name': 'resnet', **MODEL}
  (path / 'config.json').write_text(json.dumps(recipe))
  model = models.make_backbone('resnet', 32, **MODEL)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)

  def draw(tree):
    # Random, none at an initial 0 or 1, and near enough to what training gives that features stay of order 1.
    def leaf_of(leaf):
      if leaf.ndim == 1:
        return rng.uniform(0.5, 1.0, leaf.shape).astype(np.float32)
      return rng.normal(0, 0.5 * np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)

    return jax.tree.map(leaf_of, tree)

  student, teacher = draw(shapes['params']), draw(shapes['params'])
  seen, clean = (
    {'student': draw(shapes['batch_stats']), 'teacher': draw(shapes['batch_stats'])}
    for _ in range(2)
  )
  state = {
    'params': {'backbone': student},
    'opt_state': ({}, {'teacher': {'backbone': teacher}}),
    'extra': {'batch_stats': seen, 'clean_stats': {'student': clean['student']}},
  }
  with checkpoint.Checkpoints(str(path / 'checkpoints'), every=1, keep=1) as checkpoints:
    checkpoints.save(5, state, {}, force=True)
  return path, {'student': (student, clean['student']), 'teacher': (teacher, seen['teacher'])}


def test_student_and_teacher_are_each_their_own(workdir):
  path, state = workdir
  files = {which: export.export(str(path), which=which) for which in ('student', 'teacher')}
  student, teacher = (safetensors.numpy.load_file(files[which]) for which in ('student', 'teacher'))
  expected = interop.to_timm(state.params['backbone'])
  assert student.keys() == teacher.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(student[name], value)
  assert not np.array_equal(student['cls_token'], teacher['cls_token'])
  assert files['teacher'].endswith('export/teacher_3.safetensors')


def test_the_description_says_model_and_preprocessing(workdir, tmp_path):
  out = export.export(str(workdir[0]), out=str(tmp_path / 'deep' / 'w.safetensors'))
  about = json.loads((tmp_path / 'deep' / 'w.json').read_text())
  assert out == str(tmp_path / 'deep' / 'w.safetensors')
  assert about['model'] == 'vit_base_patch16_224' and about['args']['img_size'] == 32
  assert about['preprocessing']['mean'] == [0.485, 0.456, 0.406]
  assert about['preprocessing']['crop_pct'] == pytest.approx(32 / 36)
  assert (about['which'], about['step']) == ('teacher', 3)
  assert sorted(file.name for file in (tmp_path / 'deep').iterdir()) == ['w.json', 'w.safetensors']


def test_big_vision_layout(workdir, tmp_path):
  out = export.export(str(workdir[0]), kind='npz', out=str(tmp_path / 'w.npz'))
  # Its class token holds its position already.
  assert json.loads((tmp_path / 'w.json').read_text())['args']['no_embed_class'] is True
  with np.load(out, allow_pickle=False) as archive:
    name = 'params/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel'
    assert archive[name].shape == (48, 3, 16)


@pytest.mark.parametrize('which', ['student', 'teacher'])
def test_a_resnet_has_its_own_statistics_and_the_clean_ones_where_there_are_any(
  resnet_workdir, tmp_path, which
):
  path, trees = resnet_workdir
  out = export.export(str(path), which=which, out=str(tmp_path / 'w.safetensors'))
  written, expected = safetensors.numpy.load_file(out), interop.to_timm(*trees[which])
  assert written.keys() == expected.keys() and 'bn1.running_var' in written
  for name, value in expected.items():
    assert written[name].dtype == value.dtype
    np.testing.assert_array_equal(written[name], value)
  about = json.loads((tmp_path / 'w.json').read_text())
  assert about['model'] == 'resnet50'
  assert about['args'] == {
    'num_classes': 0,
    'layers': [1, 1, 1, 1],
    'channels': [8, 16, 32, 64],
  }
  assert about['preprocessing']['input_size'] == [3, 32, 32]


def test_a_resnet_has_no_big_vision_layout(resnet_workdir, tmp_path):
  with pytest.raises(UserError, match="model is 'resnet': export with --format=timm"):
    export.export(str(resnet_workdir[0]), kind='npz', out=str(tmp_path / 'w.npz'))
  assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_the_statistics_is_refused(resnet_workdir, tmp_path):
  _, trees = resnet_workdir
  (tmp_path / 'config.json').write_text((resnet_workdir[0] / 'config.json').read_text())
  params, statistics = trees['student']
  state = {
    'params': {'backbone': params},
    'opt_state': {'teacher': {'backbone': params}},
    'extra': {'batch_stats': {'student': statistics}},
  }
  with checkpoint.Checkpoints(str(tmp_path / 'checkpoints'), every=1, keep=1) as checkpoints:
    checkpoints.save(1, state, {}, force=True)
  with pytest.raises(UserError, match='of the teacher.* there are: batch_stats/student'):
    export.export(str(tmp_path))


def test_refusals(workdir, tmp_path):
  path = str(workdir[0])
  with pytest.raises(UserError, match='no run'):
    export.export(str(tmp_path / 'absent'))
  with pytest.raises(UserError, match=r'no checkpoint of step 9 .* 3'):
    export.export(path, step=9)
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    export.export(path, out=str(tmp_path / 'file' / 'w.safetensors'))
  with pytest.raises(UserError, match=r'must end in \.npz'):
    export.export(path, kind='npz', out=str(tmp_path / 'w.safetensors'))
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match='damaged'):
    export.export(str(tmp_path))
  without = config.load_recipe('configs/vit_b.py', 'smoke')
  without.teacher.enabled = False
  (tmp_path / 'config.json').write_text(config.to_json(without))
  with pytest.raises(UserError, match='--which=student'):
    export.export(str(tmp_path))


def test_verify_without_torch_says_how_to_install_it(workdir, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'timm', None)  # what an import finds where timm is absent
  with pytest.raises(UserError, match='pip install torch torchvision timm'):
    export.export(str(workdir[0]), verify=True, out=str(tmp_path / 'w.safetensors'))
  assert not list(tmp_path.iterdir())


def test_the_command_exits_with_2_and_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'folk_jax.export', f'--workdir={tmp_path}'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1 and 'holds no run' in done.stderr


@pytest.mark.parity
@pytest.mark.parametrize('kind', ['workdir', 'resnet_workdir'])
def test_the_lines_of_the_readme_load_it(kind, request, tmp_path):
  import timm

  path, _ = request.getfixturevalue(kind)
  out = export.export(str(path), out=str(tmp_path / 'w.safetensors'))
  about = json.loads((tmp_path / 'w.json').read_text())
  model = timm.create_model(about['model'], checkpoint_path=out, **about['args'])
  loaded = {name: value.numpy() for name, value in model.state_dict().items()}
  expected = safetensors.numpy.load_file(out)
  assert loaded.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(loaded[name], value)


@pytest.mark.parity
@pytest.mark.parametrize('kind', ['workdir', 'resnet_workdir'])
def test_verify_compares_with_timm_and_refuses_a_difference(kind, request, tmp_path, monkeypatch):
  workdir = request.getfixturevalue(kind)
  out = export.export(str(workdir[0]), verify=True, out=str(tmp_path / 'w.safetensors'))
  assert 0 < json.loads((tmp_path / 'w.json').read_text())['verified_max_difference'] < 1e-4
  assert out.endswith('w.safetensors')
  monkeypatch.setattr(export, 'VERIFY_TOLERANCE', 0.0)
  with pytest.raises(UserError, match='nothing was written'):
    export.export(str(workdir[0]), verify=True, out=str(tmp_path / 'never.safetensors'))
  assert not (tmp_path / 'never.safetensors').exists()
