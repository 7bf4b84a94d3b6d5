"""Mixup, CutMix and erasing: shares that are what was mixed, boxes by hand and by timm, one device and eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal.mixing import Mixing, cut_box, draw_weights, erase, mix, partner, soft_targets

BOTH = Mixing(mixup=0.8, cutmix=1.0, mix_probability=1.0, switch_probability=0.5)
HEIGHT, WIDTH = 12, 20


def images(count=4, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, HEIGHT, WIDTH, 3)).astype(np.float32)


@functools.cache
def draws(settings: Mixing, count: int = 2000):
  """Weights [N, H, W] and shares [N] of many batches."""
  keys = jax.random.split(jax.random.key(0), count)
  draw = jax.jit(jax.vmap(lambda key: draw_weights(key, settings, HEIGHT, WIDTH)))
  own, share = draw(keys)
  return np.asarray(own)[..., 0], np.asarray(share)


@functools.cache
def erased(count: int = 3000):
  """Which pixels are noise, [N, H, W], and the noise."""
  zeros = jnp.zeros((count, HEIGHT, WIDTH, 3))
  keys = jax.random.split(jax.random.key(1), count)
  found = np.asarray(jax.jit(lambda image, keys: erase(image, keys, 0.25))(zeros, keys))
  return found[..., 0] != 0, found


def test_soft_targets_by_hand_and_without_a_label():
  found = soft_targets(jnp.array([2, 0, -1, 4]), 4, 0.1)
  # timm: 0.1 / 4 for every class, and 1 - 0.1 more for the label's.
  np.testing.assert_allclose(found[0], [0.025, 0.025, 0.925, 0.025], rtol=1e-6)
  np.testing.assert_allclose(found[1], [0.925, 0.025, 0.025, 0.025], rtol=1e-6)
  assert np.isnan(found[2:]).all()
  np.testing.assert_array_equal(soft_targets(jnp.array([1]), 3, 0.0), [[0, 1, 0]])


def test_mixing_by_hand():
  """Neighbours, one share for images and targets, and rows of targets that sum to 1."""
  image_BHWC, target_BK = images(), soft_targets(jnp.array([0, 1, 2, 2]), 3, 0.1)
  key = jax.random.key(3)
  for settings in (BOTH, Mixing(0.8, 0.0, 1.0, 0.0), Mixing(0.0, 1.0, 1.0, 0.0)):
    own_HW1, share = jax.device_get(draw_weights(key, settings, HEIGHT, WIDTH))
    assert 0 < share < 1
    found, targets = mix(jnp.asarray(image_BHWC), target_BK, key, settings)
    for b, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
      expected = own_HW1 * image_BHWC[b] + (1 - own_HW1) * image_BHWC[other]
      np.testing.assert_allclose(found[b], expected, atol=1e-6)  # float32
      np.testing.assert_allclose(
        targets[b], share * target_BK[b] + (1 - share) * target_BK[other], atol=1e-6
      )
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)


def test_a_partner_has_its_partner():
  rows = jnp.arange(6)
  np.testing.assert_array_equal(partner(rows), [1, 0, 3, 2, 5, 4])
  np.testing.assert_array_equal(partner(partner(rows)), rows)


def test_the_share_is_exactly_what_is_left_of_the_image():
  own_NHW, share_N = draws(Mixing(0.0, 1.0, 1.0, 0.0))
  assert set(np.unique(own_NHW)) == {0.0, 1.0}
  left_N = own_NHW.sum(axis=(1, 2))
  # Whole numbers of 240 pixels: rounding is float32's alone.
  np.testing.assert_allclose(share_N, left_N / (HEIGHT * WIDTH), rtol=1e-6, atol=1e-7)
  own_NHW, share_N = draws(Mixing(0.8, 0.0, 1.0, 0.0))
  np.testing.assert_array_equal(own_NHW, np.broadcast_to(share_N[:, None, None], own_NHW.shape))


@pytest.mark.parametrize('strength', [0.2, 0.8, 3.0])
def test_mixups_share_is_a_beta(strength):
  _, share_N = draws(Mixing(strength, 0.0, 1.0, 0.0))
  assert 0 <= share_N.min() and share_N.max() <= 1 and np.isfinite(share_N).all()
  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)). Five standard errors at 2,000 draws; a variance's is below
  # 1/4 of sqrt(1 / 2000).
  variance = 1 / (4 * (2 * strength + 1))
  assert abs(share_N.mean() - 0.5) < 5 * (variance / 2000) ** 0.5
  assert abs(share_N.var() - variance) < 5 * 0.25 / 2000**0.5


def test_probabilities_are_what_they_say():
  settings = Mixing(0.8, 1.0, mix_probability=0.6, switch_probability=0.25)
  own_NHW, share_N = draws(settings)
  alone_N = share_N == 1
  cut_N = (np.ptp(own_NHW, axis=(1, 2)) > 0) | (share_N == 0)
  # A box of no pixels, drawn with probability below 1 / 100, leaves a batch alone, too: five standard errors and that.
  assert abs(alone_N.mean() - 0.4) < 5 * (0.24 / 2000) ** 0.5 + 0.005
  assert abs(cut_N.mean() - 0.6 * 0.25) < 5 * (0.13 / 2000) ** 0.5 + 0.005


@pytest.mark.parametrize('off', [Mixing(0.8, 1.0, 0.0, 0.5), Mixing(0.0, 0.0, 1.0, 0.5)])
def test_off_is_the_image_itself(off):
  image_BHWC, target_BK = jnp.asarray(images()), soft_targets(jnp.arange(4), 4, 0.1)
  assert not off.acts and BOTH.acts
  for seed in range(5):
    found, targets = mix(image_BHWC, target_BK, jax.random.key(seed), off)
    np.testing.assert_array_equal(found, image_BHWC)
    np.testing.assert_array_equal(targets, target_BK)


@pytest.mark.parametrize(
  'side, row, column, expected',
  [
    (0.5, 6, 10, (slice(3, 9), slice(5, 15))),  # 6 x 10 around the centre
    (0.5, 0, 19, (slice(0, 3), slice(14, 20))),  # cut at the corner
    (
      0.25,
      6,
      10,
      (slice(5, 8), slice(8, 13)),
    ),  # 3 x 5: 3 // 2 before the centre, the rest from it on
    (0.0, 6, 10, (slice(0, 0), slice(0, 0))),
    (1.0, 6, 10, (slice(0, 12), slice(0, 20))),
  ],
)
def test_boxes_by_hand(side, row, column, expected):
  inside_HW, area = cut_box(side, row, column, HEIGHT, WIDTH)
  wanted = np.zeros((HEIGHT, WIDTH), bool)
  wanted[expected] = True
  np.testing.assert_array_equal(inside_HW, wanted)
  assert area == wanted.sum()


@pytest.mark.parity
def test_boxes_are_timms(monkeypatch):
  from timm.data import mixup

  rng = np.random.default_rng(0)
  box = jax.jit(lambda side, row, column: cut_box(side, row, column, HEIGHT, WIDTH))
  for _ in range(200):
    share, centre = rng.random(), [int(rng.integers(HEIGHT)), int(rng.integers(WIDTH))]
    values = iter(centre)
    monkeypatch.setattr(mixup.np.random, 'randint', lambda *a, values=values, **k: next(values))
    (top, bottom, left, right), left_share = mixup.cutmix_bbox_and_lam((3, HEIGHT, WIDTH), share)
    inside_HW, area = box(np.float32(np.sqrt(1 - share)), *centre)
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[top:bottom, left:right] = True
    np.testing.assert_array_equal(inside_HW, wanted)
    assert 1 - area / (HEIGHT * WIDTH) == pytest.approx(left_share, abs=1e-6)


@pytest.mark.parity
def test_targets_are_timms():
  """timm mirrors the batch; of two images the mirror image is the neighbour."""
  import torch
  from timm.data.mixup import mixup_target

  label_B = np.array([3, 0])
  found = 0.3 * soft_targets(jnp.asarray(label_B), 5, 0.1)
  found += 0.7 * partner(soft_targets(jnp.asarray(label_B), 5, 0.1))
  expected = mixup_target(torch.tensor(label_B), 5, lam=0.3, smoothing=0.1)
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)  # float32


def test_odd_batches_and_impossible_settings_are_refused():
  with pytest.raises(UserError, match='here it has 3: make config.batch_size a multiple of 2 x'):
    mix(jnp.asarray(images(3)), jnp.ones((3, 1)), jax.random.key(0), BOTH)
  for field, value in (('mixup', -1.0), ('cutmix', -0.1), ('switch_probability', 1.1)):
    fields = {'mixup': 0.8, 'cutmix': 1.0, 'mix_probability': 1.0, 'switch_probability': 0.5}
    with pytest.raises(UserError, match=f'{field} is {value}'):
      Mixing(**fields | {field: value})


def test_a_quarter_loses_a_rectangle_of_the_right_size():
  hit_NHW, _ = erased()
  hit_N = hit_NHW.any(axis=(1, 2))
  assert abs(hit_N.mean() - 0.25) < 5 * (0.1875 / 3000) ** 0.5
  pixels_N = hit_NHW[hit_N].sum(axis=(1, 2))
  rows_N = hit_NHW[hit_N].any(axis=2).sum(axis=1)
  columns_N = hit_NHW[hit_N].any(axis=1).sum(axis=1)
  np.testing.assert_array_equal(pixels_N, rows_N * columns_N)  # rectangles
  assert rows_N.max() < HEIGHT and columns_N.max() < WIDTH
  # Areas from 0.02 to 1/3 of 240 pixels, their sides rounded: by half a pixel of 1.2 at the least.
  area_N = pixels_N / (HEIGHT * WIDTH)
  assert 0 < area_N.min() < 0.05 and 0.25 < area_N.max() < 0.40
  # And all of the image is met.
  assert hit_NHW.any(axis=0).all()


def test_what_is_erased_is_standard_normal():
  hit_NHW, found = erased()
  noise = found[hit_NHW]
  assert abs(noise.mean()) < 5 / noise.size**0.5
  assert abs(noise.std() - 1) < 5 / (2 * noise.size) ** 0.5
  assert len(np.unique(noise)) > 0.99 * noise.size  # every pixel and channel its own


def test_what_is_not_erased_is_untouched_and_draws_follow_the_key():
  image_BHWC = jnp.asarray(images(8))
  keys = jax.random.split(jax.random.key(2), 8)
  found = erase(image_BHWC, keys, 1.0)
  kept = found == image_BHWC
  assert 0.6 < kept.mean() < 0.98
  order = np.array([3, 1, 7, 0, 2, 4, 6, 5])
  np.testing.assert_array_equal(erase(image_BHWC[order], keys[order], 1.0), found[order])
  assert erase(image_BHWC, keys, 0.0) is image_BHWC


def test_an_image_that_no_rectangle_fits_is_left_alone():
  image_BHWC = jnp.ones((4, 1, 1, 3))
  keys = jax.random.split(jax.random.key(0), 4)
  np.testing.assert_array_equal(erase(image_BHWC, keys, 1.0), image_BHWC)


def test_eight_devices_mix_what_one_mixes_without_moving_images(run_with_devices):
  """Bit for bit, and no collective is compiled."""
  run_with_devices(
    """
    import re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from folk_jax.signal.mixing import Mixing, erase, mix, soft_targets
    from folk_jax.signal.shard import over_batch

    settings = Mixing(0.8, 1.0, 1.0, 0.5)
    image = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
    label = np.arange(16) % 5
    keys = jax.random.split(jax.random.key(1), 16)

    def local(image, label, keys, key):
      return mix(erase(image, keys, 0.5), soft_targets(label, 5, 0.1), key, settings)

    def both(image, label, keys, key):
      return over_batch(local, image, label, keys, replicated=(key,))

    for seed in range(4):
      key, found = jax.random.key(seed), []
      for devices in (1, 8):
        mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
          split = NamedSharding(mesh, P('data'))
          args = [jax.device_put(x, split) for x in (image, label, keys)]
          step = jax.jit(both).lower(*args, key).compile()
          assert not re.search(r'all-gather|all-to-all|collective-permute|all-reduce', step.as_text())
          found.append(jax.device_get(step(*args, key)))
      jax.tree.map(np.testing.assert_array_equal, *found)
      assert (found[0][0] != image).any()
    """
  )
