"""The kernel against plain attention, interpreted; and that it lowers for a TPU, which nothing here has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.models.fused_attention import fits, fused_attention


def plain(product_BT3D, bias_3D, heads):
  """Equation 1 of arXiv 1706.03762, in float32."""
  batch, tokens, packed = product_BT3D.shape
  qkv_BT3HE = (product_BT3D + bias_3D).astype(jnp.float32).reshape(batch, tokens, 3, heads, -1)
  query, key, value = qkv_BT3HE.transpose(2, 0, 3, 1, 4)
  highest = jax.lax.Precision.HIGHEST
  score = jnp.einsum('bhte,bhse->bhts', query, key, precision=highest) / query.shape[-1] ** 0.5
  mixed = jnp.einsum('bhts,bhse->bhte', jax.nn.softmax(score), value, precision=highest)
  return mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, packed // 3)


def arrays(heads, channels, tokens, dtype=jnp.float32):
  rng = np.random.default_rng(heads + tokens)
  width = heads * channels
  shapes = (3, tokens, 3 * width), (3 * width,), (3, tokens, width)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
  'heads, channels, tokens', [(2, 64, 9), (4, 64, 17), (1, 128, 5), (3, 128, 8)]
)
def test_kernel_is_attention_in_both_passes(heads, channels, tokens):
  product, bias, cotangent = arrays(heads, channels, tokens)
  found, pull = jax.vjp(lambda *args: fused_attention(*args, heads, True), product, bias)
  wanted, pull_plain = jax.vjp(functools.partial(plain, heads=heads), product, bias)
  # Sums of up to 128 products of normal numbers, 6e-8 each, then a softmax of scores of up to 30.
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  for gradient, gradient_plain in zip(pull(cotangent), pull_plain(cotangent), strict=True):
    np.testing.assert_allclose(gradient, gradient_plain, atol=1e-4)


def test_bfloat16_keeps_the_softmax_in_float32():
  product, bias, cotangent = arrays(2, 64, 33, jnp.bfloat16)
  found, pull = jax.vjp(lambda *args: fused_attention(*args, 2, True), product, bias)
  wanted, pull_plain = jax.vjp(functools.partial(plain, heads=2), product, bias)
  assert found.dtype == jnp.bfloat16
  # Weights, values and the result are each rounded to 8 bits: a few times 2**-9 of values about 3.
  np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.04)
  of_product, of_bias = pull(cotangent)
  of_product_plain, of_bias_plain = pull_plain(cotangent.astype(jnp.float32))
  for gradient, gradient_plain in ((of_product, of_product_plain), (of_bias, of_bias_plain)):
    assert gradient.dtype == jnp.bfloat16
    gradient, gradient_plain = (x.astype(jnp.float32) for x in (gradient, gradient_plain))
    distance = jnp.linalg.norm(gradient - gradient_plain) / jnp.linalg.norm(gradient_plain)
    assert distance < 0.02


def test_it_lowers_for_a_tpu_inside_a_model_and_is_xlas_elsewhere():
  by = {
    attention: models.make_backbone(
      'vit', 32, width=128, depth=2, heads=2, patch=8, attention=attention
    )
    for attention in ('xla', 'pallas')
  }
  image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
  params = by['xla'].init(jax.random.key(0), image)['params']

  weight = np.random.default_rng(1).normal(size=(2, 4, 4, 128))

  def loss(params, attention):
    return jnp.sum(weight * by[attention].apply({'params': params}, image).patches)

  gradients = [jax.jit(jax.grad(loss), static_argnums=1)(params, attention) for attention in by]
  for leaf, other in zip(*map(jax.tree.leaves, gradients), strict=True):
    # Sums over 34 tokens in another order; the packed bias holds the keys', whose gradient is zero.
    np.testing.assert_allclose(leaf, other, atol=1e-5 * np.abs(leaf).max())
  lowered = jax.jit(jax.grad(loss), static_argnums=1).trace(params, 'pallas')
  # One forward and one backward kernel in the bodies of the scans, both passes.
  assert lowered.lower(lowering_platforms=('tpu',)).as_text().count('tpu_custom_call') == 2
  assert 'tpu_custom_call' not in lowered.lower(lowering_platforms=('cpu',)).as_text()


def test_widths_that_do_not_fill_the_lanes_are_refused():
  assert fits(768, 12) and fits(384, 6) and fits(1024, 16) and fits(256, 2)
  assert not fits(192, 3) and not fits(96, 3) and not fits(384, 12) and not fits(128, 3)
  with pytest.raises(UserError, match="'pallas'.*width 192 with 3 heads"):
    models.make_backbone('vit', 32, width=192, depth=1, heads=3, patch=8, attention='pallas')
  with pytest.raises(ValueError, match='3 heads of 576 / 3'):
    fused_attention(jnp.ones((1, 4, 576)), jnp.ones(576), 3)
