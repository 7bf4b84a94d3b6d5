"""GELU and the derivative that it brings along, against their definitions in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.models.layers import gelu

X = np.concatenate([np.linspace(-9, 9, 361), [0.0, -0.0, 40.0, -40.0]])


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('bfloat16', 2**-8)])
def test_value_and_derivative(dtype, tolerance):
  # At numbers that bfloat16 has, so that only the result is rounded.
  x = jnp.asarray(X, jnp.bfloat16).astype(dtype)
  exact = np.asarray(x, np.float64)
  value, pull = jax.jit(lambda x: jax.vjp(gelu, x))(x)
  (slope,) = pull(jnp.ones_like(x))
  assert value.dtype == slope.dtype == dtype
  wanted = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in exact])
  wanted_slope = np.array(
    [
      0.5 * (1 + math.erf(v / math.sqrt(2))) + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi)
      for v in exact
    ]
  )
  np.testing.assert_allclose(np.asarray(value, np.float64), wanted, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(np.asarray(slope, np.float64), wanted_slope, atol=2 * tolerance)


def test_one_erf_serves_both_passes():
  text = str(jax.make_jaxpr(jax.grad(lambda x: gelu(x).sum()))(jnp.ones(4)))
  assert text.count('= erf ') == 1
