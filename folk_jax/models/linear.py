"""Linear layers whose backward pass gives a CPU the products that it is fast at.

Shape letters: M inputs, N outputs, R rows (all leading axes as one).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, kernel_MN: jax.Array) -> jax.Array:
  """Rows times a kernel, with the gradient that autodiff would give.

  On CPUs the kernel's gradient is one product of the rows as they lie, the narrower factor on the left. What autodiff
  writes, XLA turns into one with a copy of the cotangent in another order, whichever factor is the wider. Elsewhere
  nothing is asked for: reshaping to rows would be a copy on a TPU, whose tiles the tokens don't fill.

  Args:
    x: [..., M], floating point.
    kernel_MN: [M, N], the same dtype.

  Returns:
    [..., N], the same dtype.
  """
  return x @ kernel_MN


def _backward(kept, cotangent):
  x, kernel_MN = kept
  gradient_MN = jax.lax.platform_dependent(
    x, cotangent, cpu=_kernel_gradient_on_cpu, default=_kernel_gradient
  )
  return cotangent @ kernel_MN.T, gradient_MN


def _kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
  leading = tuple(range(x.ndim - 1))
  return jax.lax.dot_general(x, cotangent, ((leading, leading), ((), ())))


def _kernel_gradient_on_cpu(x: jax.Array, cotangent: jax.Array) -> jax.Array:
  x_RM, cotangent_RN = (rows.reshape(-1, rows.shape[-1]) for rows in (x, cotangent))
  if x_RM.shape[1] <= cotangent_RN.shape[1]:
    return x_RM.T @ cotangent_RN
  # Without the barrier XLA swaps the factors, to save itself the transpose.
  return jax.lax.optimization_barrier(cotangent_RN.T @ x_RM).T


product.defvjp(lambda x, kernel_MN: (x @ kernel_MN, (x, kernel_MN)), _backward)


def cast(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Weights in the compute type, once a pass: a TPU else casts them inside the product, once a tile of its result."""
  return kernel if kernel.dtype == dtype else jax.lax.optimization_barrier(kernel.astype(dtype))


class Linear(nn.Module):
  """A linear layer over the last axis: parameters kernel [M, N] and bias [N].

  Attributes:
    features: N.
    dtype: compute dtype, of the result too.
    kernel_init: initialiser of the kernel; the bias starts at zero.
  """

  features: int
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., M] to [..., N]."""
    kernel_MN = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
    bias_N = self.param('bias', nn.initializers.zeros, (self.features,))
    rows = product(x.astype(self.dtype), cast(kernel_MN, self.dtype))
    return rows + bias_N.astype(self.dtype)
