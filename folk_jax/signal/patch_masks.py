"""Which patches of an image are hidden: any of them (MAE), or blocks (BEiT, iBOT).

Each image's mask comes from its own key, by sorts and sums of fixed shape over its patches. On a
mesh, call these inside `shard.over_batch`.

Shape letters: B images, T patches in row-major order, S visible patches, h and w patches a side.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError

ASPECTS = (0.3, 1 / 0.3)


def visible_count(tokens: int, ratio: float) -> int:
  """How many patches stay visible: the integer part of tokens * (1 - ratio), as in MAE's code.

  Raises:
    UserError: nothing would be visible, or nothing hidden.
  """
  count = int(tokens * (1 - ratio))
  if not 0 < count < tokens:
    raise UserError(
      f'a mask ratio of {ratio} leaves {count} of {tokens} patches visible: choose one that leaves '
      f'1 to {tokens - 1}'
    )
  return count


def random_visible(keys_B: jax.Array, tokens: int, ratio: float) -> tuple[jax.Array, jax.Array]:
  """Draws which patches stay visible, uniformly and without replacement (arXiv 2111.06377, sec. 3).

  Args:
    keys_B: typed key array, one key an image.
    tokens: T, patches of an image.
    ratio: share to hide, in (0, 1).

  Returns:
    visible_BS: int32, the visible patches' numbers in ascending order; S is `visible_count`.
    masked_BT: bool, true for the others.

  Raises:
    UserError: nothing would be visible, or nothing hidden.
  """
  chex.assert_rank(keys_B, 1)
  count = visible_count(tokens, ratio)

  def draw(key):
    # 32 random bits a patch: a tie, which the sort would break by place, is out of reach.
    order_T = jnp.argsort(jax.random.bits(key, (tokens,)))
    visible_S = jnp.sort(order_T[:count]).astype(jnp.int32)
    return visible_S, jnp.ones(tokens, bool).at[visible_S].set(False)

  return jax.vmap(draw)(keys_B)


def block_masks(
  keys_B: jax.Array,
  grid: tuple[int, int],
  probability: float,
  ratios: tuple[float, float],
  aspects: tuple[float, float] = ASPECTS,
) -> jax.Array:
  """Draws block-wise masks as iBOT does (arXiv 2111.07832, section 3.3; blocks: 2106.08254, alg. 1).

  An image is masked with `probability`; its share r is then uniform in `ratios`, and exactly
  floor(r * h * w) patches are hidden. Blocks are added until that many are: the area of a block is
  uniform between (min(h, w) // 3)^2 and what is still to be hidden, its aspect log-uniform, its
  place uniform. Three departures from iBOT's loader, which draws again until a block fits, gives up
  after ten draws and so may hide fewer: a block with too long a side is cut to one patch less than
  the grid's; a block that hides more than is left loses the surplus, whole rows of it first, from
  its top or bottom; and blocks are added for as long as it takes.

  Args:
    keys_B: typed key array, one key a view.
    grid: (h, w).
    probability: of hiding anything, in [0, 1].
    ratios: least and greatest share to hide, in [0, 1).
    aspects: least and greatest height over width of a block, positive.

  Returns:
    bool [B, h, w], true where hidden.

  Raises:
    UserError: for values outside these ranges.
  """
  chex.assert_rank(keys_B, 1)
  for name, (low, high) in (('ratios', ratios), ('aspects', aspects)):
    if not 0 <= low <= high or (high >= 1 if name == 'ratios' else low == 0):
      raise UserError(
        f'{name} of block masks are {(low, high)}: give the least, then the greatest, '
        f'{"in [0, 1)" if name == "ratios" else "both positive"}'
      )
  if not 0 <= probability <= 1:
    raise UserError(f'the probability of a block mask is {probability}: it must lie in [0, 1]')

  def draw(key):
    on_key, ratio_key, block_key = jax.random.split(key, 3)
    ratio = jax.random.uniform(ratio_key, minval=ratios[0], maxval=ratios[1])
    # Rounding may bring the draw up to the end of the range, no further.
    ratio = jnp.minimum(ratio, ratios[1])
    target = jnp.floor(ratio * (grid[0] * grid[1])).astype(jnp.int32)
    target = jnp.where(jax.random.bernoulli(on_key, probability), target, 0)
    return _blocks(block_key, grid, target, aspects)

  return jax.vmap(draw)(keys_B)


def masked_first(mask_Bhw: jax.Array, ratio: float) -> jax.Array:
  """The numbers of the masked patches, and of some others after them where fewer are masked.

  Args:
    mask_Bhw: bool; at most floor(ratio * h * w) true an image, as `block_masks` draws them.
    ratio: the greatest share that may be masked.

  Returns:
    int32 [B, S] with S = floor(ratio * h * w), at least 1: row-major numbers in [0, h*w), all
    different.
  """
  chex.assert_rank(mask_Bhw, 3)
  mask_BT = mask_Bhw.reshape(mask_Bhw.shape[0], -1)
  order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
  # In float32, as the draw: 0.29 * 100 is 29 there, and 28.999999999999996 in Python.
  most = int(np.float32(ratio) * np.float32(mask_BT.shape[1]))
  return order_BT[:, : max(1, most)].astype(jnp.int32)


def _blocks(
  key: jax.Array, grid: tuple[int, int], target: jax.Array, aspects: tuple[float, float]
) -> jax.Array:
  """Adds blocks until `target` patches are hidden; bool [h, w]."""
  # All false, but per image as inside `shard_map` what the loop makes of it is.
  nothing_hw = jnp.broadcast_to(target < 0, grid)
  add = functools.partial(_add_block, grid, target, aspects)
  # Every patch can be in the next block, so the loop ends.
  mask_hw, _ = jax.lax.while_loop(lambda state: jnp.sum(state[0]) < target, add, (nothing_hw, key))
  return mask_hw


def _add_block(
  grid: tuple[int, int],
  target: jax.Array,
  aspects: tuple[float, float],
  state: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  mask_hw, key = state
  key, draws_key = jax.random.split(key)
  left = target - jnp.sum(mask_hw)
  area, aspect, top, start, end = jax.random.uniform(draws_key, (5,))
  least = (min(grid) // 3) ** 2
  area = least + area * (left - least)
  log_low, log_high = (math.log(value) for value in aspects)
  aspect = jnp.exp(log_low + aspect * (log_high - log_low))

  def inside(length, side, place):
    """Along one axis: bool [side], true in the block."""
    length = jnp.clip(jnp.round(length), 1, max(side - 1, 1))
    first = jnp.floor(place * (side - length + 1))
    offset = jnp.arange(side) - first
    return (offset >= 0) & (offset < length)

  rows_h = inside(jnp.sqrt(area * aspect), grid[0], top)
  columns_w = inside(jnp.sqrt(area / aspect), grid[1], start)
  new_hw = rows_h[:, None] & columns_w & ~mask_hw

  # Only the first `left` of them, counted row by row from above or from below.
  rank_hw = jnp.cumsum(new_hw.reshape(-1)).reshape(grid)
  rank_hw = jnp.where(end < 0.5, rank_hw, jnp.sum(new_hw) + 1 - rank_hw)
  return mask_hw | (new_hw & (rank_hw <= left)), key
