"""Segmentation heads: resizing and pooling by hand and by torch, UPerNet against torch's operations.

Shape letters: N images, h, w positions, D, C channels, K classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.models import segmentation

# Sums of some hundred float32 products in another order, normalised to order 1 a few times over.
SAME_MATHS = {'atol': 1e-4, 'rtol': 1e-4}
CLASSES, WIDTH = 3, 6


def test_resize_by_hand():
  # Pixel centres: outputs lie at -1/4, 1/4, 3/4, 5/4 between two inputs; outside, the border counts.
  found = segmentation.resize(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1), 1, 4)
  np.testing.assert_allclose(found[0, 0, :, 0], [0, 0.25, 0.75, 1], atol=1e-7)
  # Downwards without antialiasing: the middle of the two middle ones.
  found = segmentation.resize(jnp.array([0.0, 1.0, 3.0, 9.0]).reshape(1, 4, 1, 1), 1, 1)
  np.testing.assert_allclose(found[0, 0, 0, 0], 2.0, atol=1e-6)


def test_adaptive_pooling_is_the_mean_of_its_regions():
  rng = np.random.default_rng(0)
  for h, w in ((6, 6), (7, 5), (2, 16), (1, 4)):
    x_NhwC = np.float32(rng.normal(size=(2, h, w, 3)))
    for bins in segmentation.BINS:
      found = segmentation.adaptive_pool(x_NhwC, bins)
      assert found.shape == (2, bins, bins, 3)
      for i, j in np.ndindex(bins, bins):
        rows = slice(i * h // bins, -(-(i + 1) * h // bins))
        columns = slice(j * w // bins, -(-(j + 1) * w // bins))
        region_NC = x_NhwC[:, rows, columns].mean((1, 2))
        np.testing.assert_allclose(found[:, i, j], region_NC, atol=1e-6)  # A few float32 sums.


def test_levels_by_patch_and_depth():
  assert segmentation.factors(16) == segmentation.factors(14) == (4, 2, 1, 0.5)
  assert segmentation.factors(8) == (2, 1, 0.5, 0.25)
  assert segmentation.factors(4) == segmentation.factors(2) == (1, 0.5, 0.25, 0.125)
  assert segmentation.pyramid_layers(12) == (2, 5, 8, 11)
  assert segmentation.pyramid_layers(2) == (0, 0, 1, 1)
  assert segmentation.pyramid_layers(5) == (1, 2, 3, 4)


def test_enlarge_turns_each_position_into_its_own_four():
  module = segmentation.Enlarge(jnp.float32)
  rng = np.random.default_rng(0)
  x_NhwD = np.float32(rng.normal(size=(1, 2, 3, 2)))
  kernel, bias = np.float32(rng.normal(size=(2, 8))), np.float32(rng.normal(size=8))
  found = module.apply({'params': {'four': {'kernel': kernel, 'bias': bias}}}, x_NhwD)
  assert found.shape == (1, 4, 6, 2)
  for i, j, a, b in np.ndindex(2, 3, 2, 2):
    four = (x_NhwD[0, i, j] @ kernel + bias).reshape(2, 2, 2)
    np.testing.assert_allclose(found[0, 2 * i + a, 2 * j + b], four[a, b], atol=1e-6)


def vit_maps(images=2, side=4):
  rng = np.random.default_rng(1)
  return tuple(
    np.float32(rng.normal(size=(images, side, side, WIDTH))) for _ in range(segmentation.LEVELS)
  )


def random_params(module, maps):
  shapes = jax.eval_shape(module.init, jax.random.key(0), maps)['params']
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.3, leaf.shape)), shapes)


@pytest.fixture(scope='module')
def upernet():
  """For a ViT of patch 8, and the compiled call."""
  module = segmentation.UPerNet(
    CLASSES, channels=8, factors=segmentation.factors(8), dropout=0.5, auxiliary=True
  )
  params = random_params(module, vit_maps())
  return module, params, jax.jit(lambda *args: module.apply({'params': params}, *args))


def test_an_image_is_segmented_as_if_alone(upernet):
  _, _, apply = upernet
  maps = vit_maps()
  logits_NhwK, auxiliary_NhwK = apply(maps)
  assert logits_NhwK.shape == (2, 8, 8, CLASSES) and auxiliary_NhwK.shape == (2, 2, 2, CLASSES)
  changed = tuple(np.concatenate([x[:1], 5 * x[1:] + 1]) for x in maps)
  others, _ = apply(changed)
  np.testing.assert_allclose(others[0], logits_NhwK[0], **SAME_MATHS)
  assert np.abs(others[1] - logits_NhwK[1]).max() > 0.1


def test_dropout_is_keyed_on_the_image(upernet):
  _, _, apply = upernet
  maps = tuple(np.repeat(x[:1], 2, axis=0) for x in vit_maps())
  keys = jax.random.split(jax.random.key(1), 2)
  plain = apply(maps)[0]
  both, swapped, same = (apply(maps, k)[0] for k in (keys, keys[::-1], keys[jnp.array([0, 0])]))
  np.testing.assert_allclose(both, swapped[::-1], **SAME_MATHS)
  np.testing.assert_allclose(same[0], same[1], **SAME_MATHS)
  assert np.abs(both[0] - both[1]).max() > 1e-2 and np.abs(plain[0] - both[0]).max() > 1e-2


def test_the_auxiliary_head_and_the_pyramid_exist_only_where_asked_for(upernet):
  _, params, _ = upernet
  maps = tuple(np.zeros((1, side, side, 4), np.float32) for side in (8, 4, 2, 1))
  plain = segmentation.UPerNet(CLASSES, channels=8)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), maps)['params']
  gone = {'pyramid', 'auxiliary', 'classify_auxiliary'}
  assert gone <= params.keys() and set(shapes) == params.keys() - gone
  logits, auxiliary = jax.eval_shape(lambda p: plain.apply({'params': p}, maps), shapes)
  assert logits.shape == (1, 8, 8, CLASSES) and auxiliary is None
  with pytest.raises(ValueError, match='takes 4 maps, found 3'):
    jax.eval_shape(plain.init, jax.random.key(0), maps[:3])


def test_the_linear_head_is_a_product_a_position():
  module = segmentation.LinearHead(CLASSES)
  maps = vit_maps()[:2]
  params = random_params(module, maps)
  logits_NhwK, auxiliary = module.apply({'params': params}, maps)
  layer = params['classify']
  twin = np.concatenate(maps, axis=-1) @ layer['kernel'] + layer['bias']
  np.testing.assert_allclose(logits_NhwK, twin, atol=1e-5)  # Twelve products of order 1.
  assert auxiliary is None


@pytest.mark.parity
def test_upernet_is_torchs_operations(upernet):
  """The whole head, from maps of one size, with torch's convolutions, pooling, norms and interpolation."""
  import torch
  from torch.nn import functional

  _, params, apply = upernet
  maps = vit_maps()
  tensor = lambda x: torch.from_numpy(np.array(x))  # noqa: E731

  def norm(x, at):
    groups = x.shape[1] // int(np.gcd(16, x.shape[1]))
    return functional.group_norm(x, groups, tensor(at['scale']), tensor(at['bias']))

  def conv(x, at):
    kernel = tensor(at['conv']['kernel']).permute(3, 2, 0, 1)
    return torch.relu(norm(functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2), at['norm']))

  def enlarge(x, at):
    width = x.shape[1]
    kernel = tensor(at['four']['kernel']).reshape(width, 2, 2, width).permute(0, 3, 1, 2)
    bias = tensor(at['four']['bias']).reshape(2, 2, width).permute(2, 0, 1)
    x = functional.conv_transpose2d(x, kernel, stride=2)
    return x + bias.repeat(1, x.shape[2] // 2, x.shape[3] // 2)

  def resized(x, like):
    return functional.interpolate(x, like.shape[2:], mode='bilinear', align_corners=False)

  def classify(x, at):
    return torch.einsum('nchw,ck->nhwk', x, tensor(at['kernel'])) + tensor(at['bias'])

  x = [tensor(each).permute(0, 3, 1, 2) for each in maps]
  levels = [
    enlarge(x[0], params['pyramid']['enlarge_0_0']),
    x[1],
    functional.max_pool2d(x[2], 2, 2),
    functional.max_pool2d(x[3], 4, 4),
  ]
  top = levels[3]
  pools = [
    resized(conv(functional.adaptive_avg_pool2d(top, bins), params[f'pool_{bins}']), top)
    for bins in segmentation.BINS
  ]
  top = conv(torch.cat([top, *pools], 1), params['bottleneck'])
  merged = [conv(levels[i], params[f'lateral_{i}']) for i in range(3)] + [top]
  for i in (2, 1, 0):
    merged[i] = merged[i] + resized(merged[i + 1], merged[i])
  fine = [conv(merged[i], params[f'fpn_{i}']) for i in range(3)] + [top]
  fused = conv(torch.cat([resized(each, merged[0]) for each in fine], 1), params['fuse'])
  third = conv(levels[2], params['auxiliary'])
  logits_NhwK, auxiliary_NhwK = apply(maps)
  np.testing.assert_allclose(logits_NhwK, classify(fused, params['classify']), **SAME_MATHS)
  np.testing.assert_allclose(
    auxiliary_NhwK, classify(third, params['classify_auxiliary']), **SAME_MATHS
  )
