"""Projection and reconstruction heads: DINO's and iBOT's numbers, and torch's pixel order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models

# The golden numbers come from a float64 run; index.json grants a float32 re-implementation these
# (atol, rtol).
OUTPUT_TOLERANCE = {'atol': 2e-6, 'rtol': 2e-5}
GRADIENT_TOLERANCE = {'atol': 2e-5, 'rtol': 2e-4}


def _head(numbers, case, last='last_layer'):
  """The head of a golden case and its parameters, from torch's layout."""
  free = '.nl0' in case
  kernel = numbers[f'{case}.sd.{last}.weight_v'].T
  params = {
    f'mlp_{i}': {
      'kernel': numbers[f'{case}.sd.mlp.{2 * i}.weight'].T,
      'bias': numbers[f'{case}.sd.mlp.{2 * i}.bias'],
    }
    for i in range(3)
  }
  params['last_layer'] = {'kernel': kernel}
  if free:
    params['last_layer']['gain'] = numbers[f'{case}.sd.{last}.weight_g'][:, 0]
  head = models.ProjectionHead(
    hidden=64, bottleneck=32, outputs=kernel.shape[1], norm_last_layer=not free
  )
  return head, params


@pytest.mark.parametrize('case', ['dino_head.nl1', 'dino_head.nl0'])
def test_golden_dino_head(golden, case):
  numbers = golden('heads')
  head, params = _head(numbers, case)
  x = numbers[f'{case}.x']
  fresh = jax.eval_shape(head.init, jax.random.key(0), x)['params']
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)

  def energy(params, x):
    y = head.apply({'params': params}, x)
    return jnp.sum(jnp.square(y)), y

  with jax.default_matmul_precision('highest'):
    (_, y), (by_params, by_x) = jax.jit(jax.value_and_grad(energy, argnums=(0, 1), has_aux=True))(
      params, x
    )
  np.testing.assert_allclose(y, numbers[f'{case}.y'], **OUTPUT_TOLERANCE)
  np.testing.assert_allclose(by_x, numbers[f'{case}.grad.x'], **GRADIENT_TOLERANCE)
  pairs = {
    'mlp.0.weight': by_params['mlp_0']['kernel'].T,
    'last_layer.weight_v': by_params['last_layer']['kernel'].T,
  }
  if 'gain' in by_params['last_layer']:
    pairs['last_layer.weight_g'] = by_params['last_layer']['gain'][:, None]
  assert {f'{case}.grad.{name}' for name in pairs} | {f'{case}.grad.x'} == {
    k for k in numbers if f'{case}.grad' in k
  }
  for name, gradient in pairs.items():
    np.testing.assert_allclose(
      gradient, numbers[f'{case}.grad.{name}'], **GRADIENT_TOLERANCE, err_msg=name
    )


@pytest.mark.parametrize(
  'case, patch_layer',
  [('ibot_head.nl1.shared1', 'last_layer'), ('ibot_head.nl0.shared0', 'last_layer2')],
)
def test_golden_ibot_head(golden, case, patch_layer):
  """iBOT's head of class and patch tokens is DINO's head on each token."""
  numbers = golden('heads')
  x = numbers[f'{case}.x']
  with jax.default_matmul_precision('highest'):
    for layer, tokens, name in (
      ('last_layer', x[:, 0], 'y_cls'),
      (patch_layer, x[:, 1:], 'y_patch'),
    ):
      head, params = _head(numbers, case, layer)
      logits = jax.jit(head.apply)({'params': params}, tokens)
      np.testing.assert_allclose(logits, numbers[f'{case}.{name}'], **OUTPUT_TOLERANCE)


def test_golden_ibot_gradient(golden):
  numbers = golden('heads')
  case = 'ibot_head.nl1.shared1'
  head, params = _head(numbers, case)

  def energy(x):
    return jnp.sum(jnp.square(head.apply({'params': params}, x)))

  with jax.default_matmul_precision('highest'):
    gradient = jax.jit(jax.grad(energy))(numbers[f'{case}.x'])
  np.testing.assert_allclose(gradient, numbers[f'{case}.grad.x'], **GRADIENT_TOLERANCE)


def test_logits_are_cosines_whatever_the_kernel_scale():
  head = models.ProjectionHead(hidden=16, bottleneck=8, outputs=12, layers=2)
  x = jax.random.normal(jax.random.key(0), (3, 5, 10))
  params = jax.jit(head.init)(jax.random.key(1), x)['params']
  logits = head.apply({'params': params}, x)
  assert logits.shape == (3, 5, 12) and jnp.max(jnp.abs(logits)) <= 1.0 + 1e-6
  params['last_layer']['kernel'] *= 7.0
  np.testing.assert_allclose(head.apply({'params': params}, x), logits, atol=1e-6)


def test_zero_features_have_finite_gradients():
  head = models.ProjectionHead(hidden=16, bottleneck=8, outputs=12)
  x = jnp.zeros((2, 10))  # with zero biases the bottleneck is exactly zero
  params = jax.jit(head.init)(jax.random.key(1), x)['params']
  gradients = jax.jit(jax.grad(lambda p: jnp.sum(head.apply({'params': p}, x))))(params)
  assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients))


def test_bfloat16_heads_return_float32():
  x = jax.random.normal(jax.random.key(0), (4, 2, 2, 16))
  for exact, rough in (
    (
      models.ProjectionHead(hidden=32, bottleneck=8, outputs=12),
      models.ProjectionHead(32, 8, 12, dtype='bfloat16'),
    ),
    (models.ReconstructionHead(2), models.ReconstructionHead(2, dtype='bfloat16')),
  ):
    params = jax.jit(exact.init)(jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    expected, actual = jax.jit(exact.apply)(params, x), jax.jit(rough.apply)(params, x)
    assert actual.dtype == jnp.float32
    # Values up to 1 after at most four bfloat16 roundings of 2^-9 each, amplified a little by the
    # normalisation.
    np.testing.assert_allclose(actual, expected, atol=0.03)


def test_reconstruction_head_shuffles_like_torch():
  """Channel c*P*P + i*P + j of patch (y, x) is colour c of pixel (y*P + i, x*P + j)."""
  p, h, w = 2, 2, 3
  head = models.ReconstructionHead(p)
  patches = jnp.arange(h * w, dtype=jnp.float32).reshape(1, h, w, 1)
  kernel, bias = jnp.full((1, 12), 100.0), jnp.arange(12, dtype=jnp.float32)
  image = head.apply({'params': {'proj': {'kernel': kernel, 'bias': bias}}}, patches)
  assert image.shape == (1, h * p, w * p, 3)
  for y in range(h * p):
    for x in range(w * p):
      for c in range(3):
        patch, channel = (y // p) * w + x // p, c * p * p + (y % p) * p + x % p
        assert image[0, y, x, c] == 100.0 * patch + channel


@pytest.mark.parity
def test_reconstruction_head_equals_torch_pixel_shuffle():
  import torch

  head = models.ReconstructionHead(4)
  patches = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
  params = head.init(jax.random.key(1), patches)
  proj = params['params']['proj']
  flat = np.asarray(patches) @ np.asarray(proj['kernel']) + np.asarray(proj['bias'])
  expected = torch.nn.functional.pixel_shuffle(torch.from_numpy(flat.transpose(0, 3, 1, 2)), 4)
  # One product of 8 terms of order 0.02: rounding only.
  np.testing.assert_allclose(
    head.apply(params, patches), expected.permute(0, 2, 3, 1).numpy(), atol=1e-6
  )
