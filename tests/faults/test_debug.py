"""`config.debug`: its checks hold where nothing is wrong, and name what is where something is."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import checkpoint, objectives
from folk_jax import config as config_lib
from folk_jax.objectives import losses
from folk_jax.signal import fourier
from folk_jax.train import debug, loop, origins
from folk_jax.train import run as run_lib
from folk_jax.train.guard import RunStopped

ROOT = pathlib.Path(__file__).resolve().parents[2]

ON_EIGHT = """
import importlib.util, sys
import jax
import jax.numpy as jnp
import numpy as np

spec = importlib.util.spec_from_file_location('test_debug', sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
from folk_jax.train import loop, sharding
from folk_jax.train.guard import RunStopped

assert jax.device_count() == 8
config = tests.folk_config(accumulate=2, **{'mesh.fsdp': 2})
made = tests.run_lib.make_run(config, 40)
mesh = sharding.make_mesh(2)
with jax.set_mesh(mesh):
  abstract = jax.eval_shape(made.new_state, jax.random.key(0), {})
  state = loop.new_state(config, made, sharding.state_shardings(abstract, mesh))
  batch = {
    'views': np.random.default_rng(0).integers(0, 256, (16, 2, 16, 16, 3), np.uint8),
    'index': np.arange(16),
  }
  batch = sharding.put_batch(batch, mesh)
  debugger = tests.debug.Debugger(made.objective, made.step, 0, state, mesh)
  assert debugger.failed(state, batch) == []
  backbone = dict(state.params['backbone'])
  backbone['norm'] = jax.tree.map(lambda leaf: leaf * jnp.nan, backbone['norm'])
  state = state.replace(params=state.params | {'backbone': backbone})
  failed = debugger.failed(state, batch)
  assert failed[0] == 'parameters backbone/norm: finite', failed
  assert not any(name.startswith(('views', 'masks', 'targets', 'teacher')) for name in failed), failed
print('checked on eight')
"""


def folk_config(**changes):
  config = config_lib.load_recipe(str(ROOT / 'configs' / 'vit_b.py'), 'smoke')
  config.update_from_flattened_dict(
    {
      'image_size': 16,
      'model.width': 24,
      'model.depth': 1,
      'model.heads': 2,
      'projection.hidden': 32,
      'projection.bottleneck': 16,
      'projection.outputs': 24,
    }
    | changes
  )
  for view in (config.views.view_1, config.views.view_2):
    view.update({'jitter_probability': 0.0, 'blur_probability': 0.0})  # Long to compile.
  return config


@pytest.fixture(scope='module')
def folk():
  return run_lib.make_run(folk_config(), 40).objective


@pytest.fixture(scope='module')
def images():
  keys = jax.random.split(jax.random.key(1), 6)
  return jax.random.uniform(jax.random.key(0), (6, 16, 15, 3)), keys


def failed_in(checks):
  return [name for name, holds in checks.items() if not holds]


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'ranking': 'per_channel', 'clamp': True},
    {'filter': 'random_block'},
    {'filter': 'wavelet'},
  ],
)
def test_the_checks_of_filters_hold(folk, images, changes):
  """Also for black images, whose coefficients all tie."""
  image_NHWC, keys_N = images
  image_NHWC = image_NHWC.at[0].set(0.0)
  found = debug.filter_checks(dataclasses.replace(folk, **changes), image_NHWC, keys_N)
  assert failed_in(found) == []
  symmetric = 'masks: conjugate-symmetric' in found
  assert symmetric == (changes.get('filter') != 'wavelet')
  assert ('masks: no more coefficients than asked' in found) == ('filter' not in changes)
  assert ('filtered views: in [0, 1]' in found) == ('clamp' in changes)


def one_of_a_pair(mask):
  return mask.at[:, 3, 0].set(True).at[:, -3, 0].set(False)


@pytest.mark.parametrize(
  'broken, check',
  [
    (one_of_a_pair, 'masks: conjugate-symmetric'),
    (lambda mask: mask & False, 'masks: as many coefficients as asked'),
    (lambda mask: mask | True, 'masks: no more coefficients than asked'),
  ],
)
def test_a_mask_that_is_wrong_is_named(folk, images, monkeypatch, broken, check):
  right = fourier.top_mask
  monkeypatch.setattr(fourier, 'top_mask', lambda *given: broken(right(*given)))
  assert check in failed_in(debug.filter_checks(folk, *images))


def test_targets_that_are_no_distribution_are_named(folk, monkeypatch):
  params, extra = folk.init(jax.random.key(0), None)
  teacher = {part: params[part] for part in folk.teacher_parts}
  image_NHWC = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
  assert failed_in(debug.teacher_checks(folk, teacher, extra, image_NHWC)) == []
  monkeypatch.setattr(losses, 'teacher_probabilities', lambda logits, *_: jax.nn.sigmoid(logits))
  found = debug.teacher_checks(folk, teacher, extra, image_NHWC)
  assert failed_in(found) == ['targets: rows sum to 1']
  monkeypatch.undo()
  extra = extra | {'centre': extra['centre'].at[3].set(jnp.nan)}
  found = debug.teacher_checks(folk, teacher, extra, image_NHWC)
  assert failed_in(found)[0] == 'targets: finite'


@pytest.mark.slow
def test_a_step_of_folk_is_checked_on_eight_devices_with_microbatches(run_with_devices):
  assert 'checked on eight' in run_with_devices(ON_EIGHT, __file__)


@pytest.fixture
def brittle(support, monkeypatch):
  method = support('brittle')
  monkeypatch.setitem(objectives.OBJECTIVES, 'brittle', method.Brittle)
  recipe = str(ROOT / 'configs' / 'vit_b.py')
  return lambda *given, **changes: method.make_config(
    config_lib.load_recipe(recipe, 'smoke'), *given, **changes
  )


def test_a_run_stops_at_the_first_check_that_fails_and_names_image_and_operation(brittle, tmp_path):
  config = brittle((7,), accumulate=2, debug=True)
  with pytest.raises(RunStopped) as stopped:
    loop.pretrain(config, str(tmp_path))
  said = str(stopped.value)
  assert 'config.debug: step 1 fails the check "metric loss_distance: finite"' in said
  assert 'First in image 7: weighing: div gave nan in float32[1]' in said


def test_checks_change_nothing(brittle, tmp_path):
  for name in (True, False):
    config = brittle((), debug=name, total_steps=3)
    loop.pretrain(config, str(tmp_path / str(name)))
  found, expected = (
    checkpoint.read_subtree(str(tmp_path / name / 'checkpoints'), (), 3)[0]
    for name in ('True', 'False')
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def network(params, x):
  with jax.named_scope('net'):
    hidden = jnp.where(x > 0, jnp.log(x), 0.0)  # Infinities that a mask covers.

    def block(carry, weight):
      with jax.named_scope('block'):
        return jax.nn.relu(carry * weight), None

    hidden, _ = jax.lax.scan(jax.checkpoint(block), hidden, params['weight'])
  return hidden.sum()


@pytest.mark.parametrize(
  'weight, x, words',
  [
    ([1.0, 2.0], [0.0, 1.0, 2.0], None),
    ([1.0, 1e38, 1e38], [0.0, 1.0, 9.0], 'net[2]/block: mul gave inf in float32[3]'),
    ([1.0, np.nan], [1.0, 2.0, 3.0], 'weight: input gave nan in float32[2]'),
    ([1.0], [1.0, np.inf], 'x: input gave inf in float32[2]'),
  ],
)
def test_the_origin_is_what_reached_the_result(weight, x, words):
  inputs = {'weight': jnp.array(weight)}, {'x': jnp.array(x)}
  found = origins.first_nonfinite(lambda params, batch: network(params, batch['x']), *inputs)
  assert (found is None) if words is None else str(found).startswith(words)
  if words and 'mul' in words:
    assert 'tests/faults/test_debug.py:' in str(found)


def test_the_origin_of_a_gradient():
  """sqrt is finite at 0, and its slope is not."""
  found = origins.first_nonfinite(jax.grad(lambda x: jnp.sqrt(x).sum()), jnp.array([0.0, 1.0]))
  assert (found.operation, found.found) == ('div', 'inf')
