"""Layers that the backbones and heads share, in timm's conventions.

Shape letters: B images, T and S tokens (class token first), D width, H heads, E width of a head,
L layers. In `select` and `place`: T patches, S visible ones.
"""

import dataclasses
import operator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from folk_jax.models.attention import ATTENTION, class_attention
from folk_jax.models.layout import row_major
from folk_jax.models.linear import Linear, cast, product
from folk_jax.models.norm import LayerNorm
from folk_jax.signal.shard import gathered, in_place

# timm's and DINO's trunc_normal_(std=0.02) cuts at -2 and 2, a hundred deviations out: this is it.
normal = nn.initializers.normal(stddev=0.02)
# torch's default for convolutions, and for linear layers that nobody re-initialises:
# U(+-1/sqrt(fan_in)).
torch_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
# MAE's, for linear layers.
xavier = nn.initializers.xavier_uniform()

# What the backward pass recomputes. Keeping the products with weights alone leaves a third of the
# memory and, since a CPU is short of bandwidth, takes it no longer than keeping everything. Attention's
# result is kept too: only the gradient of the projection that follows takes it.
_MIXED = 'mixed'
REMAT = {
  'none': None,
  'elementwise': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(_MIXED),
  ),
  'block': jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x) (arXiv 1606.08415), any shape and float dtype; computed in float32."""
  return _gelu_and_slope(x)[0]


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """GELU and its derivative, Phi(x) + x phi(x), from one erf; in the dtype of x.

  Kept in place of x, which nothing else needs, the derivative is all that the backward pass takes:
  autodiff would keep float32 arrays, or compute the erf again.
  """
  x_float = x.astype(jnp.float32)
  below = 0.5 * (1.0 + jax.lax.erf(x_float * (0.5**0.5)))
  density = jnp.exp(-0.5 * jnp.square(x_float)) * (2 * jnp.pi) ** -0.5
  found = (x_float * below).astype(x.dtype), (below + x_float * density).astype(x.dtype)
  # Otherwise a TPU computes the erf inside the product that follows, once a tile of its output. One
  # barrier each, so that a derivative that nobody takes can go.
  return tuple(map(jax.lax.optimization_barrier, found))


gelu.defvjp(_gelu_and_slope, lambda slope, cotangent: (cotangent * slope,))


def drop_path_scales(sample_keys: jax.Array, depth: int, rate: float) -> jax.Array:
  """Draws the factors of stochastic depth (arXiv 1603.09382) for every block, branch and sample.

  A branch of block l survives with probability 1 - rate * l / (depth - 1), timm's linear schedule,
  and is then divided by that probability, so that its expectation is the undropped branch.

  Args:
    sample_keys: typed key array [B], one key a sample, so that draws do not depend on the layout of
      the batch.
    depth: number of blocks.
    rate: drop probability of the last block, in [0, 1).

  Returns:
    float32 [L, 2, B]: 0 where the branch is dropped, 1 / probability where it survives.
  """
  chex.assert_rank(sample_keys, 1)
  keep_L = 1.0 - jnp.linspace(0.0, rate, depth)

  def draw(layer, branch, key):
    return jax.random.bernoulli(
      jax.random.fold_in(jax.random.fold_in(key, layer), branch), keep_L[layer]
    )

  over_samples = jax.vmap(draw, (None, None, 0))
  over_branches = jax.vmap(over_samples, (None, 0, None))
  kept_L2B = jax.vmap(over_branches, (0, None, None))(jnp.arange(depth), jnp.arange(2), sample_keys)
  return kept_L2B / keep_L[:, None, None]


class LayerScale(nn.Module):
  """A learned gain a channel on a residual branch (arXiv 2103.17239); parameter `gamma` [D]."""

  initial: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gamma = self.param('gamma', nn.initializers.constant(self.initial), (x.shape[-1],))
    return x * gamma.astype(x.dtype)


class PackedProjection(nn.Module):
  """Queries, keys and values of all heads as one product, kernel [D, 3D]; the bias [3D] is not added yet."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel, bias = self._parameters(tokens_BTD.shape[-1])
    return in_place(product(tokens_BTD, kernel)), bias

  @nn.compact
  def of_class_token(self, tokens_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first token's queries [B, 1, D], and all tokens' keys and values [B, T, 2D]; both with their bias."""
    width = tokens_BTD.shape[-1]
    kernel, bias = map(gathered, self._parameters(width))
    query_B1D = product(tokens_BTD[:, :1], kernel[:, :width]) + bias[:width]
    pair_BT2D = product(tokens_BTD, kernel[:, width:]) + bias[width:]
    return in_place(query_B1D), in_place(pair_BT2D)

  def _parameters(self, width: int) -> tuple[jax.Array, jax.Array]:
    kernel = cast(self.param('kernel', normal, (width, 3 * width)), self.dtype)
    bias = self.param('bias', nn.initializers.zeros, (3 * width,)).astype(self.dtype)
    return kernel, bias


class Attention(nn.Module):
  """Multi-head self-attention with packed q, k, v, all three with biases; softmax in float32."""

  heads: int
  dtype: jnp.dtype
  implementation: str
  class_only: bool = False

  @nn.compact
  def __call__(self, tokens_BTD: jax.Array) -> jax.Array:
    """Maps tokens [B, T, D] to as many, or to the class token's result [B, 1, D] where it is `class_only`."""
    width = tokens_BTD.shape[-1]
    packed = PackedProjection(self.dtype, name='qkv')
    if self.class_only:
      mixed_BTD = class_attention(*packed.of_class_token(in_place(tokens_BTD)), self.heads)
    else:
      mixed_BTD = ATTENTION[self.implementation](*packed(in_place(tokens_BTD)), self.heads)
    mixed_BTD = checkpoint_name(in_place(mixed_BTD), _MIXED)
    return in_place(Linear(width, self.dtype, normal, name='proj')(mixed_BTD))


class Mlp(nn.Module):
  """Linear, exact GELU, linear."""

  hidden: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens_BTD: jax.Array) -> jax.Array:
    width = tokens_BTD.shape[-1]
    fc1 = Linear(self.hidden, self.dtype, normal, name='fc1')
    fc2 = Linear(width, self.dtype, normal, name='fc2')
    return in_place(fc2(in_place(gelu(in_place(fc1(in_place(tokens_BTD)))))))


@dataclasses.dataclass(frozen=True)
class BlockSettings:
  """What every block of one backbone has in common."""

  heads: int
  hidden: int
  layer_scale: float | None
  dtype: jnp.dtype
  attention: str


class Block(nn.Module):
  """Pre-norm transformer block (arXiv 2010.11929, equations 2 and 3), as the body of a scan.

  The residual stream stays float32 whatever the compute dtype, as it does under torch's autocast.

  Attributes:
    settings: what all blocks share.
    collect: whether its output is returned twice, for the scan to stack.
    class_only: whether the class token alone, [B, 1, D], is wanted of its output: then it is all that is computed, from
      the keys and values of all tokens.
  """

  settings: BlockSettings
  collect: bool
  class_only: bool = False

  @nn.compact
  def __call__(
    self, tokens_BTD: jax.Array, scale_2B: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    s = self.settings
    tokens_BTD = row_major(tokens_BTD)
    branches = (
      ('norm1', Attention(s.heads, s.dtype, s.attention, self.class_only, name='attn'), 'ls1'),
      ('norm2', Mlp(s.hidden, s.dtype, name='mlp'), 'ls2'),
    )
    for branch, (norm, body, gain) in enumerate(branches):
      update_BTD = body(LayerNorm(name=norm)(tokens_BTD).astype(s.dtype))
      if s.layer_scale is not None:
        update_BTD = LayerScale(s.layer_scale, name=gain)(update_BTD)
      if scale_2B is not None:
        update_BTD = update_BTD * scale_2B[branch][:, None, None].astype(update_BTD.dtype)
      if self.class_only:
        tokens_BTD = tokens_BTD[:, :1]
      tokens_BTD = row_major(tokens_BTD + update_BTD.astype(jnp.float32))
    return tokens_BTD, tokens_BTD if self.collect else None


def scanned_blocks(
  settings: BlockSettings, depth: int, *, collect: bool, remat: str = 'none', unroll: int = 1
) -> nn.Module:
  """`depth` blocks as one scan, called `blocks`; for use inside another module's `__call__`.

  Args:
    settings: of every block.
    depth: number of blocks; each parameter has them on its first axis.
    collect: whether every block's output is returned as well.
    remat: a key of `REMAT`.
    unroll: blocks an iteration of the scan, at least 1; `depth` or more leave no loop.

  Returns:
    Maps tokens [B, T, D] and drop path's factors [L, 2, B] or None to tokens and, if `collect`,
    [L, B, T, D].
  """
  scanned = nn.scan(
    _block(remat, depth, unroll),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=depth,
    unroll=min(unroll, depth),
  )
  return scanned(settings, collect, name='blocks')


def class_token_blocks(
  settings: BlockSettings,
  params: Any,
  tokens_BTD: jax.Array,
  scales_L2B: jax.Array | None,
  *,
  collect: bool,
  remat: str = 'none',
  unroll: int = 1,
) -> tuple[jax.Array, jax.Array | None]:
  """The class token after all blocks, the last of which computes nothing else.

  What `scanned_blocks` gives for the first token, to rounding, without the last block's queries, projection and MLP of
  all other tokens, which nothing would read.

  Args:
    settings: of every block.
    params: of all blocks, as `scanned_blocks` stacks them, [L, ...].
    tokens_BTD: float32.
    scales_L2B: drop path's factors, or None.
    collect: whether the class token after every block is returned as well.
    remat: a key of `REMAT`.
    unroll: blocks an iteration of the scan, at least 1.

  Returns:
    float32 [B, 1, D] and, if `collect`, [L, B, 1, D].
  """
  depth = jax.tree.leaves(params)[0].shape[0] - 1
  block = _block(remat, depth, unroll)
  whole = block(settings, collect=False, parent=None)
  last = block(settings, collect=False, class_only=True, parent=None)

  def through(tokens_BTD, params_and_scale):
    params, scale_2B = params_and_scale
    tokens_BTD, _ = whole.apply({'params': params}, tokens_BTD, scale_2B)
    return tokens_BTD, tokens_BTD[:, :1] if collect else None

  cut = operator.itemgetter(slice(depth)), operator.itemgetter(depth)
  below, above = (jax.tree.map(part, (params, scales_L2B)) for part in cut)
  with jax.named_scope('blocks'):
    # A scan where there is no loop, too: were layers cut from the stack one by one, a TPU would cast the whole stack.
    turns = max(1, min(unroll, depth))
    tokens_BTD, class_LB1D = jax.lax.scan(through, tokens_BTD, below, depth, unroll=turns)
    class_B1D, _ = last.apply({'params': above[0]}, tokens_BTD, above[1])
  return class_B1D, jnp.concatenate([class_LB1D, class_B1D[None]]) if collect else None


def _block(remat: str, depth: int, unroll: int) -> type[Block]:
  if REMAT[remat] is None:
    return Block
  # A loop already keeps the two passes apart; where there is none, XLA has to be kept from merging them.
  return nn.remat(Block, prevent_cse=unroll >= depth, policy=REMAT[remat])


def select(tokens_BTD: jax.Array, index_BS: jax.Array) -> jax.Array:
  """The tokens with these numbers, [B, S, D], exactly.

  A product with zeros and ones: its gradient is one too, where a gather's would be a scatter.
  """
  chosen_BST = _one_hot(index_BS, tokens_BTD.shape[1], tokens_BTD.dtype)
  return jnp.einsum('bst,btd->bsd', chosen_BST, tokens_BTD, precision=jax.lax.Precision.HIGHEST)


def place(
  tokens_BSD: jax.Array, index_BS: jax.Array, tokens: int, filling_D: jax.Array
) -> jax.Array:
  """The inverse of `select`: tokens at their places, `filling_D` at all others, [B, T, D].

  Args:
    tokens_BSD: floating point.
    index_BS: integers in [0, tokens), no number twice in a row.
    tokens: T.
    filling_D: the same dtype.
  """
  chosen_BST = _one_hot(index_BS, tokens, tokens_BSD.dtype)
  placed_BTD = jnp.einsum(
    'bst,bsd->btd', chosen_BST, tokens_BSD, precision=jax.lax.Precision.HIGHEST
  )
  return placed_BTD + (1 - jnp.sum(chosen_BST, axis=1))[..., None] * filling_D


def _one_hot(index_BS: jax.Array, tokens: int, dtype: jnp.dtype) -> jax.Array:
  return (index_BS[..., None] == jnp.arange(tokens)).astype(dtype)
