"""The decoder of masked image modelling: positions by hand, places of tokens by NumPy, levels apart.

Shape letters: N images, S visible patches, T patches, D encoder's width, E decoder's width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import errors, models

GRID, FIELDS = (2, 3), {'width': 8, 'depth': 2, 'heads': 2}
OUTPUTS = (5, 2)
VISIBLE_NS = np.array([[0, 2], [5, 1], [3, 4]], np.int32)
# Two compilations of one float32 function differ by the order of their sums only: some ulps of
# values of order 1.
SAME_MATHS = {'atol': 2e-5, 'rtol': 1e-4}


@pytest.fixture(scope='module')
def decoder():
  return models.MaskedDecoder(GRID, OUTPUTS, **FIELDS)


@pytest.fixture(scope='module')
def encoded():
  """Two levels of an encoder of width 6."""
  rng = np.random.default_rng(0)
  return tuple(
    (np.float32(rng.normal(size=(3, 6))), np.float32(rng.normal(size=(3, 1, 2, 6))))
    for _ in OUTPUTS
  )


@pytest.fixture(scope='module')
def params(decoder, encoded):
  shapes = jax.eval_shape(decoder.init, jax.random.key(0), encoded, VISIBLE_NS)['params']
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.3, leaf.shape)), shapes)


@pytest.fixture(scope='module')
def decode(decoder):
  return jax.jit(lambda params, *args: decoder.apply({'params': params}, *args))


def test_positions_by_hand():
  # Width 4 has one frequency, 1: [sin x, cos x, sin y, cos y].
  expected = [[0, 1, 0, 1], [np.sin(1), np.cos(1), 0, 1], [0, 1, np.sin(1), np.cos(1)]]
  np.testing.assert_allclose(models.sincos_position((2, 2), 4)[:3], expected, atol=1e-7)
  # Width 8 has two, 1 and 10000^(-1/2) = 0.01; patch 5 of 2 x 3 is row 1, column 2.
  column, row = ([f(place * w) for f in (np.sin, np.cos) for w in (1, 0.01)] for place in (2, 1))
  np.testing.assert_allclose(models.sincos_position((2, 3), 8)[5], column + row, atol=1e-7)


def norm(x, scale, bias):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def test_tokens_stand_at_their_places_and_mask_tokens_elsewhere(params, decode, encoded):
  """With blocks that add nothing, each patch is a linear function of its own token, by NumPy."""
  blocks = {
    'norm1': params['blocks']['norm1'],
    'norm2': params['blocks']['norm2'],
    'attn': params['blocks']['attn']
    | {'proj': jax.tree.map(np.zeros_like, params['blocks']['attn']['proj'])},
    'mlp': params['blocks']['mlp']
    | {'fc2': jax.tree.map(np.zeros_like, params['blocks']['mlp']['fc2'])},
  }
  found = decode(params | {'blocks': blocks}, encoded, VISIBLE_NS)
  for level, (_, patches_N1SD) in enumerate(encoded):
    into, out = params[f'embed_{level}'], params[f'head_{level}']
    tokens_NTE = np.tile(params['mask_token'][level], (3, 6, 1))
    for image in range(3):
      embedded_SE = patches_N1SD[image, 0] @ into['kernel'] + into['bias']
      tokens_NTE[image, VISIBLE_NS[image]] = embedded_SE
    tokens_NTE = norm(tokens_NTE + models.sincos_position(GRID, 8), **params['norm'])
    expected = tokens_NTE @ out['kernel'] + out['bias']
    assert found[level].shape == (3, 6, OUTPUTS[level]) and found[level].dtype == jnp.float32
    np.testing.assert_allclose(found[level], expected, **SAME_MATHS)


def test_the_order_of_the_visible_patches_does_not_matter(params, decode, encoded):
  turned = tuple((pooled_ND, patches_N1SD[:, :, ::-1]) for pooled_ND, patches_N1SD in encoded)
  for a, b in zip(
    decode(params, turned, VISIBLE_NS[:, ::-1]), decode(params, encoded, VISIBLE_NS), strict=True
  ):
    np.testing.assert_allclose(a, b, **SAME_MATHS)


def test_visible_patches_and_class_token_inform_the_masked_ones(params, decode, encoded):
  straight = decode(params, encoded, VISIBLE_NS)[0]
  for part in range(2):
    changed = [list(level) for level in encoded]
    changed[0][part] = -changed[0][part]
    found = decode(params, tuple(map(tuple, changed)), VISIBLE_NS)[0]
    assert np.abs(found[0, 1] - straight[0, 1]).max() > 1e-3  # patch 1 of image 0 is masked


def test_levels_share_the_blocks_and_nothing_else(params, decode, encoded):
  """Each level is a decoder of its own, with the same blocks and norm."""
  found = decode(params, encoded, VISIBLE_NS)
  for level, values in enumerate(OUTPUTS):
    own = {
      'blocks': params['blocks'],
      'norm': params['norm'],
      'mask_token': params['mask_token'][level : level + 1],
      'embed_0': params[f'embed_{level}'],
      'head_0': params[f'head_{level}'],
    }
    alone = models.MaskedDecoder(GRID, (values,), **FIELDS)
    (expected,) = jax.jit(alone.apply)({'params': own}, encoded[level : level + 1], VISIBLE_NS)
    np.testing.assert_allclose(found[level], expected, **SAME_MATHS)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(params, decode, encoded):
  exact = decode(params, encoded, VISIBLE_NS)[0]
  half = models.MaskedDecoder(GRID, OUTPUTS, dtype='bfloat16', **FIELDS)
  rough = jax.jit(half.apply)({'params': params}, encoded, VISIBLE_NS)[0]
  assert rough.dtype == jnp.float32
  # bfloat16 rounds to 2^-9 relative; four branches, a norm and a head on values of order 1.
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert np.abs(rough - exact).max() > 1e-4


@pytest.mark.parametrize(
  'change, words',
  [
    ({'heads': 3}, 'heads must divide the width'),
    ({'width': 6}, 'a decoder of width 6 with 2 heads'),
    ({'depth': 0}, 'give at least 1'),
  ],
)
def test_mistakes_are_said_in_words(change, words):
  with pytest.raises(errors.UserError, match=words):
    models.MaskedDecoder(GRID, OUTPUTS, **FIELDS | change).check()
  with pytest.raises(errors.UserError, match='multiple of 4'):
    models.sincos_position(GRID, 6)


def test_a_level_too_few_is_refused(params, decode, encoded):
  with pytest.raises(ValueError, match='1 encoded levels for 2 outputs'):
    decode(params, encoded[:1], VISIBLE_NS)
