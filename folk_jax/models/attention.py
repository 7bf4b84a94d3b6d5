"""Multi-head self-attention of packed queries, keys and values, by each of the implementations that a device may have.

All take the packed projection's product and its bias, which is not added yet, so that a kernel may do it.

Shape letters: B images, T and S tokens, D width, H heads, E width of a head.
"""

import importlib.util

import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.models.fused_attention import fits, fused_attention
from folk_jax.signal.shard import in_place, is_even, one_a_device, over_batch

# bfloat16's own is 2**-9 a number; a wrong lane or a missing scale is off by tens of per cent.
_ROUNDING = 0.03
# jax's plugins for NVIDIA GPUs, which bring cuDNN.
_CUDA_PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
_CUDNN_DTYPES = ('bfloat16', 'float16')


def _by_xla(product_BT3D: jax.Array, bias_3D: jax.Array, heads: int) -> jax.Array:
  # Heads in front of tokens before both products: left to XLA, the same reordering happens around
  # each product of both passes (a tenth of the whole step on a CPU). As one product [T, 3D] and not
  # as three that end in that order: those take a CPU longer.
  qkv_BT3HE = _by_head(product_BT3D + bias_3D, heads)
  return _mixed(*qkv_BT3HE.transpose(2, 0, 3, 1, 4))


def _by_cudnn(product_BT3D: jax.Array, bias_3D: jax.Array, heads: int) -> jax.Array:
  channels = product_BT3D.shape[-1] // (3 * heads)
  if not takes_cudnn(product_BT3D.dtype.name, channels) or not _has_cudnn():
    return _by_xla(product_BT3D, bias_3D, heads)
  return jax.lax.platform_dependent(
    product_BT3D,
    bias_3D,
    cuda=lambda product_BT3D, bias_3D: _padded(product_BT3D, bias_3D, heads, 'cudnn'),
    default=lambda product_BT3D, bias_3D: _by_xla(product_BT3D, bias_3D, heads),
  )


def _padded(
  product_BT3D: jax.Array, bias_3D: jax.Array, heads: int, implementation: str
) -> jax.Array:
  batch, tokens, packed = product_BT3D.shape
  # jax refuses cuDNN's gradient for an odd number of tokens, as 196 patches and a class token are: it takes the empty
  # bias that it passes itself for one that the kernel would have to align. So one token more, which nobody sees.
  odd = tokens % 2
  packed_BT3D = jnp.pad(product_BT3D + bias_3D, ((0, 0), (0, odd), (0, 0)))
  query, key, value = (_by_head(packed_BT3D, heads)[:, :, i] for i in range(3))
  # Each device's own images, as the kernel has them.
  lengths_B = in_place(jnp.full(batch, tokens, jnp.int32)) if odd else None
  mixed_BTHE = jax.nn.dot_product_attention(
    query,
    key,
    value,
    query_seq_lengths=lengths_B,
    key_value_seq_lengths=lengths_B,
    implementation=implementation,
  )
  return mixed_BTHE[:, :tokens].reshape(batch, tokens, packed // 3)


def _by_pallas(product_BT3D: jax.Array, bias_3D: jax.Array, heads: int) -> jax.Array:
  batch, _, packed = product_BT3D.shape
  # The one image that parameters are initialised with; and decoders, whose heads may be narrower than
  # the backbone's, which `ViT.check` looks at.
  if not is_even(batch) or not fits(packed // 3, heads):
    return _by_xla(product_BT3D, bias_3D, heads)

  def by_image(product_BT3D, bias_3D):
    bias_3D = one_a_device(bias_3D)
    return jax.lax.platform_dependent(
      product_BT3D,
      bias_3D,
      tpu=lambda product_BT3D, bias_3D: fused_attention(product_BT3D, bias_3D, heads),
      default=lambda product_BT3D, bias_3D: _by_xla(product_BT3D, bias_3D, heads),
    )

  return over_batch(by_image, product_BT3D, replicated=(bias_3D,))


# 'pallas' is the TPU's kernel and 'cudnn' that of NVIDIA GPUs; elsewhere both are 'xla'.
ATTENTION = {'xla': _by_xla, 'cudnn': _by_cudnn, 'pallas': _by_pallas}


def class_attention(query_B1D: jax.Array, pair_BT2D: jax.Array, heads: int) -> jax.Array:
  """Attention of the class token alone, by XLA everywhere: one query an image is little for a kernel.

  Each head's query is spread over all channels, zero where they aren't its own, so that keys and values are read as
  they lie. Cut into heads they would be copied to another order, and that costs more than the products with zeros.

  Args:
    query_B1D: with its bias.
    pair_BT2D: keys and values, with theirs.
    heads: H.

  Returns:
    [B, 1, D], the same dtype.
  """
  key_BTD, value_BTD = jnp.split(pair_BT2D, 2, axis=-1)
  width = query_B1D.shape[-1]
  channels = width // heads
  own_HD = jnp.repeat(jnp.eye(heads, dtype=query_B1D.dtype), channels, axis=1)
  score_BHT = jnp.einsum(
    'bhd,btd->bht',
    query_B1D * channels**-0.5 * own_HD,
    key_BTD,
    preferred_element_type=jnp.float32,
  )
  weight_BHT = jax.nn.softmax(score_BHT).astype(value_BTD.dtype)
  mixed_BHD = jnp.einsum('bht,btd->bhd', weight_BHT, value_BTD)
  return jnp.sum(mixed_BHD * own_HD, axis=1, keepdims=True)


def takes_cudnn(dtype: str, channels: int) -> bool:
  """Whether cuDNN's kernel takes products of that dtype and heads of so many channels."""
  return dtype in _CUDNN_DTYPES and channels <= 128 and channels % 8 == 0


def is_too_old(device: jax.Device) -> bool:
  """Whether a GPU is of a generation before Ampere, whose attention cuDNN has no kernel for."""
  return getattr(device, 'compute_capability', '8.0').partition('.')[0] in ('3', '5', '6', '7')


def _has_cudnn() -> bool:
  return any(importlib.util.find_spec(name) for name in _CUDA_PLUGINS)


def _by_head(qkv_BT3D: jax.Array, heads: int) -> jax.Array:
  batch, tokens, packed = qkv_BT3D.shape
  return qkv_BT3D.reshape(batch, tokens, 3, heads, packed // (3 * heads))


def _mixed(query_BHTE: jax.Array, key_BHSE: jax.Array, value_BHSE: jax.Array) -> jax.Array:
  """What each token's weights make of the values, heads side by side: [B, T, D]."""
  batch, heads, tokens, channels = query_BHTE.shape
  score_BHTS = jnp.einsum(
    'bhte,bhse->bhts', query_BHTE * channels**-0.5, key_BHSE, preferred_element_type=jnp.float32
  )
  weight_BHTS = jax.nn.softmax(score_BHTS).astype(value_BHSE.dtype)
  mixed_BHTE = jnp.einsum('bhts,bhse->bhte', weight_BHTS, value_BHSE)
  return mixed_BHTE.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * channels)


def self_check(name: str, width: int, heads: int, tokens: int, dtype: str) -> None:
  """Compares an implementation with plain attention on this very device: seconds, against a run in vain.

  The kernels were compiled for TPUs and GPUs, and ours interpreted on CPUs; whoever wrote this had neither. A decoder's
  narrower heads are not tried.

  Args:
    name: of `ATTENTION`.
    width: D.
    heads: H.
    tokens: T.
    dtype: of the products, 'float32' or 'bfloat16'.

  Raises:
    UserError: values or gradients differ by more than bfloat16's rounding.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (2, tokens, 3 * width), (3 * width,), (2, tokens, width)
  product, bias, cotangent = (
    jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
  )

  def plain(product_BT3D, bias_3D):
    qkv_BT3D = product_BT3D.astype(jnp.float32) + bias_3D.astype(jnp.float32)
    query, key, value = qkv_BT3D.reshape(2, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    highest = jax.lax.Precision.HIGHEST
    score_BHTS = jnp.einsum('bhte,bhse->bhts', query, key, precision=highest)
    weight_BHTS = jax.nn.softmax(score_BHTS * query.shape[-1] ** -0.5)
    mixed_BHTE = jnp.einsum('bhts,bhse->bhte', weight_BHTS, value, precision=highest)
    return mixed_BHTE.transpose(0, 2, 1, 3).reshape(2, tokens, width).astype(dtype)

  def both_passes(attention):
    value, pull = jax.vjp(attention, product, bias)
    return jax.tree.map(lambda x: x.astype(jnp.float32), (value, *pull(cotangent)))

  device = jax.devices()[0].device_kind
  try:
    found = jax.jit(lambda: both_passes(lambda *args: ATTENTION[name](*args, heads)))()
  except RuntimeError as error:  # jax's own are of this kind, "not implemented" among them.
    raise UserError(
      f'the attention {name!r} does not run on this {device}: {str(error).splitlines()[0]}. Train with '
      '--config.model.attention=xla'
    ) from error
  wanted = jax.jit(lambda: both_passes(plain))()
  parts = ('values', 'gradients', 'gradients of the bias')
  for part, ours, theirs in zip(parts, found, wanted, strict=True):
    distance = float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    if not distance < _ROUNDING:
      raise UserError(
        f'the attention {name!r} fails its check on this {device}: its {part} '
        f'are off by {distance:.1%}, where {_ROUNDING:.0%} is rounding. Train with '
        '--config.model.attention=xla, and please report it.'
      )
