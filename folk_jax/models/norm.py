"""LayerNorm with its gradient written out.

Autodiff follows the mean, the deviations and the variance back one after the other, and each is a pass over the tokens
of its own; written out, both sums over a token's features are of the same arrays, and one pass does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# timm's.
LAYER_NORM_EPSILON = 1e-6


@jax.custom_vjp
def normalise(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
  """(x - mean) / sqrt(variance + 1e-6) * scale + bias over the last axis (arXiv 1607.06450, equation 4).

  Args:
    x: float32 [..., D].
    scale_D: float32.
    bias_D: float32.

  Returns:
    float32 [..., D].
  """
  return _forward(x, scale_D, bias_D)[0]


def _forward(x, scale_D, bias_D):
  # Two passes over the features, as torch: E[x^2] - E[x]^2 cancels on tokens with a large mean.
  mean = jnp.mean(x, axis=-1, keepdims=True)
  centred = x - mean
  rate = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
  return centred * (rate * scale_D) + bias_D, (x, mean, rate, scale_D)


def _backward(kept, cotangent):
  x, mean, rate, scale_D = kept
  normal = (x - mean) * rate
  scaled = cotangent * scale_D
  along_one = jnp.mean(scaled, axis=-1, keepdims=True)
  along_normal = jnp.mean(scaled * normal, axis=-1, keepdims=True)
  leading = tuple(range(x.ndim - 1))
  return (
    rate * (scaled - along_one - normal * along_normal),
    jnp.sum(cotangent * normal, axis=leading),
    jnp.sum(cotangent, axis=leading),
  )


normalise.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, in float32 whatever comes in: parameters `scale` and `bias` [D]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to float32 [..., D]."""
    features = (x.shape[-1],)
    scale_D = self.param('scale', nn.initializers.ones, features)
    bias_D = self.param('bias', nn.initializers.zeros, features)
    return normalise(x.astype(jnp.float32), scale_D, bias_D)
