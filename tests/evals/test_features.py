"""Extraction of features: which rows, in which order, how many batches in flight."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from folk_jax.errors import UserError
from folk_jax.evals.features import Diverged, extract, feature
from folk_jax.models import BackboneOutput

ROOT = Path(__file__).parents[2]


def batches(count, size=4, padding=0):
  """Image i is filled with the value i and has label 10 * i; the last `padding` are invalid."""
  for start in range(0, count * size, size):
    number = np.arange(start, start + size)
    yield {
      'views': np.tile(number[:, None, None, None, None], (1, 1, 2, 2, 3)).astype(np.uint8),
      'label': (10 * number).astype(np.int32),
      'index': number,
      'valid': number < count * size - padding,
    }


def mean_colour(params, image_BHWC):
  return params * image_BHWC.astype(jnp.float32).mean(axis=(1, 2))


def output():
  pooled = jnp.array([[1.0, 2.0]], jnp.bfloat16)
  patches = jnp.array([[[[1.0, 10.0], [2.0, 20.0]], [[3.0, 30.0], [6.0, 60.0]]]])
  return BackboneOutput(pooled=pooled, patches=patches, layers={})


@pytest.mark.parametrize(
  'name, expected', [('pooled', [1, 2]), ('mean_patch', [3, 30]), ('concat', [1, 2, 3, 30])]
)
def test_features_by_name(name, expected):
  result = feature(output(), name)
  assert result.dtype == jnp.float32
  np.testing.assert_array_equal(result, [expected])


def test_an_unknown_feature_lists_the_known():
  with pytest.raises(UserError, match='pooled, mean_patch, concat'):
    feature(output(), 'cls')


def test_rows_keep_their_order_and_padding_is_dropped():
  done = []
  features, labels = extract(
    mean_colour, jnp.float32(2.0), batches(3, padding=3), progress=done.append
  )
  assert features.dtype == np.float32 and labels.dtype == np.int32
  np.testing.assert_array_equal(features, 2.0 * np.tile(np.arange(9)[:, None], (1, 3)))
  np.testing.assert_array_equal(labels, 10 * np.arange(9))
  assert done == [4, 4, 1]


def test_bfloat16_features_come_back_as_float32():
  features, _ = extract(lambda p, x: mean_colour(p, x).astype(jnp.bfloat16), 1.0, batches(1))
  assert features.dtype == np.float32
  np.testing.assert_array_equal(features[:, 0], np.arange(4))


def test_several_features_share_a_pass():
  def network(params, image_BHWC):
    colour = mean_colour(params, image_BHWC)
    return {'colour': colour, 'square': jnp.square(colour[:, :1])}

  features, labels = extract(network, jnp.float32(1.0), batches(2, padding=1))
  number = np.arange(7)[:, None]
  assert set(features) == {'colour', 'square'} and len(labels) == 7
  np.testing.assert_array_equal(features['colour'], np.tile(number, (1, 3)))
  np.testing.assert_array_equal(features['square'], number**2)


def test_one_batch_is_in_flight():
  events = []

  def watched():
    for number, batch in enumerate(batches(3)):
      events.append(f'draw {number}')
      yield batch

  extract(mean_colour, 1.0, watched(), progress=lambda _: events.append('fetched'))
  # A batch is fetched only once the next has been sent off.
  assert events == ['draw 0', 'draw 1', 'fetched', 'draw 2', 'fetched', 'fetched']


def test_the_same_function_is_traced_once():
  traces = []

  def network(params, image_BHWC):
    traces.append(image_BHWC.shape)
    return mean_colour(params, image_BHWC)

  for scale in (1.0, 2.0):
    extract(network, jnp.float32(scale), batches(3, padding=1))
  assert traces == [(4, 2, 2, 3)]


def test_put_places_the_images_as_the_caller_likes():
  placed = []

  def put(array):
    placed.append((array.dtype, array.shape))
    return jax.device_put(array)

  extract(mean_colour, 1.0, batches(2), put=put)
  assert placed == [(np.uint8, (4, 2, 2, 3))] * 2


def test_batches_without_a_valid_image_are_refused():
  for nothing in ([], batches(1, padding=4)):
    with pytest.raises(ValueError, match='no valid image'):
      extract(mean_colour, 1.0, nothing)


@pytest.mark.parametrize('named', [False, True])
def test_a_network_whose_features_are_not_finite_is_not_judged(named):
  def network(params, image_BHWC):
    # Black images are divided by zero; the first of each batch is one.
    feature_BD = 1 / mean_colour(params, image_BHWC.at[0].set(0))
    return {'mean': mean_colour(params, image_BHWC), 'inverse': feature_BD} if named else feature_BD

  with pytest.raises(Diverged, match='2 of 8 images features that are not finite'):
    extract(network, 1.0, batches(2))


def test_pairs_of_views_are_refused():
  batch = next(batches(1))
  with pytest.raises(ValueError, match='found'):
    extract(mean_colour, 1.0, [batch | {'views': np.repeat(batch['views'], 2, axis=1)}])


_ONE_OF_TWO_PROCESSES = """
import sys
import jax, numpy as np
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize('127.0.0.1:' + port, 2, process)
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from folk_jax.evals.features import extract
from folk_jax.evals.knn import knn

mesh = jax.make_mesh((2, 1), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
put = lambda x: jax.make_array_from_process_local_data(rows, x)
rng = np.random.default_rng(0)
views = rng.integers(0, 256, (18, 1, 2, 2, 3), dtype=np.uint8)
labels = (views.mean(axis=(1, 2, 3, 4)) > 128).astype(np.int32)

def share():
  for start in (0, 8, 16):
    number = np.arange(start + 4 * process, start + 4 * process + 4)
    row = np.minimum(number, 17)
    yield {'views': views[row], 'label': labels[row], 'valid': number < 18, 'index': number}

apply = lambda params, image: image.astype(jnp.float32).mean(axis=(1, 2)) - 128.0
with jax.set_mesh(mesh):
  features, found = extract(apply, (), share(), put=put)
  expected = views.astype(np.float32).mean(axis=(1, 2, 3)) - 128.0
  np.testing.assert_array_equal(found, labels)
  np.testing.assert_allclose(features, expected, rtol=1e-6)
  # Each image is its own nearest neighbour.
  result = knn(features, found, features[:7], found[:7], ks=(1,), classes=2, bank_block=4)
  assert result == {1: (1.0, 1.0)}
print('equal')
"""


def test_two_processes_get_all_features():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = str(probe.getsockname()[1])
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _ONE_OF_TWO_PROCESSES, str(number), port],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  try:
    answers = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (out, error) in zip(processes, answers, strict=True):
    assert process.returncode == 0, error
    assert out.splitlines()[-1] == 'equal'
