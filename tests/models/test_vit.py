"""ViT: timm's numbers, the laws of drop path and LayerScale, and the options that must not change
the result."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import errors, models
from folk_jax.compiled import cost, hlo
from folk_jax.interop import timm as interop
from folk_jax.models import layers as layers_lib
from folk_jax.models import vit as vit_lib
from folk_jax.models.norm import LayerNorm

# The golden numbers come from a float64 run; index.json grants a float32 re-implementation these
# (atol, rtol).
FEATURE_TOLERANCE = {'atol': 2e-5, 'rtol': 2e-5}
GRADIENT_TOLERANCE = {'atol': 3e-4, 'rtol': 1e-4}
RESAMPLE_TOLERANCE = {'atol': 5e-6, 'rtol': 1e-5}
# Two compilations of one float32 function differ by the order of their sums only: some ulps of
# values of order 1.
SAME_MATHS = {'atol': 2e-5, 'rtol': 1e-4}


@pytest.fixture(scope='module')
def small():
  """Fields of a small ViT, random parameters with nothing left at zero, images and keys."""
  fields = {'width': 24, 'depth': 3, 'heads': 3, 'patch': 4}
  model = models.make_backbone('vit', (8, 12), **fields)
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.normal(size=(5, 8, 12, 3)), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  # Deviation 0.1: every name matters, and no softmax saturates.
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
  )
  params['norm']['scale'] += 1.0
  return fields, params, image, jax.random.split(jax.random.key(3), 5)


@functools.cache
def _compiled(fields, **static):
  model = models.make_backbone('vit', (8, 12), **dict(fields))
  return jax.jit(lambda params, image, keys: model.apply({'params': params}, image, keys, **static))


def _apply(fields, params, image, keys=None, **static):
  return _compiled(tuple(fields.items()), **static)(params, image, keys)


def _tokens(output):
  n, _, _, width = output.patches.shape
  return jnp.concatenate([output.pooled[:, None], output.patches.reshape(n, -1, width)], axis=1)


def test_golden_features_and_gradients(golden):
  numbers = golden('vit')
  size, patch, width, depth, heads, ratio, _ = (int(value) for value in numbers['cfg'])
  model = models.make_backbone(
    'vit', size, width=width, depth=depth, heads=heads, patch=patch, mlp_ratio=float(ratio)
  )
  template = jax.eval_shape(model.init, jax.random.key(0), numbers['x'])['params']
  state = {k.removeprefix('vit.sd.'): v for k, v in numbers.items() if k.startswith('vit.sd.')}
  params = interop.from_timm(state, template, grid=model.grid)

  @jax.jit
  def features_and_gradients(params, x):
    def features(params, x):
      output = model.apply({'params': params}, x)
      return _tokens(output), output.pooled

    (tokens, pooled), pullback = jax.vjp(features, params, x)
    logits = pooled @ state['head.weight'].T + state['head.bias']
    # d sum(tokens^2), and d sum(logits^2) by way of the pooled feature.
    _, x_by_tokens = pullback((2 * tokens, jnp.zeros_like(pooled)))
    params_by_logits, x_by_logits = pullback(
      (jnp.zeros_like(tokens), 2 * logits @ state['head.weight'])
    )
    return tokens, pooled, x_by_tokens, x_by_logits, params_by_logits

  with jax.default_matmul_precision('highest'):
    tokens, pooled, x_by_tokens, x_by_logits, params_by_logits = features_and_gradients(
      params, numbers['x']
    )
  np.testing.assert_allclose(tokens, numbers['tokens'], **FEATURE_TOLERANCE)
  np.testing.assert_allclose(pooled, numbers['pooled'], **FEATURE_TOLERANCE)
  np.testing.assert_allclose(x_by_tokens, numbers['grad_x_tokens'], **GRADIENT_TOLERANCE)
  np.testing.assert_allclose(x_by_logits, numbers['grad_x_logits'], **GRADIENT_TOLERANCE)
  gradients = interop.to_timm(params_by_logits)
  names = [name for name in numbers if name.startswith('grad.') and name != 'grad.head.weight']
  assert len(names) == 8
  for name in names:
    np.testing.assert_allclose(
      gradients[name.removeprefix('grad.')], numbers[name], **GRADIENT_TOLERANCE, err_msg=name
    )


@pytest.mark.parametrize('old, new', [((4, 4), (6, 6)), ((4, 4), (3, 5)), ((3, 5), (8, 6))])
def test_golden_position_resampling(golden, old, new):
  name = f'pos.{old[0]}x{old[1]}_to_{new[0]}x{new[1]}'
  numbers = golden('vit')
  resampled = models.resample_position_embedding(jnp.asarray(numbers[f'{name}.in']), old, new)
  np.testing.assert_allclose(resampled, numbers[f'{name}.out'], **RESAMPLE_TOLERANCE)


def test_other_image_size_equals_a_model_built_for_it(small):
  fields, params, _, _ = small
  image = jax.random.normal(jax.random.key(4), (2, 16, 8, 3))
  built = models.make_backbone('vit', (16, 8), **fields)
  position = models.resample_position_embedding(params['pos_embed'], (2, 3), (4, 2))
  expected = jax.jit(built.apply)({'params': params | {'pos_embed': position}}, image)
  np.testing.assert_allclose(
    _tokens(_apply(fields, params, image)), _tokens(expected), **SAME_MATHS
  )


def test_patches_read_rows_columns_channels():
  image = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
  patches = vit_lib.to_patches(image, 2)
  assert patches.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(patches[1, 1, 2], image[1, 2:4, 4:6].reshape(-1))


def test_gelu_is_exact():
  # x * Phi(x) at +-1 and +-3 from tables of the normal distribution; the tanh form is off by 1.5e-4
  # at 1.
  x = jnp.array([-3.0, -1.0, 0.0, 1.0, 3.0])
  expected = [-0.004049694, -0.158655254, 0.0, 0.841344746, 2.995950306]
  np.testing.assert_allclose(layers_lib.gelu(x), expected, atol=5e-7)


def test_layer_by_layer_equals_scan(small):
  """Layer l of the scanned model is block l of the stack, applied by hand."""
  fields, params, image, _ = small
  output = _apply(fields, params, image, layers=(0, 1, 2))
  settings = layers_lib.BlockSettings(3, 96, None, jnp.dtype('float32'), 'xla')
  step = jax.jit(layers_lib.Block(settings, False).apply)

  def flat(pooled, patches):
    return jnp.concatenate([pooled[:, None], patches.reshape(5, 6, 24)], axis=1)

  for layer in (1, 2):
    one = jax.tree.map(operator.itemgetter(layer), params['blocks'])
    stepped, _ = step({'params': one}, flat(*output.layers[layer - 1]), None)
    np.testing.assert_allclose(stepped, flat(*output.layers[layer]), **SAME_MATHS)
  last = LayerNorm().apply({'params': params['norm']}, flat(*output.layers[2]))
  np.testing.assert_allclose(last, _tokens(output), **SAME_MATHS)


def test_layers_are_collected_on_demand_and_normalised_on_demand(small):
  fields, params, image, _ = small
  assert _apply(fields, params, image).layers == {}
  output = _apply(fields, params, image, layers=(2,), normalise_layers=True)
  np.testing.assert_allclose(output.layers[2][0], output.pooled, **SAME_MATHS)
  np.testing.assert_allclose(output.layers[2][1], output.patches, **SAME_MATHS)
  with pytest.raises(ValueError, match='layers'):
    _apply(fields, params, image, layers=(3,))


def test_remat_and_unrolling_change_no_value(small):
  fields, params, image, keys = small

  def value_and_gradient(**options):
    model = models.make_backbone('vit', (8, 12), **fields, drop_path=0.4, **options)

    def energy(params):
      output = model.apply({'params': params}, image, keys)
      return jnp.sum(jnp.square(output.patches)) + jnp.sum(jnp.sin(output.pooled))

    return jax.jit(jax.value_and_grad(energy))(params)

  expected = value_and_gradient()
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
  for options in (
    {'remat': 'block'},
    {'remat': 'elementwise'},
    {'scan_unroll': 2},
    {'scan_unroll': 3},
    {'scan_unroll': 3, 'remat': 'block'},
  ):
    # Sums in another order: some ulps of the largest terms.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-4),
      value_and_gradient(**options),
      expected,
    )


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'remat': 'block'},
    {'remat': 'elementwise', 'scan_unroll': 3},
    {'layer_scale': 0.3, 'drop_path': 0.4},
    {'depth': 1},
    {'attention': 'pallas', 'width': 128, 'heads': 2},
  ],
  ids=str,
)
def test_without_patches_the_class_token_and_its_gradient_are_the_same(small, options):
  fields, _, image, keys = small
  model = models.make_backbone('vit', (8, 12), **fields | options)
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
  )
  params['norm']['scale'] += 1.0

  def energy(params, patches):
    output = model.apply({'params': params}, image, keys, patches=patches)
    assert (output.patches is not None) == patches and output.layers == {}
    return jnp.sum(jnp.sin(output.pooled)), output.pooled

  evaluate = jax.jit(jax.value_and_grad(energy, has_aux=True), static_argnums=1)
  ((_, alone), found), ((_, of_all), expected) = evaluate(params, False), evaluate(params, True)
  np.testing.assert_allclose(alone, of_all, **SAME_MATHS)
  largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-4), found, expected
  )


def test_without_patches_each_blocks_class_token_can_be_had(small):
  fields, params, image, _ = small
  for normalise in (False, True):
    options = {'layers': (0, 2), 'normalise_layers': normalise}
    alone = _apply(fields, params, image, **options, patches=False)
    whole = _apply(fields, params, image, **options)
    assert alone.patches is None and set(alone.layers) == {0, 2}
    for layer, (class_ND, patches) in alone.layers.items():
      assert patches is None
      np.testing.assert_allclose(class_ND, whole.layers[layer][0], **SAME_MATHS)


def test_without_a_loop_remat_still_recomputes():
  """XLA would merge the recomputed pass with the first, and keep it in memory, where nothing stood between them."""
  image = jnp.zeros((2, 16, 16, 3))

  def products(**options):
    model = models.make_backbone('vit', 16, width=16, depth=3, heads=2, patch=8, **options)
    params = jax.eval_shape(model.init, jax.random.key(0), image)

    def energy(params):
      return jnp.sum(jnp.square(model.apply(params, image).patches))

    program = jax.jit(jax.grad(energy)).lower(params).compile()
    visits, _ = cost.visits(hlo.parse(program.as_text()))
    return sum(visit.times * cost.flops(visit) for visit in visits)

  recomputed = products(remat='block', scan_unroll=3)
  assert recomputed == products(remat='block') > products(scan_unroll=3)


def test_layer_scale_is_a_gain_on_each_branch(small):
  """A gain g on a branch is the branch with its last linear layer scaled by g."""
  fields, params, image, _ = small
  gain = 0.3
  blocks = dict(params['blocks'])
  folded = blocks | {
    'attn': blocks['attn']
    | {'proj': jax.tree.map(lambda leaf: gain * leaf, blocks['attn']['proj'])},
    'mlp': blocks['mlp'] | {'fc2': jax.tree.map(lambda leaf: gain * leaf, blocks['mlp']['fc2'])},
  }
  scaled = blocks | {name: {'gamma': jnp.full((3, 24), gain)} for name in ('ls1', 'ls2')}
  expected = _apply(fields, params | {'blocks': folded}, image)
  actual = _apply(fields | {'layer_scale': 1e-5}, params | {'blocks': scaled}, image)
  np.testing.assert_allclose(_tokens(actual), _tokens(expected), **SAME_MATHS)


def test_drop_path_schedule_and_expectation():
  """Each branch survives at its layer's rate and is divided by it, so that its mean factor is 1."""
  samples, depth, rate = 20_000, 3, 0.5
  scales = np.asarray(
    jax.jit(layers_lib.drop_path_scales, static_argnums=(1, 2))(
      jax.random.split(jax.random.key(5), samples), depth, rate
    )
  )
  keep = np.array([1.0, 0.75, 0.5])
  for layer in range(depth):
    assert set(np.unique(scales[layer])) <= {np.float32(0), np.float32(1 / keep[layer])}
  # Five deviations of the mean of 20,000 draws: 5 * sqrt((1/0.5 - 1) / 20000) = 0.035.
  np.testing.assert_allclose(scales.mean(axis=2), 1.0, atol=0.035)
  both = (scales[2] > 0).mean(axis=1)
  together = (scales[2] > 0).all(axis=0).mean()
  assert abs(together - both.prod()) < 0.02  # the two branches of a block draw independently


def test_drop_path_depends_on_the_sample_key_alone(small):
  fields, params, image, keys = small
  fields = fields | {'drop_path': 0.5}
  order = jnp.array([3, 0, 4, 2, 1])
  straight = _tokens(_apply(fields, params, image, keys))
  shuffled = _tokens(_apply(fields, params, image[order], keys[order]))
  np.testing.assert_allclose(shuffled, straight[order], **SAME_MATHS)
  other = _tokens(_apply(fields, params, image, jax.random.split(jax.random.key(9), 5)))
  assert jnp.max(jnp.abs(other - straight)) > 1e-2


def test_drop_path_is_off_without_keys_or_rate(small):
  fields, params, image, keys = small
  plain = _tokens(_apply(fields, params, image))
  np.testing.assert_array_equal(_tokens(_apply(fields, params, image, keys)), plain)
  np.testing.assert_array_equal(_tokens(_apply(fields | {'drop_path': 0.5}, params, image)), plain)


def test_bfloat16_keeps_parameters_and_outputs_in_float32(small):
  fields, params, image, _ = small
  exact = _tokens(_apply(fields, params, image))
  model = models.make_backbone('vit', (8, 12), **fields, dtype='bfloat16')
  fresh = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype('float32')}
  rough = _tokens(_apply(fields | {'dtype': 'bfloat16'}, params, image))
  assert rough.dtype == jnp.float32
  # bfloat16 rounds to 2^-9 relative; six branches on features of order 1 add up to a few times
  # that.
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert jnp.max(jnp.abs(rough - exact)) > 1e-4  # the compute dtype is really used


def test_initialisation_follows_dino():
  model = models.make_backbone('vit', 32, width=192, depth=2, heads=3, patch=4)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  kernel = np.asarray(params['blocks']['mlp']['fc1']['kernel'])
  # 295k draws: the sample deviation is within 0.5 % of the true one; a cut at two deviations would
  # give 0.0176.
  np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.01)
  assert not np.allclose(kernel[0], kernel[1])  # each layer draws its own
  bound = 1 / np.sqrt(4 * 4 * 3)
  assert 0.99 * bound < np.abs(params['patch_embed']['kernel']).max() <= bound
  for name in ('qkv', 'proj'):
    assert not np.any(params['blocks']['attn'][name]['bias'])


@pytest.mark.parametrize(
  'name, image_size, change, message',
  [
    ('vti', 32, {}, 'known models are resnet, vit'),
    ('vit', 33, {}, '33 pixels is not a multiple of the patch, 4: use 32 or 36'),
    ('vit', 32, {'heads': 5}, 'heads must divide the width'),
    ('vit', 32, {'detph': 2}, 'did you mean depth'),
    ('vit', 32, {'drop_path': 1.0}, r'\[0, 1\)'),
    ('vit', 32, {'dtype': 'float16'}, 'float32, bfloat16'),
    ('vit', 32, {'remat': 'blocks'}, 'none, elementwise, block'),
  ],
)
def test_mistakes_are_said_in_words(name, image_size, change, message):
  fields = {'width': 24, 'depth': 2, 'heads': 3, 'patch': 4} | change
  with pytest.raises(errors.UserError, match=message):
    models.make_backbone(name, image_size, **fields)


def test_missing_field_and_wrong_image_are_said_in_words(small):
  fields, params, _, _ = small
  with pytest.raises(errors.UserError, match='needs patch'):
    models.make_backbone('vit', 32, width=24, depth=2, heads=3)
  with pytest.raises(errors.UserError, match='multiple of the patch'):
    _apply(fields, params, jnp.zeros((1, 9, 12, 3)))
