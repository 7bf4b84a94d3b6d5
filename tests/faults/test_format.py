"""Checkpoints as an interface: versions, the configuration inside, and export far from the machine that trained."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import hostile  # noqa: E402  # Tests and trials share the files.

from folk_jax import checkpoint, export  # noqa: E402
from folk_jax import config as config_lib  # noqa: E402
from folk_jax.errors import UserError  # noqa: E402


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('format')


def here(tree):
  sharding = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


STATE = {'params': {'a': np.arange(4, dtype=np.float32)}}


def with_meta(folder, meta: dict) -> pathlib.Path:
  """A checkpoint whose meta somebody has written anew, without digests."""
  text = json.dumps(meta).encode()
  return hostile.changed(folder, lambda step: (step / 'meta' / 'metadata').write_bytes(text))


def test_a_step_says_its_version_and_what_the_run_says_of_itself(folder):
  path = hostile.saved(folder)
  meta = json.loads((path / '1' / 'meta' / 'metadata').read_text())
  assert meta == {'config': {}, 'format_version': checkpoint.FORMAT_VERSION}


def test_a_step_without_a_version_is_read_where_its_tree_is_the_same(folder):
  assert hostile.format_zero(folder) == ''
  path = with_meta(folder, {'config': {}})
  with checkpoint.Checkpoints(str(path), 0, 1) as checkpoints:
    state, meta = checkpoints.restore(here(STATE))
    np.testing.assert_array_equal(state['params']['a'], STATE['params']['a'])
    assert meta['format_version'] == 0
    with pytest.raises(UserError, match='does not fit this configuration: params.b: found nothing'):
      checkpoints.restore(here({'params': STATE['params'] | {'b': jnp.zeros(2)}}))


def test_a_newer_version_is_refused_and_never_passed_over(folder):
  """A step before it that could be read is no reason to lose the newest."""
  path = with_meta(folder, {'format_version': checkpoint.FORMAT_VERSION + 1})
  (path / '1').rename(path / '2')
  hostile.saved(folder)
  subprocess.run(['cp', '-r', str(folder / 'saved' / '1'), str(path)], check=True)
  with checkpoint.Checkpoints(str(path), 0, 9) as checkpoints:
    with pytest.raises(UserError, match='step 2 in .* has format 2; .* update folk_jax'):
      checkpoints.restore(here(STATE))
  assert sorted(one.name for one in path.iterdir()) == ['1', '2']


# Saved on a mesh of 2 x 4 devices as the train state of a small ViT is, its layers split over four.
ON_EIGHT = """
import json, pathlib, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from folk_jax import checkpoint, models

workdir, config = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
model = {k: v for k, v in config['model'].items() if k in ('width', 'depth', 'heads', 'patch')}
vit = models.make_backbone('vit', config['image_size'], **model)
image = np.zeros((1, config['image_size'], config['image_size'], 3), np.float32)
params = {'backbone': vit.init(jax.random.key(0), image)['params']}
mesh = jax.make_mesh((2, 4), ('data', 'fsdp'))

def spread(x):
  fits = x.ndim > 1 and x.shape[-1] % 4 == 0
  spec = PartitionSpec(*[None] * (x.ndim - 1), 'fsdp') if fits else PartitionSpec()
  return jax.device_put(x, NamedSharding(mesh, spec))

state = {'params': jax.tree.map(spread, params)}
assert any(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in jax.tree.leaves(state))
workdir.mkdir()
(workdir / 'config.json').write_text(json.dumps(config))
with checkpoint.Checkpoints(str(workdir / 'checkpoints'), 1, 1) as checkpoints:
  checkpoints.save(1, state, {'config': config})
np.save(workdir / 'norm.npy', np.asarray(params['backbone']['norm']['scale']))
"""


def small_config() -> dict:
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.update_from_flattened_dict(
    {
      'image_size': 16,
      'model.width': 16,
      'model.depth': 1,
      'model.heads': 2,
      'teacher.enabled': False,
    }
  )
  return json.loads(config_lib.to_json(config))


def test_eight_devices_write_and_one_without_data_libraries_exports(tmp_path, run_with_devices):
  workdir = tmp_path / 'run'
  run_with_devices(ON_EIGHT, str(workdir), json.dumps(small_config()), devices=8)
  done = subprocess.run(
    [sys.executable, '-c', hostile.EXPORT, str(workdir), 'student'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  from folk_jax.interop import timm

  found = timm.load_timm_file(workdir / 'export' / 'student_1.safetensors')
  np.testing.assert_array_equal(found['norm.weight'], np.load(workdir / 'norm.npy'))


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('[' * 100_000, 'config.json is damaged'),
    ('[]', 'holds a list, expected a JSON object'),
    ('{"a": ' * 100 + '1' + '}' * 100, 'nests deeper than 64 levels'),
    ('\xff', 'config.json is damaged'),
    ('{}', "is no run's configuration: teacher.enabled is None, expected a bool"),
    (' ' * (5 << 20), r'has 5242880 bytes, and a file of its kind at most 4194304'),
  ],
)
def test_a_config_that_is_none_is_refused_in_a_line(tmp_path, text, words):
  (tmp_path / 'config.json').write_bytes(text.encode('latin1'))
  with pytest.raises(UserError, match=words) as error:
    export.read_config(str(tmp_path))
  assert '\n' not in str(error.value)


def test_a_config_of_another_shape_names_the_field(tmp_path):
  config = small_config()
  for change, words in (
    ({'model': 'vit'}, 'model.name is None, expected a str'),
    ({'model': {'name': 'gpt'}}, "model.name 'gpt' has no names in timm; known: vit, resnet"),
    ({'model': {'name': 'vit', 'width': 3}}, 'it lacks model.depth'),
    ({'image_size': '16'}, "image_size is '16', expected a int"),
  ):
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
      export.read_config(str(tmp_path))
