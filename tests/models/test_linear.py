"""The linear layer: numbers by NumPy, autodiff's gradients, and what a CPU is given to multiply."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.compiled import hlo
from folk_jax.models.linear import Linear, product


def arrays(rows, inputs, outputs):
  draw = np.random.default_rng(0).standard_normal
  return [
    draw(shape, np.float32) for shape in ((*rows, inputs), (inputs, outputs), (*rows, outputs))
  ]


# Wider than it is narrow and the other way round: the factors change places.
@pytest.mark.parametrize('inputs, outputs', [(5, 12), (12, 5), (6, 6)])
@pytest.mark.parametrize('rows', [(7,), (3, 4), (2, 3, 2)])
def test_products_and_gradients_are_numpys(rows, inputs, outputs):
  x, kernel, cotangent = arrays(rows, inputs, outputs)
  found, pullback = jax.vjp(product, x, kernel)
  by_x, by_kernel = pullback(cotangent)
  # Sums of at most 12 products of numbers of order 1 in float32.
  close = {'rtol': 1e-5, 'atol': 1e-5}
  np.testing.assert_allclose(found, np.einsum('...m,mn->...n', x, kernel), **close)
  np.testing.assert_allclose(by_x, np.einsum('...n,mn->...m', cotangent, kernel), **close)
  by_hand = x.reshape(-1, inputs).T @ cotangent.reshape(-1, outputs)
  np.testing.assert_allclose(by_kernel, by_hand, **close)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_layer_is_flax_own(dtype):
  x = arrays((3, 4), 8, 6)[0]
  ours, flax_own = (
    Linear(6, jnp.dtype(dtype), nn.initializers.normal(0.1)),
    nn.Dense(6, dtype=dtype, kernel_init=nn.initializers.normal(0.1)),
  )
  params = ours.init(jax.random.key(1), x)
  expected = flax_own.init(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, params, expected)

  def energy(params, layer):
    y = layer.apply(params, x)
    assert y.dtype == dtype
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  gradients = (jax.grad(energy)(params, layer) for layer in (ours, flax_own))
  # The kernel's gradient is a sum of 12 terms, in another order; bfloat16 keeps 8 bits of it.
  tolerance = 1e-6 if dtype == 'float32' else 2**-7
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), *gradients)


@pytest.mark.parametrize('inputs, outputs', [(32, 96), (96, 32)])
def test_a_cpu_multiplies_rows_as_they_lie_the_narrower_on_the_left(inputs, outputs):
  x, kernel, cotangent = arrays((4, 50), inputs, outputs)
  gradient = jax.jit(lambda *args: jax.vjp(product, *args[:2])[1](args[2])[1])
  program = hlo.parse(gradient.lower(x, kernel, cotangent).compile().as_text())
  instructions = [i for c in program.computations.values() for i in c.instructions.values()]
  (dot,) = [i for i in instructions if i.opcode == 'dot']
  assert dot.shapes[0].dims == (32, 96)
  assert dot.numbers('lhs_contracting_dims') == dot.numbers('rhs_contracting_dims') == (0,)
