"""Every implementation against equation 1 of arXiv 1706.03762; what each takes; and the check on the device itself."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.models import attention, fused_attention
from folk_jax.models.attention import ATTENTION, self_check
from folk_jax.models.layout import row_major


def plain(product_BT3D, bias_3D, heads):
  """One head and one token at a time, in float64."""
  qkv_BT3HE = (np.asarray(product_BT3D, np.float64) + np.asarray(bias_3D, np.float64)).reshape(
    *product_BT3D.shape[:2], 3, heads, -1
  )
  query, key, value = (qkv_BT3HE[:, :, i] for i in range(3))
  mixed_BTHE = np.empty_like(value)
  for b, t, h in np.ndindex(mixed_BTHE.shape[:3]):
    weight_S = np.exp(key[b, :, h] @ query[b, t, h] / query.shape[-1] ** 0.5)
    mixed_BTHE[b, t, h] = (weight_S / weight_S.sum()) @ value[b, :, h]
  return mixed_BTHE.reshape(*product_BT3D.shape[:2], -1)


def arrays(tokens, heads=2, channels=64):
  rng = np.random.default_rng(tokens)
  width = heads * channels
  shapes = (3, tokens, 3 * width), (3 * width,), (3, tokens, width)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize('name', list(ATTENTION))
def test_all_are_attention_here(name):
  product, bias, _ = arrays(7)
  found = ATTENTION[name](product, bias, 2)
  np.testing.assert_allclose(found, plain(product, bias, 2), atol=1e-5)


@pytest.mark.parametrize('tokens', [8, 9])
def test_what_cudnn_is_given_is_attention_for_odd_and_even_tokens(tokens):
  """The call for cuDNN, with jax's own implementation of it: the token that is added to an odd number shows nowhere."""
  product, bias, cotangent = arrays(tokens)
  found, pull = jax.vjp(lambda *args: attention._padded(*args, 2, 'xla'), product, bias)
  wanted, pull_plain = jax.vjp(lambda *args: ATTENTION['xla'](*args, 2), product, bias)
  np.testing.assert_allclose(found, plain(product, bias, 2), atol=1e-5)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  for gradient, gradient_plain in zip(pull(cotangent), pull_plain(cotangent), strict=True):
    np.testing.assert_allclose(gradient, gradient_plain, atol=5e-5)


def test_what_cudnn_takes():
  assert attention.takes_cudnn('bfloat16', 64) and attention.takes_cudnn('bfloat16', 128)
  assert not attention.takes_cudnn('float32', 64)
  assert not attention.takes_cudnn('bfloat16', 256) and not attention.takes_cudnn('bfloat16', 12)


@pytest.mark.parametrize(
  ('capability', 'old'), [('7.5', True), ('8.0', False), ('9.0', False), ('10.0', False)]
)
def test_gpus_before_ampere_are_too_old(capability, old):
  assert attention.is_too_old(types.SimpleNamespace(compute_capability=capability)) == old
  assert not attention.is_too_old(jax.devices()[0])  # which has none


@pytest.mark.skipif(
  not attention._has_cudnn(), reason="jax's plugin for CUDA is not installed (extra `gpu`)"
)
def test_it_lowers_for_a_gpu_with_an_odd_number_of_tokens():
  product, bias, cotangent = (x.astype(jnp.bfloat16) for x in arrays(197))

  def both_passes(product, bias, cotangent):
    return jax.vjp(lambda *args: ATTENTION['cudnn'](*args, 2), product, bias)[1](cotangent)

  traced = jax.jit(both_passes).trace(product, bias, cotangent)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert '__cudnn$fmhaSoftmax"' in text.replace('(', '"') and '__cudnn$fmhaSoftmaxBackward' in text
  assert 'cudnn' not in traced.lower(lowering_platforms=('cpu',)).as_text()


def test_arrays_are_laid_row_by_row_for_gpus_alone():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)

  def loss(x):
    return jnp.sum(row_major(x) ** 2)

  np.testing.assert_allclose(jax.grad(loss)(x), 2 * x, rtol=1e-6)
  traced = jax.jit(jax.grad(loss)).trace(x)
  # The value's, and its gradient's.
  assert traced.lower(lowering_platforms=('cuda',)).as_text().count('@LayoutConstraint') == 2
  assert 'LayoutConstraint' not in traced.lower(lowering_platforms=('tpu',)).as_text()


@pytest.fixture
def interpreted(monkeypatch):
  """The TPU's kernel itself, which this machine can only interpret."""

  def kernel(product_BT3D, bias_3D, heads):
    return fused_attention.fused_attention(product_BT3D, bias_3D, heads, True)

  monkeypatch.setitem(ATTENTION, 'pallas', kernel)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', list(ATTENTION))
def test_self_check_passes_where_attention_is_right(name, dtype, interpreted):
  self_check(name, 128, 2, 17, dtype)


def test_self_check_sees_a_kernel_that_is_wrong(monkeypatch, interpreted):
  """A softmax over scores of the wrong scale, and a head's neighbour in its lanes."""
  right = fused_attention._softmax
  monkeypatch.setattr(fused_attention, '_softmax', lambda score_TS: right(0.8 * score_TS))
  with pytest.raises(UserError, match="'pallas' fails its check.*model.attention=xla"):
    self_check('pallas', 128, 2, 17, 'float32')
  monkeypatch.setattr(fused_attention, '_softmax', right)
  monkeypatch.setattr(
    fused_attention, '_heads_of', lambda x, channels: [jnp.ones(x.shape, bool)] * 2
  )
  with pytest.raises(UserError, match='fails its check'):
    self_check('pallas', 128, 2, 17, 'float32')


def test_self_check_names_the_cure_where_a_kernel_does_not_run(monkeypatch):
  def missing(product_BT3D, bias_3D, heads):
    raise NotImplementedError('requires cuDNN version >= 9.11.')

  monkeypatch.setitem(ATTENTION, 'cudnn', missing)
  with pytest.raises(UserError, match="'cudnn' does not run on this .*9.11.*model.attention=xla"):
    self_check('cudnn', 128, 2, 17, 'bfloat16')


def test_self_check_sees_padding_that_shows(monkeypatch):
  """As if the token that is added for cuDNN were attended to."""

  def padded(product_BT3D, bias_3D, heads):
    more_BT3D = jnp.pad(product_BT3D, ((0, 0), (0, 1), (0, 0)))
    return ATTENTION['xla'](more_BT3D, bias_3D, heads)[:, :-1]

  monkeypatch.setitem(ATTENTION, 'cudnn', padded)
  with pytest.raises(UserError, match="'cudnn' fails its check"):
    self_check('cudnn', 128, 2, 17, 'bfloat16')
