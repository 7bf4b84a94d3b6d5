"""LayerNorm against Flax's, whose gradient is autodiff's, and against what defines it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.models.norm import LAYER_NORM_EPSILON, LayerNorm, normalise


def arrays(mean):
  rng = np.random.default_rng(3)
  x, cotangent = (jnp.asarray(rng.normal(size=(4, 5, 24)), jnp.float32) for _ in range(2))
  scale, bias = (jnp.asarray(rng.normal(size=24), jnp.float32) for _ in range(2))
  return x + mean, scale, bias, cotangent


@pytest.mark.parametrize('mean', [0.0, 30.0])
def test_values_and_gradients_are_flaxs(mean):
  x, scale, bias, cotangent = arrays(mean)
  flaxs = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False)

  def plain(x, scale, bias):
    return flaxs.apply({'params': {'scale': scale, 'bias': bias}}, x)

  found, pull = jax.vjp(normalise, x, scale, bias)
  wanted, pull_plain = jax.vjp(plain, x, scale, bias)
  # A mean of 30 leaves deviations five bits less.
  tolerance = 2e-6 * (1 + mean)
  np.testing.assert_allclose(found, wanted, atol=tolerance)
  for ours, theirs in zip(pull(cotangent), pull_plain(cotangent), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=4 * tolerance)


def test_the_gradient_is_the_functions_slope():
  """In float64, against differences: autodiff has no part in it."""
  with jax.enable_x64(True):
    x, scale, bias, cotangent = (a.astype(jnp.float64) for a in arrays(1.0))
    _, pull = jax.vjp(normalise, x, scale, bias)
    rng = np.random.default_rng(5)
    for at, gradient in enumerate(pull(cotangent)):
      along = rng.normal(size=gradient.shape)

      def moved(distance, at=at, along=along):
        args = [x, scale, bias]
        args[at] = args[at] + distance * along
        return float(jnp.sum(cotangent * normalise(*args)))

      slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
      assert float(jnp.sum(gradient * along)) == pytest.approx(slope, rel=1e-7)


def test_a_constant_token_is_the_bias():
  x = jnp.full((2, 8), 3.0)
  scale, bias = jnp.full(8, 2.0), jnp.arange(8.0)
  found, pull = jax.vjp(lambda x: normalise(x, scale, bias), x)
  np.testing.assert_array_equal(found, np.broadcast_to(bias, (2, 8)))
  # What is added to all features changes nothing, however little they vary.
  np.testing.assert_allclose(pull(jnp.ones((2, 8)))[0].sum(-1), 0, atol=1e-3)


def test_the_module_has_flaxs_parameters_and_answers_in_float32():
  x = jnp.ones((1, 6), jnp.bfloat16)
  params = LayerNorm().init(jax.random.key(0), x)['params']
  theirs = nn.LayerNorm().init(jax.random.key(0), x)['params']
  jax.tree.map(np.testing.assert_array_equal, dict(params), dict(theirs))
  assert LayerNorm().apply({'params': params}, x).dtype == jnp.float32
