"""Self-attention for TPUs as one kernel: scores and their softmax never leave the chip's fast memory.

An image's tokens are few (197 at 224 pixels), so a whole row of scores fits and nothing need be
streamed: one program takes one image and, head after head, does both products, forwards or
backwards. It reads queries, keys and values as the packed projection wrote them and writes what the
output projection reads, so that nothing is transposed in memory. Left to XLA, float32 scores [B, H,
T, T] are written and read several times in either pass, and take more of the step than the weights'
products (docs/performance.md).

A head of 64 channels fills half of the 128 lanes of a register: two heads are loaded side by side,
and one of them is blanked. The blank half costs what padding would, and it saves the shifts.

Shape letters: B images, T and S tokens, D width, H heads, E width of a head, L = 128 lanes.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

_LANES = 128
WIDTHS = (64, 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused_attention(
  product_BT3D: jax.Array, bias_3D: jax.Array, heads: int, interpret: bool = False
) -> jax.Array:
  """softmax(Q K^T / sqrt(E)) V of every head (arXiv 1706.03762, equation 1).

  Products run in the arguments' dtype with float32 sums, the softmax in float32. The backward pass
  computes the scores anew. On a mesh, call it through `shard.over_batch`: XLA can't cut a kernel.

  Args:
    product_BT3D: floating point, [B, T, 3 * D]: queries of all heads, keys of all heads, values,
      before their bias.
    bias_3D: of the packed projection, the same dtype. It is added here because its gradient is then
      summed where the gradients of the projections are, and not from memory.
    heads: H; D / H must be one of WIDTHS, and D a multiple of 128.
    interpret: runs on any back-end, slowly; for tests.

  Returns:
    [B, T, D], heads side by side, in the same dtype.
  """
  return _forward(product_BT3D, bias_3D, heads, interpret)[0]


def _forward(product_BT3D, bias_3D, heads, interpret):
  batch, tokens, width = _check(product_BT3D, bias_3D, heads)
  mixed_BTD = pl.pallas_call(
    functools.partial(_forward_kernel, heads),
    grid=(batch,),
    in_specs=[_image(tokens, 3 * width), _whole(3 * width)],
    out_specs=_image(tokens, width),
    # Of a slice of the argument: inside `shard_map` a shape also says over which axes it varies.
    out_shape=jax.eval_shape(lambda product_BT3D: product_BT3D[..., :width], product_BT3D),
    cost_estimate=_cost(2, heads, product_BT3D),
    interpret=interpret,
  )(product_BT3D, bias_3D[None])
  return mixed_BTD, (product_BT3D, bias_3D)


def _backward(heads, interpret, residuals, cotangent_BTD):
  product_BT3D, bias_3D = residuals
  batch, tokens, width = _check(product_BT3D, bias_3D, heads)
  gradient_BT3D, sum_B13D = pl.pallas_call(
    functools.partial(_backward_kernel, heads),
    grid=(batch,),
    in_specs=[_image(tokens, 3 * width), _whole(3 * width), _image(tokens, width)],
    out_specs=[_image(tokens, 3 * width), _image(1, 3 * width)],
    out_shape=jax.eval_shape(
      lambda product_BT3D: (product_BT3D, product_BT3D[:, :1].astype(jnp.float32)), product_BT3D
    ),
    cost_estimate=_cost(5, heads, product_BT3D),
    interpret=interpret,
  )(product_BT3D, bias_3D[None], cotangent_BTD)
  return gradient_BT3D, jnp.sum(sum_B13D, axis=(0, 1)).astype(bias_3D.dtype)


fused_attention.defvjp(_forward, _backward)


def fits(width: int, heads: int) -> bool:
  """Whether the kernel can take D channels in H heads."""
  return width % heads == 0 and width // heads in WIDTHS and width % _LANES == 0


def _check(product_BT3D: jax.Array, bias_3D: jax.Array, heads: int) -> tuple[int, int, int]:
  chex.assert_rank([product_BT3D, bias_3D], [3, 1])
  chex.assert_equal_shape_suffix([product_BT3D, bias_3D], 1)
  batch, tokens, packed = product_BT3D.shape
  width = packed // 3
  if packed % 3 or not fits(width, heads):
    raise ValueError(f'{heads} heads of {packed} / 3 channels: a head must have one of {WIDTHS}')
  return batch, tokens, width


def _image(tokens: int, channels: int) -> pl.BlockSpec:
  return pl.BlockSpec((None, tokens, channels), lambda image: (image, 0, 0))


def _whole(channels: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, channels), lambda image: (0, 0))


def _cost(products: int, heads: int, product_BT3D: jax.Array) -> pl.CostEstimate:
  """For the compiler's schedule and the dry-run, which can't look inside: FLOPs without padding."""
  batch, tokens, packed = product_BT3D.shape
  arrays = 4 / 3 if products == 2 else 7 / 3  # Read and written, in units of the packed one.
  return pl.CostEstimate(
    flops=products * 2 * batch * tokens**2 * (packed // 3),
    transcendentals=batch * heads * tokens**2,
    bytes_accessed=round(arrays * product_BT3D.size * product_BT3D.dtype.itemsize),
  )


def _product(left, right, contract: tuple[int, int]) -> jax.Array:
  """left and right contracted over one axis each; float32."""
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _softmax(score_TS: jax.Array) -> jax.Array:
  weight_TS = jnp.exp(score_TS - jnp.max(score_TS, axis=1, keepdims=True))
  return weight_TS * (1 / jnp.sum(weight_TS, axis=1, keepdims=True))


def _heads_of(group_TL: jax.Array, channels: int) -> list[jax.Array]:
  """Which lanes belong to each head that shares a group of 128: bool, as `group_TL`."""
  lane_TL = jax.lax.broadcasted_iota(jnp.int32, group_TL.shape, 1)
  starts = range(0, _LANES, channels)
  return [(lane_TL >= start) & (lane_TL < start + channels) for start in starts]


def _groups(product_ref, bias_ref, width: int, group: int) -> list[jax.Array]:
  """Queries, keys and values of a group of heads, each [T, 128]."""
  places = [pl.ds(part * width + group * _LANES, _LANES) for part in range(3)]
  return [product_ref[:, place] + bias_ref[:, place] for place in places]


def _forward_kernel(heads, product_ref, bias_ref, mixed_ref):
  width = mixed_ref.shape[1]
  channels = width // heads
  for group in range(width // _LANES):
    query_TL, key_SL, value_SL = _groups(product_ref, bias_ref, width, group)
    mixed_TL = jnp.zeros(query_TL.shape, jnp.float32)
    for own_TL in _heads_of(query_TL, channels):
      own_query_TL = jnp.where(own_TL, query_TL, 0)
      score_TS = _product(own_query_TL, key_SL, (1, 1)) * channels**-0.5
      weight_TS = _softmax(score_TS).astype(value_SL.dtype)
      mixed_TL = jnp.where(own_TL, _product(weight_TS, value_SL, (1, 0)), mixed_TL)
    mixed_ref[:, pl.ds(group * _LANES, _LANES)] = mixed_TL.astype(mixed_ref.dtype)


def _backward_kernel(heads, product_ref, bias_ref, cotangent_ref, gradient_ref, sum_ref):
  width = cotangent_ref.shape[1]
  channels = width // heads
  dtype = gradient_ref.dtype
  for group in range(width // _LANES):
    query_TL, key_SL, value_SL = _groups(product_ref, bias_ref, width, group)
    cotangent_TL = cotangent_ref[:, pl.ds(group * _LANES, _LANES)]
    sums = [jnp.zeros(query_TL.shape, jnp.float32)] * 3
    for own_TL in _heads_of(query_TL, channels):
      own_query_TL = jnp.where(own_TL, query_TL, 0)
      own_cotangent_TL = jnp.where(own_TL, cotangent_TL, 0)
      score_TS = _product(own_query_TL, key_SL, (1, 1)) * channels**-0.5
      weight_TS = _softmax(score_TS)
      # d(weight) = dO V^T, and through the softmax: P * (dP - rowsum(dP * P)).
      slope_TS = _product(own_cotangent_TL, value_SL, (1, 1))
      slope_TS = slope_TS - jnp.sum(slope_TS * weight_TS, axis=1, keepdims=True)
      slope_TS = (slope_TS * weight_TS * channels**-0.5).astype(dtype)
      # Where a factor is blank outside the head's own lanes, so is the product.
      of_head = (
        jnp.where(own_TL, _product(slope_TS, key_SL, (1, 0)), 0),
        _product(slope_TS, own_query_TL, (0, 0)),
        _product(weight_TS.astype(dtype), own_cotangent_TL, (0, 0)),
      )
      sums = [total_TL + part_TL for total_TL, part_TL in zip(sums, of_head, strict=True)]
    for part, sum_TL in enumerate(sums):
      place = pl.ds(part * width + group * _LANES, _LANES)
      gradient_ref[:, place] = sum_TL.astype(dtype)
      sum_ref[:, place] = jnp.sum(sum_TL, axis=0, keepdims=True)
