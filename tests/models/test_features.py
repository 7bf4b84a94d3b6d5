"""Features by name: the class tokens of the last blocks, and who has none."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.models.features import FEATURES, encode_options, feature

DEPTH, WIDTH = 5, 12


def vit(depth=DEPTH):
  return models.make_backbone('vit', 16, width=WIDTH, depth=depth, heads=2, patch=8)


def test_last4_is_what_shallower_networks_return():
  """Block l's class token under the final norm is the output of a network that ends at block l."""
  images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
  fresh = jax.jit(vit().init)(jax.random.key(0), images)['params']
  # Away from unit gains and zero biases, so that the final norm shows.
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh)

  @functools.partial(jax.jit, static_argnames=('depth', 'names'))
  def run(params, depth, names):
    output, _ = models.encode(vit(depth), params, {}, images, **encode_options(names, vit(depth)))
    return [feature(output, name) for name in names]

  last4, pooled = run(params, DEPTH, ('last4', 'pooled'))
  assert last4.dtype == jnp.float32 and last4.shape == (3, 4 * WIDTH)
  last4 = np.split(np.asarray(last4), 4, axis=1)
  np.testing.assert_array_equal(last4[3], pooled)
  for place, depth in ((0, 2), (2, 4)):
    cut = params | {
      'blocks': jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params['blocks'])
    }
    # The same products in two programs.
    np.testing.assert_allclose(last4[place], run(cut, depth, ('pooled',))[0], atol=1e-5)


def test_features_that_share_a_pass_ask_for_what_any_of_them_needs():
  assert encode_options(('pooled', 'concat', 'mean_patch'), vit()) == {'patches': True}
  assert encode_options('pooled', vit()) == {'patches': False}
  assert encode_options(('pooled', 'last4'), vit()) == {
    'patches': False,
    'layers': (1, 2, 3, 4),
    'normalise_layers': True,
  }


def test_more_blocks_than_asked_for_do_no_harm():
  layers = {i: (jnp.full((1, 2), i), None) for i in (4, 0, 3, 1, 2)}
  output = models.BackboneOutput(pooled=None, patches=None, layers=layers)
  np.testing.assert_array_equal(feature(output, 'last4'), [[1, 1, 2, 2, 3, 3, 4, 4]])


def test_an_output_without_the_blocks_says_how_to_get_them():
  output = models.BackboneOutput(jnp.ones((1, 2)), jnp.ones((1, 1, 1, 2)), {})
  with pytest.raises(ValueError, match='encode_options'):
    feature(output, 'last4')


def test_what_a_backbone_cannot_give_is_refused_in_words():
  resnet = models.make_backbone('resnet', 32, depth=10, width=8)
  assert encode_options(('pooled', 'mean_patch', 'concat'), resnet) == {'patches': True}
  with pytest.raises(
    UserError, match='a ResNet has no class tokens: use pooled, mean_patch, concat'
  ):
    encode_options('last4', resnet)
  with pytest.raises(UserError, match='last 4 blocks and config.model.depth is 3'):
    encode_options(('pooled', 'last4'), vit(3))
  with pytest.raises(UserError, match=f"unknown feature 'cls'. Known: {', '.join(FEATURES)}"):
    encode_options('cls', vit())
