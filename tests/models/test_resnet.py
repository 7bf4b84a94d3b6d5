"""ResNet: timm's numbers, torch's BatchNorm by hand and over eight devices, and the laws of its parts."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import errors, models
from folk_jax.interop import timm as interop
from folk_jax.models import resnet

# index.json grants a float32 re-implementation these (atol, rtol) of the features.
FLOAT32_TOLERANCE = {'atol': 1.7e-4, 'rtol': 1e-4}
# Two compilations of one float32 function differ by the order of their sums only: some ulps of
# values of order 1.
SAME_MATHS = {'atol': 2e-5, 'rtol': 1e-4}
EIGHT_DEVICES = pathlib.Path(__file__).parents[1] / 'support' / 'resnet_devices.py'
SMALL = {'depth': 10, 'width': 4}


class Float64(resnet.ResNet):
  """The same network in float64, which users are refused."""

  def check(self):
    pass


@functools.cache
def _compiled(train=False, fields=(), **static):
  model = models.make_backbone('resnet', 32, **SMALL, **dict(fields))

  def run(params, statistics, image):
    return models.encode(model, params, statistics, image, train=train, **static)

  return jax.jit(run)


@pytest.fixture(scope='module')
def small():
  """Random parameters and statistics of a small ResNet, none at an initial 0 or 1, and images."""
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.normal(size=(6, 64, 32, 3)), jnp.float32)
  model = models.make_backbone('resnet', 32, **SMALL)
  fresh = jax.jit(model.init)(jax.random.key(0), image)

  def perturb(leaf):
    return leaf + jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype) * (leaf.ndim == 1)

  return *(jax.tree.map(perturb, fresh[name]) for name in ('params', 'batch_stats')), image


def _golden(numbers):
  """The golden model's fields, parameters and statistics, by way of timm's names."""
  layers, channels = numbers['cfg'][:4], numbers['cfg'][4:]
  assert tuple(layers) == resnet.DEPTHS[14][1] and list(channels) == [8, 16, 32, 64]
  fields = {'image_size': 64, 'depth': 14, 'width': 8}
  model = resnet.ResNet(**fields)
  template = jax.eval_shape(model.init, jax.random.key(0), numbers['x'])
  prefix = 'resnet.sd.'
  state = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
  params, statistics = interop.variables_from_timm(state, template['params'])
  assert jax.tree.structure(statistics) == jax.tree.structure(template['batch_stats'])
  return fields, params, statistics


def test_golden_features(golden):
  numbers = golden('resnet')
  fields, params, statistics = _golden(numbers)
  model = models.make_backbone('resnet', **fields)
  encode = jax.jit(functools.partial(models.encode, model), static_argnames='train')
  output, _ = encode(params, statistics, numbers['x'])
  np.testing.assert_allclose(output.patches, numbers['eval.features'], **FLOAT32_TOLERANCE)
  np.testing.assert_allclose(output.pooled, numbers['eval.pooled'], **FLOAT32_TOLERANCE)
  weight, bias = (numbers[f'resnet.sd.fc.{name}'] for name in ('weight', 'bias'))
  np.testing.assert_allclose(
    output.pooled @ weight.T + bias, numbers['eval.logits'], **FLOAT32_TOLERANCE
  )
  output, _ = encode(params, statistics, numbers['x'], train=True)
  np.testing.assert_allclose(output.patches, numbers['train.features'], **FLOAT32_TOLERANCE)


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_golden_gradients_and_statistics_in_float64(golden, mode):
  """In float32 a ReLU of the training pass falls on the other side of zero, in torch as well, and
  the gradient there is another; in float64 nothing but the storing in float32 is between us."""
  numbers = golden('resnet')
  fields, *variables = _golden(numbers)
  with jax.enable_x64(True):
    model = Float64(**fields, dtype='float64')
    params, statistics = jax.tree.map(lambda leaf: leaf.astype(np.float64), tuple(variables))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(x):
      output, after = models.encode(model, params, statistics, x, train=mode == 'train')
      return jnp.sum(jnp.square(output.patches)), (output.patches, after)

    x_gradient, (features, after) = gradient(numbers['x'].astype(np.float64))
  largest = np.abs(numbers[f'{mode}.grad_x']).max()
  np.testing.assert_allclose(x_gradient, numbers[f'{mode}.grad_x'], atol=1e-7 * largest, rtol=1e-6)
  np.testing.assert_allclose(features, numbers[f'{mode}.features'], atol=1e-6, rtol=1e-6)
  if mode == 'train':
    names = interop.to_timm(params, after)
    found = {name: names[name.removeprefix('after.')] for name in numbers if 'after.' in name}
    assert len(found) == 2 * 17
    for name, value in found.items():
      np.testing.assert_allclose(value, numbers[name], atol=1e-7, rtol=1e-6, err_msg=name)


def test_batch_norm_by_hand():
  """Of 0, 2, 4, 6: mean 3, biased variance 5, unbiased 20 / 3."""
  x = jnp.array([0.0, 2.0, 4.0, 6.0]).reshape(2, 1, 2, 1)
  norm = resnet.BatchNorm(momentum=0.9)
  variables = {
    'params': {'scale': jnp.array([3.0]), 'bias': jnp.array([-1.0])},
    'batch_stats': {'mean': jnp.array([10.0]), 'var': jnp.array([4.0])},
  }
  trained, moved = norm.apply(variables, x, True, mutable=['batch_stats'])
  expected = 3 * np.array([-3, -1, 1, 3]) / math.sqrt(5 + 1e-5) - 1
  np.testing.assert_allclose(trained.ravel(), expected, rtol=1e-6)
  moved = moved['batch_stats']
  np.testing.assert_allclose(moved['mean'], [0.9 * 10 + 0.1 * 3], rtol=1e-6)
  np.testing.assert_allclose(moved['var'], [0.9 * 4 + 0.1 * 20 / 3], rtol=1e-6)
  evaluated = norm.apply(variables, x, False)
  expected = 3 * np.array([-10, -8, -6, -4]) / math.sqrt(4 + 1e-5) - 1
  np.testing.assert_allclose(evaluated.ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize('height, width', [(8, 4), (6, 10)])
def test_max_pool_is_that_of_every_window(height, width):
  x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  expected = [
    [padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max(axis=(1, 2)) for j in range(width // 2)]
    for i in range(height // 2)
  ]
  pooled, pullback = jax.vjp(resnet.max_pool, x)
  np.testing.assert_array_equal(pooled, np.moveaxis(np.array(expected), 2, 0))
  (gradient,) = pullback(jnp.ones_like(pooled))
  # Each window hands its gradient to one position: no two of these draws are equal.
  np.testing.assert_array_equal(gradient > 0, np.isin(x, pooled))
  assert gradient.sum() == pooled.size


def test_training_does_not_see_the_stored_statistics_and_evaluation_does_not_move_them(small):
  params, statistics, image = small
  other = jax.tree.map(lambda leaf: 2 * leaf + 1, statistics)
  expected, _ = _compiled(train=True)(params, statistics, image)
  found, _ = _compiled(train=True)(params, other, image)
  np.testing.assert_array_equal(found.patches, expected.patches)
  output, after = _compiled()(params, statistics, image)
  assert jnp.max(jnp.abs(output.pooled - expected.pooled)) > 0.1
  jax.tree.map(np.testing.assert_array_equal, after, statistics)


def test_momentum_zero_gives_the_statistics_that_training_normalised_by(small):
  """Stored by a pass at momentum 0, they make evaluation what training was: exactly so once the
  variances, which are kept unbiased, are biased again."""
  params, statistics, image = small
  fields = (('norm_momentum', 0.0),)
  trained, batch = _compiled(train=True, fields=fields)(params, statistics, image)
  # Positions of a feature map of 64 x 32 pixels: the stem's convolution, then each stage.
  positions = {'bn1': 32 * 16, 'layer1': 16 * 8, 'layer2': 8 * 4, 'layer3': 4 * 2, 'layer4': 2 * 1}

  def biased(path, leaf):
    if path[-1].key != 'var':
      return leaf
    count = len(image) * positions[path[0].key.split('_')[0]]
    return leaf * (count - 1) / count

  evaluated, _ = _compiled()(params, jax.tree.map_with_path(biased, batch), image)
  np.testing.assert_allclose(evaluated.patches, trained.patches, **SAME_MATHS)
  # As stored: a variance too large by 1 / (count - 1), a twelfth at most, shrinks by half of that.
  rough, _ = _compiled()(params, batch, image)
  assert 1e-3 < jnp.max(jnp.abs(rough.patches - trained.patches))


@pytest.mark.parametrize('sides', [resnet.BASIC, resnet.BOTTLENECK])
def test_a_block_starts_as_its_shortcut(sides):
  features = 4 * resnet.EXPANSION[sides]
  x = jax.nn.relu(jax.random.normal(jax.random.key(0), (2, 4, 4, features)))
  block = resnet.Block(sides, 4, 1, 0.9, True, jnp.dtype('float32'))
  fresh = jax.jit(block.init, static_argnums=2)(jax.random.key(1), x, False)
  assert 'downsample_conv' not in fresh['params']
  apply = jax.jit(functools.partial(block.apply, mutable=['batch_stats']), static_argnums=2)
  np.testing.assert_array_equal(apply(fresh, x, True)[0], x)
  fresh['params'][f'bn{len(sides)}']['scale'] += 1.0
  assert jnp.max(jnp.abs(apply(fresh, x, True)[0] - x)) > 0.5


def test_initialisation_follows_timm():
  model = models.make_backbone('resnet', 32, depth=14, width=16)
  fresh = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  # 128 * 128 * 9 draws of He's fan-out normal: the sample deviation is within 1 % of the true one.
  kernel = np.asarray(fresh['params']['layer4_0']['conv2']['kernel'])
  np.testing.assert_allclose(kernel.std(), math.sqrt(2 / (9 * 128)), rtol=0.01)
  assert np.abs(kernel).max() > 3.5 * kernel.std()  # no cut
  zeros = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, leaf in jax.tree.leaves_with_path(fresh['params'])
    if path[-1].key == 'scale' and not np.any(leaf)
  ]
  assert zeros == [f'layer{stage}_0/bn3/scale' for stage in (1, 2, 3, 4)]
  for path, leaf in jax.tree.leaves_with_path(fresh['batch_stats']):
    assert np.all(leaf == (path[-1].key == 'var'))


@pytest.mark.parametrize(
  'depth, parameters, features',
  # torchvision's published counts less the classifier's features * 1000 + 1000.
  [
    (18, 11_689_512 - 513_000, 512),
    (34, 21_797_672 - 513_000, 512),
    (50, 25_557_032 - 2_049_000, 2048),
    (101, 44_549_160 - 2_049_000, 2048),
    (152, 60_192_808 - 2_049_000, 2048),
  ],
)
def test_sizes_are_those_published(depth, parameters, features):
  model = models.make_backbone('resnet', 224, depth=depth)
  image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  output, fresh = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
  assert sum(leaf.size for leaf in jax.tree.leaves(fresh['params'])) == parameters
  assert (model.features, model.stride) == (features, 32)
  assert output.pooled.shape == (2, features) and output.patches.shape == (2, 7, 7, features)


def test_stages_are_returned_on_demand(small):
  params, statistics, image = small
  plain, _ = _compiled()(params, statistics, image)
  assert plain.layers == {}
  output, _ = _compiled(layers=(1, 3))(params, statistics, image)
  assert output.layers[1][1].shape == (6, 8, 4, 8)
  for pooled, patches in output.layers.values():
    np.testing.assert_allclose(pooled, patches.mean(axis=(1, 2)), **SAME_MATHS)
  np.testing.assert_array_equal(output.layers[3][1], output.patches)
  np.testing.assert_array_equal(output.layers[3][0], output.pooled)
  with pytest.raises(ValueError, match=r'\[0, 4\)'):
    _compiled(layers=(4,))(params, statistics, image)


def test_remat_changes_no_value(small):
  params, statistics, image = small

  def value_and_gradient(**options):
    model = models.make_backbone('resnet', 32, **SMALL, **options)

    def energy(params):
      output, after = models.encode(model, params, statistics, image, train=True)
      return jnp.sum(jnp.sin(output.patches)), after

    return jax.jit(jax.value_and_grad(energy, has_aux=True))(params)

  expected = value_and_gradient()
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected[1]))
  # Sums in another order: some ulps of the largest terms.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-4),
    value_and_gradient(remat='block'),
    expected,
  )


def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32(small):
  params, statistics, image = small
  fields = (('dtype', 'bfloat16'),)
  exact, expected = _compiled(train=True)(params, statistics, image)
  rough, after = _compiled(train=True, fields=fields)(
    params, statistics, image.astype(jnp.bfloat16)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves((rough, after))} == {jnp.dtype('float32')}
  assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((rough, after)))
  # Nine roundings to 2^-9 relative in a row, on features of order 1, and a norm over 12 values.
  np.testing.assert_allclose(rough.pooled, exact.pooled, atol=0.15)
  assert jnp.max(jnp.abs(rough.pooled - exact.pooled)) > 1e-4  # the compute dtype is really used
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05, rtol=0.05), after, expected)


@pytest.mark.slow
def test_eight_devices_normalise_by_the_whole_batch(run_with_devices):
  found = json.loads(run_with_devices(EIGHT_DEVICES).splitlines()[-1])
  # In float64, whose sums in another order move no ReLU across zero: relative to the largest value.
  for name in ('output', 'statistics', 'gradient', 'image_gradient'):
    assert found['errors'][name] < 1e-6, name
  assert found['per_device_norm_error'] > 1e-2  # what the test would see were they not global
  assert found['all_reduces'] > 0 and found['moved'] == []


@pytest.mark.parametrize(
  'image_size, change, message',
  [
    (32, {'depth': 20}, 'depth is 20: expected one of 10, 14, 18, 26, 34, 50, 101, 152'),
    (48, {}, '48 pixels is not a multiple of a ResNet.s stride, 32: use 32 or 64'),
    ((32, 16), {}, '16 pixels .* use 32 or 64'),
    (32, {'dtype': 'float16'}, 'float32, bfloat16'),
    (32, {'remat': 'elementwise'}, 'none, block'),
    (32, {'width': 0}, 'at least 1'),
    (32, {'norm_momentum': 1.5}, r'\[0, 1\]'),
    (32, {'widht': 8}, 'did you mean width'),
  ],
)
def test_mistakes_are_said_in_words(image_size, change, message):
  with pytest.raises(errors.UserError, match=message):
    models.make_backbone('resnet', image_size, **change)


def test_an_image_that_32_does_not_divide_is_refused(small):
  params, statistics, _ = small
  with pytest.raises(errors.UserError, match='40 pixels'):
    _compiled()(params, statistics, jnp.zeros((1, 64, 40, 3)))
