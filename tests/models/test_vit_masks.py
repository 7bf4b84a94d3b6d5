"""ViT: tokens that are dropped (MAE) or replaced (iBOT).

Shape letters: N images, S visible patches, D width, h and w patches a side.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.models import layers as layers_lib
from folk_jax.models import vit as vit_lib

PATCH, GRID, WIDTH = 4, (2, 3), 24
# Two compilations of one float32 function differ by the order of their sums only: some ulps of
# values of order 1.
SAME_MATHS = {'atol': 2e-5, 'rtol': 1e-4}


def make_model(grid=GRID):
  size = (grid[0] * PATCH, grid[1] * PATCH)
  return models.make_backbone('vit', size, width=WIDTH, depth=2, heads=3, patch=PATCH)


MODEL = make_model()


@pytest.fixture(scope='module')
def params():
  """Random, nothing at zero; deviation 0.1, so that no softmax saturates."""
  rng = np.random.default_rng(0)
  image = jax.ShapeDtypeStruct((1, GRID[0] * PATCH, GRID[1] * PATCH, 3), jnp.float32)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), image)['params']
  params = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.1, leaf.shape)), shapes)
  params['norm']['scale'] += 1.0
  return params


@pytest.fixture(scope='module')
def image():
  shape = (3, GRID[0] * PATCH, GRID[1] * PATCH, 3)
  return np.float32(np.random.default_rng(1).normal(size=shape))


@jax.jit
def encode(params, image, visible_NS=None, mask_Nhw=None, mask_token_D=None):
  return MODEL.apply(
    {'params': params},
    image,
    layers=(0,),
    visible_NS=visible_NS,
    mask_Nhw=mask_Nhw,
    mask_token_D=mask_token_D,
  )


def assert_same(actual, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SAME_MATHS), actual, expected)


def repainted(image, hidden_NT, seed=2):
  """Other pixels in the hidden patches."""
  hidden_Nhw = hidden_NT.reshape(-1, *GRID).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
  other = np.float32(np.random.default_rng(seed).normal(size=image.shape))
  return np.where(hidden_Nhw[..., None], other, image)


def test_stride_and_features():
  assert (MODEL.stride, MODEL.features) == (4, 24)


def test_all_patches_in_order_are_the_plain_model(params, image):
  visible_NS = np.tile(np.arange(6, dtype=np.int32), (3, 1))
  plain = encode(params, image)
  seen = encode(params, image, visible_NS)
  assert seen.patches.shape == (3, 1, 6, WIDTH) == seen.layers[0][1].shape
  rows = plain.replace(
    patches=plain.patches.reshape(3, 1, 6, WIDTH),
    layers={0: (plain.layers[0][0], plain.layers[0][1].reshape(3, 1, 6, WIDTH))},
  )
  assert_same(seen, rows)


def test_visible_patches_are_a_smaller_image_with_their_own_positions(params, image):
  """What is left after dropping is a plain model on an image of the visible patches in a row."""
  visible_S = np.array([1, 3, 4])
  patches = vit_lib.to_patches(jnp.asarray(image), PATCH).reshape(3, 6, PATCH, PATCH, 3)
  row = patches[:, visible_S].transpose(0, 2, 1, 3, 4).reshape(3, PATCH, 3 * PATCH, 3)
  places = np.concatenate([[0], 1 + visible_S])
  row_params = params | {'pos_embed': params['pos_embed'][:, places]}
  expected = jax.jit(make_model((1, 3)).apply, static_argnames='layers')(
    {'params': row_params}, row, layers=(0,)
  )
  assert_same(encode(params, image, np.tile(np.int32(visible_S), (3, 1))), expected)


def test_dropped_patches_have_no_influence_and_order_has_none(params, image):
  visible_NS = np.array([[0, 2], [5, 1], [3, 4]], np.int32)
  seen = encode(params, image, visible_NS)
  dropped_NT = np.ones((3, 6), bool)
  np.put_along_axis(dropped_NT, visible_NS, False, axis=1)
  other = encode(params, repainted(image, dropped_NT), visible_NS)
  jax.tree.map(np.testing.assert_array_equal, seen, other)
  assert np.any(encode(params, repainted(image, ~dropped_NT), visible_NS).pooled != seen.pooled)
  turned = encode(params, image, visible_NS[:, ::-1])
  np.testing.assert_allclose(turned.pooled, seen.pooled, **SAME_MATHS)
  np.testing.assert_allclose(turned.patches[:, :, ::-1], seen.patches, **SAME_MATHS)


def test_an_empty_mask_is_the_plain_model(params, image):
  mask_Nhw = np.zeros((3, *GRID), bool)
  assert_same(
    encode(params, image, None, mask_Nhw, np.ones(WIDTH, np.float32)), encode(params, image)
  )


def test_the_mask_token_stands_where_an_embedding_would(params, image):
  """With some patch's embedding as token, a masked image is one that shows that patch there."""
  rng = np.random.default_rng(3)
  mask_Nhw = rng.random((3, *GRID)) < 0.5
  patch = np.float32(rng.normal(size=(PATCH, PATCH, 3)))
  embed = params['patch_embed']
  token_D = np.tensordot(patch, embed['kernel'], 3) + embed['bias']
  shown = np.where(
    mask_Nhw.repeat(PATCH, axis=1).repeat(PATCH, axis=2)[..., None],
    np.tile(patch, (*GRID, 1)),
    image,
  )
  masked = encode(params, image, None, mask_Nhw, np.float32(token_D))
  assert_same(masked, encode(params, shown))
  hidden = repainted(image, mask_Nhw.reshape(3, -1))
  jax.tree.map(
    np.testing.assert_array_equal,
    masked,
    encode(params, hidden, None, mask_Nhw, np.float32(token_D)),
  )


def test_a_mask_without_its_token_is_refused(params, image):
  with pytest.raises(ValueError, match='give both or neither'):
    encode(params, image, None, np.zeros((3, *GRID), bool))


def test_select_and_place_are_numpys():
  rng = np.random.default_rng(0)
  tokens_BTD = np.float32(rng.normal(size=(2, 5, 3)))
  index_BS = np.array([[4, 0, 1], [2, 1, 3]])
  chosen_BSD = jax.jit(layers_lib.select)(tokens_BTD, index_BS)
  np.testing.assert_array_equal(chosen_BSD, np.take_along_axis(tokens_BTD, index_BS[..., None], 1))
  filling_D = np.array([7.0, 8.0, 9.0], np.float32)
  expected = np.tile(filling_D, (2, 5, 1))
  np.put_along_axis(expected, index_BS[..., None], np.asarray(chosen_BSD), axis=1)
  placed_BTD = jax.jit(layers_lib.place, static_argnums=2)(chosen_BSD, index_BS, 5, filling_D)
  np.testing.assert_array_equal(placed_BTD, expected)
