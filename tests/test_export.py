"""The export command on a real checkpoint: what it writes, what it refuses, and that timm
agrees."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from folk_jax import checkpoint, config, export
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
def test_the_lines_of_the_readme_load_it(workdir, tmp_path):
  import timm

  out = export.export(str(workdir[0]), out=str(tmp_path / 'w.safetensors'))
  about = json.loads((tmp_path / 'w.json').read_text())
  model = timm.create_model(about['model'], checkpoint_path=out, **about['args'])
  loaded = {name: value.numpy() for name, value in model.state_dict().items()}
  expected = safetensors.numpy.load_file(out)
  assert loaded.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(loaded[name], value)


@pytest.mark.parity
def test_verify_compares_with_timm_and_refuses_a_difference(workdir, tmp_path, monkeypatch):
  out = export.export(str(workdir[0]), verify=True, out=str(tmp_path / 'w.safetensors'))
  assert 0 < json.loads((tmp_path / 'w.json').read_text())['verified_max_difference'] < 1e-4
  assert out.endswith('w.safetensors')
  monkeypatch.setattr(export, 'VERIFY_TOLERANCE', 0.0)
  with pytest.raises(UserError, match='nothing was written'):
    export.export(str(workdir[0]), verify=True, out=str(tmp_path / 'never.safetensors'))
  assert not (tmp_path / 'never.safetensors').exists()
