"""Heads on top of a backbone: DINO's projection and MFM's reconstruction.

Shape letters: N images, D width, E bottleneck, K prototypes, h and w patches a side, P patch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from folk_jax.models import layers as layers_lib
from folk_jax.models.linear import Linear


class PrototypeLayer(nn.Module):
  """Weight-normalised linear layer without bias (arXiv 1602.07868).

  Each output's weights are gain * kernel / |kernel|. Parameters: kernel [bottleneck, K]; gain [K]
  unless `unit_gain`, where it is 1 and not a parameter.
  """

  inputs: int
  outputs: int
  unit_gain: bool

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """The kernel [E, K] and each output's gain / |kernel| [K], float32; the weights are their product."""
    # DINO leaves this layer at torch's default; its scale sets how fast the direction turns.
    kernel_EK = self.param('kernel', layers_lib.torch_uniform, (self.inputs, self.outputs))
    scale_K = _inverse_norm(kernel_EK, axis=0)[0]
    if not self.unit_gain:
      scale_K = scale_K * self.param('gain', nn.initializers.ones, (self.outputs,))
    return kernel_EK, scale_K


class ProjectionHead(nn.Module):
  """DINO's projection head (arXiv 2104.14294, section 3.1 and appendix C).

  MLP with exact GELU to a bottleneck, L2 normalisation, weight-normalised prototypes. Each token
  is mapped by itself, so iBOT's head of patch tokens is this one applied to [N, T, D].

  Attributes:
    hidden: width of the hidden layers.
    bottleneck: width before the prototypes.
    outputs: number of prototypes K.
    layers: linear layers before the prototypes, at least 1.
    norm_last_layer: fixes the prototypes' gain at 1 (and leaves it out of the parameters).
    dtype: compute dtype, 'float32' or 'bfloat16'; the normalisations and the logits are float32.
  """

  hidden: int = 2048
  bottleneck: int = 256
  outputs: int = 8192
  layers: int = 3
  norm_last_layer: bool = True
  dtype: str = 'float32'

  def setup(self):
    dtype = jnp.dtype(self.dtype)
    widths = [self.hidden] * (self.layers - 1) + [self.bottleneck]
    self.mlp = [nn.Dense(width, dtype=dtype, kernel_init=layers_lib.normal) for width in widths]
    self.last_layer = PrototypeLayer(self.bottleneck, self.outputs, self.norm_last_layer)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps features [..., D] to logits [..., K], float32, in [-1, 1] where the gain is 1."""
    # Scaled after the product: there are fewer logits than weights, in both passes. And XLA's CPU compiler computes
    # scaled weights inside the product, once a tile: seconds a step with DINO's 65,536 outputs.
    kernel_EK, scale_K = self.last_layer()
    return compare(self.embed(x), kernel_EK.astype(self.dtype)) * scale_K

  def embed(self, x: jax.Array) -> jax.Array:
    """Maps features [..., D] to what is compared with the prototypes: unit vectors [..., E], float32."""
    for dense in self.mlp[:-1]:
      x = layers_lib.gelu(dense(x))
    x = self.mlp[-1](x).astype(jnp.float32)
    return x * _inverse_norm(x, axis=-1)

  def prototypes(self) -> jax.Array:
    """The weights of the last layer, [E, K], in the compute dtype."""
    kernel_EK, scale_K = self.last_layer()
    return (kernel_EK * scale_K).astype(self.dtype)


def compare(embedding: jax.Array, prototype_EK: jax.Array) -> jax.Array:
  """The logits [..., K], float32, of embeddings [..., E]; the product in the prototypes' dtype."""
  return jnp.matmul(
    embedding.astype(prototype_EK.dtype), prototype_EK, preferred_element_type=jnp.float32
  )


class ReconstructionHead(nn.Module):
  """MFM's decoder (arXiv 2206.07706, section 3.3): a linear layer and a pixel shuffle.

  Attributes:
    patch: pixels a side that each position reconstructs.
    dtype: compute dtype, 'float32' or 'bfloat16'.
  """

  patch: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, patches_NhwD: jax.Array) -> jax.Array:
    """Maps patch features [N, h, w, D] to normalised pixels [N, h*P, w*P, 3], float32."""
    p = self.patch
    linear = Linear(3 * p * p, jnp.dtype(self.dtype), layers_lib.normal, name='proj')
    pixels = linear(patches_NhwD).astype(jnp.float32)
    n, h, w, _ = pixels.shape
    # Channel c*P*P + i*P + j holds colour c of pixel (i, j): torch's PixelShuffle.
    return pixels.reshape(n, h, w, 3, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(n, h * p, w * p, 3)


def _inverse_norm(x: jax.Array, axis: int) -> jax.Array:
  """1 / max(|x|, 1e-12), with a finite gradient at zero."""
  return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=axis, keepdims=True), 1e-24))
