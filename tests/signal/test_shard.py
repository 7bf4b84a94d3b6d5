"""Filters and distance on eight devices: the same numbers as on one, and nothing gathered."""

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.signal import shard

EIGHT_DEVICES = """
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from folk_jax.errors import UserError
from folk_jax.signal import augment, fourier, shard

VIEW = augment.Augmentation(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, 0.5, (0.1, 2.0), 0.2)


def filtered_distance(prediction, image, keys, scale):
  k, com = fourier.draw_filters(keys, (0.01, 0.05), 0.5, *image.shape[1:3])
  filtered = fourier.filter_images(image, k, com)
  total, count = fourier.frequency_distance(prediction, scale * image, ~filtered.kept_BHFC)
  return filtered, total / count


def loss(prediction, image, keys, scale):
  view = augment.augment(image, keys, VIEW)
  filtered, distance = shard.over_batch(
    filtered_distance, prediction, view, keys, replicated=(scale,)
  )
  return distance.mean(), filtered


step = jax.jit(jax.value_and_grad(loss, has_aux=True))
random = np.random.default_rng(0)
prediction, image = random.random((2, 16, 24, 30, 3), dtype=np.float32)
keys = jax.random.split(jax.random.key(0), 16)
scale = jnp.asarray(0.5)
(value, filtered), gradient = step(prediction, image, keys, scale)

assert jax.device_count() == 8
mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
  sharding = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
  batch = jax.device_put((prediction, image, keys), sharding)
  (value_8, filtered_8), gradient_8 = step(*batch, scale)
  compiled = step.lower(*batch, scale).compile()
  assert gradient_8.sharding.is_equivalent_to(sharding, 4)
  assert filtered_8.image_BHWC.sharding.is_equivalent_to(sharding, 4)
  with pytest.raises(UserError, match='batch of 12 images .* 8 devices'):
    shard.over_batch(fourier.half_spectrum, image[:12])

text = compiled.as_text()
assert ' fft(' in text
for collective in ('all-gather', 'all-to-all', 'collective-permute'):
  assert collective not in text, collective
# The mean over the batch is the one thing that devices tell each other.
assert text.count(' all-reduce(') + text.count(' all-reduce-start(') <= 1
# The same programs on fewer images each; sums may run in another order.
np.testing.assert_array_equal(filtered_8.kept_BHFC, filtered.kept_BHFC)
np.testing.assert_allclose(filtered_8.image_BHWC, filtered.image_BHWC, atol=1e-6)
np.testing.assert_allclose(value_8, value, rtol=1e-6)
np.testing.assert_allclose(gradient_8, gradient, atol=1e-6 * np.abs(gradient).max())
"""

IN_A_LOOP = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from folk_jax.signal import shard


def local(rows, weight):
  weight = shard.one_a_device(weight)
  parts = jax.lax.map(lambda part: jnp.tanh(part @ weight), rows.reshape(4, -1, 3))
  return parts.reshape(rows.shape)


gradient = jax.jit(
  jax.grad(lambda weight, rows: shard.over_batch(local, rows, replicated=(weight,)).sum())
)
random = np.random.default_rng(0)
rows, weight = random.normal(size=(64, 3)), random.normal(size=(3, 3))
one = gradient(weight, rows)
with jax.set_mesh(jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))):
  eight = gradient(weight, rows)
  text = gradient.lower(weight, rows).compile().as_text()
np.testing.assert_allclose(eight, one, rtol=1e-5)
assert ' while(' in text
assert text.count(' all-reduce(') == 1
assert text.index(' all-reduce(') > text.index('\\nENTRY ')
"""


def test_eight_devices_equal_one_and_gather_nothing(run_with_devices):
  run_with_devices(EIGHT_DEVICES)


def test_gradients_of_what_each_device_got_whole_are_summed_once(run_with_devices):
  run_with_devices(IN_A_LOOP)


def test_without_a_mesh_the_function_runs_as_it_stands():
  calls = []

  def fn(tree, nothing, offset):
    calls.append(nothing)
    return {'sum': tree['a'] + tree['b'] + offset}

  tree = {'a': jnp.arange(3.0), 'b': jnp.ones(3)}
  result = shard.over_batch(fn, tree, None, replicated=(10,))
  np.testing.assert_array_equal(result['sum'], [11, 12, 13])
  assert calls == [None]


def test_on_a_mesh_of_one_device_the_function_runs_as_it_stands():
  mesh = jax.make_mesh((1, 1), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(lambda x: shard.over_batch(jnp.sin, x))(jnp.ones(3))
  assert [equation.primitive.name for equation in jaxpr.eqns] == ['sin']
