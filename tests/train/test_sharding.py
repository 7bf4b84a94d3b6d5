"""What lies where; eight devices compute what one does; the full recipe lowers for eight."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from folk_jax.train import sharding

STEPS = pathlib.Path(__file__).parents[1] / 'support' / 'eight_devices.py'

FULL_RECIPE = """
import jax
import jax.numpy as jnp
from folk_jax import config
from folk_jax.train import loop, run, sharding

c = config.load_recipe('configs/vit_b.py')
config.validate(c)
config.check_layout(c.batch_size, c.accumulate, jax.device_count(), c.mesh.fsdp)
made = run.make_run(c, images=1281167)
mesh = sharding.make_mesh(c.mesh.fsdp)
state = jax.eval_shape(made.new_state, jax.random.key(0), {})
batch = {
  'views': jax.ShapeDtypeStruct((1024, 2, 224, 224, 3), jnp.uint8),
  'label': jax.ShapeDtypeStruct((1024,), jnp.int32),
  'index': jax.ShapeDtypeStruct((1024,), jnp.int32),
  'valid': jax.ShapeDtypeStruct((1024,), jnp.bool),
}
with jax.set_mesh(mesh):
  lowered = loop.compile_step(made, state, mesh).lower(state, batch)
print(made.total_steps)
print(sum(leaf.size for leaf in jax.tree.leaves(state.params['backbone'])))
print('tensor<256x224x224x3xf32>' in lowered.as_text())
print(jax.tree.leaves(lowered.out_info)[0].shape, len(jax.live_arrays()))
"""


def test_parameters_are_spread_along_their_largest_axis_that_divides():
  mesh = jax.sharding.AbstractMesh(
    (2, 4), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  shapes = {
    'rows': (2**15, 8),
    'columns': (8, 2**15),
    'second': (3, 2**14, 4),  # 2^14, though 3 * 2^14 * 4 leaves it in the middle
    'prime': (257, 257),
    'exact': (2**14, 4),
    'small': (2**16 - 4,),
    'scalar': (),
  }
  state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  specs = {name: s.spec for name, s in sharding.state_shardings(state, mesh).items()}
  assert specs == {
    'rows': PartitionSpec('fsdp'),
    'columns': PartitionSpec(None, 'fsdp'),
    'second': PartitionSpec(None, 'fsdp'),
    'prime': PartitionSpec(),
    'exact': PartitionSpec('fsdp'),
    'small': PartitionSpec(),
    'scalar': PartitionSpec(),
  }


def test_without_fsdp_every_device_holds_everything():
  mesh = jax.sharding.AbstractMesh(
    (8, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  state = {'large': jax.ShapeDtypeStruct((2**12, 2**12), jnp.float32)}
  assert sharding.state_shardings(state, mesh)['large'].spec == PartitionSpec()


def test_a_batch_keeps_its_values_and_its_numbers_become_int32():
  mesh = sharding.make_mesh()
  batch = {
    'views': np.arange(12, dtype=np.uint8).reshape(4, 3),
    'index': np.array([3, 1, 2**31 - 1, -1]),
  }
  placed = sharding.put_batch(batch, mesh)
  assert placed['index'].dtype == jnp.int32 and placed['views'].dtype == jnp.uint8
  for name, rows in batch.items():
    np.testing.assert_array_equal(placed[name], rows)
    assert placed[name].sharding.spec == PartitionSpec(sharding.AXES)


@pytest.fixture(scope='module')
def steps(run_with_devices):
  """One step of FOLK's smoke recipe on 1 and on 8 devices; see support/eight_devices.py."""
  return json.loads(run_with_devices(STEPS, timeout=600).splitlines()[-1])


LAYOUTS = ('8 devices', '8 devices, fsdp 4, accumulate 2')


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
def test_losses_and_gradients_equal_those_of_one_device(steps, layout):
  for name, expected in steps['1 device']['losses'].items():
    assert steps[layout]['losses'][name] == pytest.approx(expected, rel=1e-5), name
  assert len(steps[layout]['gradient_errors']) > 20
  # Largest difference over the largest value, of each parameter's gradient by itself.
  for name, error in steps[layout]['gradient_errors'].items():
    assert error < 1e-5, name
  assert steps[layout]['centre_error'] < 1e-5
  assert steps[layout]['teacher_error'] < 1e-5


@pytest.mark.slow
def test_key_biases_which_have_no_gradient_were_left_out_for_a_reason(steps):
  """Softmax doesn't see a vector that is added to all keys: what is left there is rounding."""
  assert steps['1 device']['key_bias_share'] < 1e-5


@pytest.mark.slow
def test_fsdp_really_spreads_the_state(steps):
  assert steps['8 devices']['sharded_leaves'] == 0
  assert steps['8 devices, fsdp 4, accumulate 2']['sharded_leaves'] > 10


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
def test_no_image_leaves_its_device(steps, layout):
  """Collectives that move data between devices stay below one device's share of the pixels.

  Without fsdp there is none of them at all: devices add up sums (all-reduce), and that is it.
  """
  moved = steps[layout]['moved']
  assert steps[layout]['all_reduces'] > 0
  if layout == '8 devices':
    assert moved == []
  for operation, elements in moved:
    assert elements < steps['pixels_per_device'], operation


@pytest.mark.slow
def test_the_full_recipe_lowers_at_batch_1024_over_eight_devices(run_with_devices):
  """ViT-B/16 at 224 pixels on ImageNet's 1,281,167 images, from shapes alone."""
  total, parameters, sharded, rest = run_with_devices(FULL_RECIPE).splitlines()
  assert int(total) == round(300 * 1281167 / 1024)
  assert int(parameters) == 85_798_656  # timm's vit_base_patch16_224 without its classifier
  assert sharded == 'True'  # 2048 views, 256 a device, inside shard_map
  assert rest == '() 0'  # the step's number; and no array was ever made
