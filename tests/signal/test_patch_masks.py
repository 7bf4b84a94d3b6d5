"""Patch masks: exact counts, draws that belong to the image, and blocks that are blocks.

Shape letters: B images, T patches, S visible patches, h and w patches a side.
"""

import functools

import jax
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import patch_masks

random_visible = jax.jit(patch_masks.random_visible, static_argnums=(1, 2))
block_masks = jax.jit(patch_masks.block_masks, static_argnums=(1, 2, 3))
DRAWS = 4000


@functools.cache
def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


@functools.cache
def ibot_masks():
  """[B, 14, 14], as iBOT masks a view of 224 pixels that it masks at all."""
  return np.asarray(block_masks(keys(DRAWS), (14, 14), 1.0, (0.1, 0.5)))


def boundary(mask_Bhw):
  """Neighbouring pairs of which one is hidden: few where the hidden patches lie together."""
  return (mask_Bhw[:, 1:] != mask_Bhw[:, :-1]).sum((1, 2)) + (
    mask_Bhw[:, :, 1:] != mask_Bhw[:, :, :-1]
  ).sum((1, 2))


# 196 * 0.25 = 49; 10 * 0.4 = 4; 5 * 0.25 = 1.25; 16 * 0.3 = 4.8: the integer part, as MAE's code.
@pytest.mark.parametrize(
  'tokens, ratio, visible', [(196, 0.75, 49), (10, 0.6, 4), (5, 0.75, 1), (16, 0.7, 4)]
)
def test_visible_and_masked_share_out_the_patches(tokens, ratio, visible):
  visible_BS, masked_BT = random_visible(keys(20), tokens, ratio)
  assert visible_BS.shape == (20, visible) and visible_BS.dtype == np.int32
  assert masked_BT.shape == (20, tokens) and masked_BT.dtype == bool
  for visible_S, masked_T in zip(np.asarray(visible_BS), np.asarray(masked_BT), strict=True):
    np.testing.assert_array_equal(visible_S, np.flatnonzero(~masked_T))  # and so ascending


def test_every_set_of_patches_is_as_likely():
  visible_BS, _ = random_visible(keys(DRAWS), 5, 0.6)
  sets, counts = np.unique(np.asarray(visible_BS), axis=0, return_counts=True)
  assert len(sets) == 10  # two of five
  # Each has probability 0.1; five deviations of its frequency: 5 * sqrt(0.1 * 0.9 / 4000) = 0.024.
  np.testing.assert_allclose(counts / DRAWS, 0.1, atol=0.024)


@pytest.mark.parametrize(
  'draw',
  [
    lambda keys_B: random_visible(keys_B, 16, 0.75)[0],
    lambda keys_B: block_masks(keys_B, (4, 6), 0.7, (0.1, 0.5)),
  ],
  ids=['random', 'block'],
)
def test_a_draw_belongs_to_its_key(draw):
  order = np.array([3, 1, 0, 4, 2, 5])
  straight = np.asarray(draw(keys(6)))
  np.testing.assert_array_equal(draw(keys(6)[order]), straight[order])
  assert len(np.unique(straight, axis=0)) > 3
  assert np.any(np.asarray(draw(keys(6, seed=1))) != straight)


def test_compiled_draws_are_the_plain_ones():
  for plain, compiled in zip(
    patch_masks.random_visible(keys(3), 12, 0.5), random_visible(keys(3), 12, 0.5), strict=True
  ):
    np.testing.assert_array_equal(plain, compiled)
  np.testing.assert_array_equal(
    patch_masks.block_masks(keys(3), (4, 5), 0.5, (0.2, 0.6)),
    block_masks(keys(3), (4, 5), 0.5, (0.2, 0.6)),
  )


# 0.4 of a 14 x 14 grid: 78.4; of 3 x 7: 8.4; of 1 x 5: 2; of 2 x 2: 1.6; 0.99 of 4 x 4: 15.84.
@pytest.mark.parametrize(
  'grid, ratio, count',
  [((14, 14), 0.4, 78), ((3, 7), 0.4, 8), ((1, 5), 0.4, 2), ((2, 2), 0.4, 1), ((4, 4), 0.99, 15)],
)
def test_blocks_hide_exactly_the_share(grid, ratio, count):
  mask_Bhw = np.asarray(block_masks(keys(50), grid, 1.0, (ratio, ratio)))
  assert mask_Bhw.shape == (50, *grid) and mask_Bhw.dtype == bool
  np.testing.assert_array_equal(mask_Bhw.sum((1, 2)), count)


def test_nothing_is_hidden_at_ratio_or_probability_zero():
  assert not np.any(block_masks(keys(50), (4, 4), 1.0, (0.0, 0.0)))
  assert not np.any(block_masks(keys(50), (4, 4), 0.0, (0.3, 0.5)))


def test_the_share_is_zero_or_uniform():
  count_B = np.asarray(block_masks(keys(DRAWS), (10, 10), 0.5, (0.1, 0.5))).sum((1, 2))
  # Five deviations: 5 * sqrt(0.25 / 4000) = 0.04.
  assert abs((count_B > 0).mean() - 0.5) < 0.04
  shares, frequency = np.unique(count_B[count_B > 0], return_counts=True)
  np.testing.assert_array_equal(shares, np.arange(10, 50))
  # 2,000 draws over 40 shares, 50 each: five deviations are 5 * sqrt(50) = 35.
  assert np.abs(frequency - (count_B > 0).sum() / 40).max() < 35


def test_blocks_are_blocks():
  """A boundary as short as that of iBOT's loader, and a quarter of a random mask's."""
  mask_Bhw = ibot_masks()
  rng = np.random.default_rng(0)
  shuffled_BT = rng.permuted(mask_Bhw.reshape(DRAWS, -1), axis=1)
  length = boundary(mask_Bhw).mean()
  assert length < 0.3 * boundary(shuffled_BT.reshape(mask_Bhw.shape)).mean()
  # 3,000 draws of the loader's procedure have 33.8 on average; the surplus that we cut off the last
  # block, where it draws again, lengthens ours by a tenth.
  assert 33.8 < length < 1.15 * 33.8


def test_no_side_of_the_image_is_preferred():
  """Blocks lie above as often as below and left as often as right, and lose their surplus evenly."""
  share_hw = ibot_masks().mean(0)
  # A difference of two shares near 0.5 has deviation sqrt(2 * 0.25 / 4000) = 0.011; five of them.
  np.testing.assert_allclose(share_hw, share_hw[::-1], atol=0.056)
  np.testing.assert_allclose(share_hw, share_hw[:, ::-1], atol=0.056)
  # Few blocks reach into a corner, many cover the centre.
  assert share_hw[0, 0] < 0.1 < 0.4 < share_hw[7, 7]
  # Tall blocks, of up to four patches where two are to be hidden: cut from one end alone, they would
  # leave the other end of the column bare.
  column_h = np.asarray(
    patch_masks.block_masks(keys(DRAWS), (8, 1), 1.0, (0.25, 0.25), (9.0, 9.0))
  ).mean((0, 2))
  np.testing.assert_allclose(column_h, column_h[::-1], atol=0.056)


@pytest.mark.parametrize(
  'call, words',
  [
    (lambda k: patch_masks.random_visible(k, 4, 0.9), 'leaves 0 of 4 patches visible'),
    (lambda k: patch_masks.random_visible(k, 4, 0.0), 'leaves 4 of 4 patches visible'),
    (lambda k: patch_masks.block_masks(k, (4, 4), 1.5, (0.1, 0.5)), 'must lie in [0, 1]'),
    (lambda k: patch_masks.block_masks(k, (4, 4), 0.5, (0.5, 0.1)), 'the least, then the greatest'),
    (lambda k: patch_masks.block_masks(k, (4, 4), 0.5, (0.5, 1.0)), 'in [0, 1)'),
    (lambda k: patch_masks.block_masks(k, (4, 4), 0.5, (0.1, 0.5), (0.0, 1.0)), 'both positive'),
  ],
)
def test_mistakes_are_said_in_words(call, words):
  with pytest.raises(UserError) as refused:
    call(keys(1))
  assert words in str(refused.value) and '\n' not in str(refused.value)


def test_masked_patches_come_first_and_each_number_once():
  mask_Bhw = ibot_masks()[:64]
  index_BS = np.asarray(patch_masks.masked_first(mask_Bhw, 0.5))
  assert index_BS.shape == (64, 98)
  mask_BT = mask_Bhw.reshape(64, -1)
  for index_S, mask_T in zip(index_BS, mask_BT, strict=True):
    assert len(set(index_S)) == 98
    hidden = mask_T.sum()
    np.testing.assert_array_equal(index_S[:hidden], np.flatnonzero(mask_T))


def test_masked_patches_have_room_where_float32_rounds_up():
  # 0.29 * 100 is 28.999999999999996 in Python; a device's float32 draws up to 29.
  mask_Bhw = np.zeros((1, 10, 10), bool)
  mask_Bhw[0, :3] = True
  mask_Bhw[0, 0, 0] = False
  index_BS = np.asarray(patch_masks.masked_first(mask_Bhw, 0.29))
  np.testing.assert_array_equal(index_BS[0], np.arange(1, 30))
