"""MFM and the restoration tasks: what the student sees, and the loss by NumPy.

Shape letters: B images, H, W pixels, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.objectives import make_objective
from folk_jax.signal.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation

SIZE, PATCH = 16, 8
RNG, STEP = jax.random.key(7), jnp.int32(3)
MFM = {
  'filter': 'radial',
  'portions': (),
  'com_probability': 0.5,
  'ranking': 'shared',
  'radius': 56.0,  # Of 224 pixels: 4 of 16.
  'clamp': True,
  'gamma': 1.0,
  'reduce': 'pooled',
}
RESTORATION = {
  'super_resolution': {'gamma': 1.0, 'factor': 4},
  'deblur': {'gamma': 1.0, 'sigma': 1.0, 'kernel_sizes': (3, 5)},
  'denoise': {'gamma': 1.0, 'sigma': 0.3},
}


@pytest.fixture(scope='module')
def parts(make_folk):
  """One view, no augmentation, no teacher."""
  return dataclasses.replace(
    make_folk().parts, augmentations=(Augmentation(),), projection=None, has_teacher=False
  )


def make_batch(size=6):
  rng = np.random.default_rng(0)
  return {
    'views': rng.integers(0, 256, (size, 1, SIZE, SIZE, 3), dtype=np.uint8),
    'label': np.zeros(size, np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }


BATCH = make_batch()
IMAGES_BHWC = BATCH['views'][:, 0] / 255


def normalised(image):
  return (image - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)


class Recorder:
  """Stands in for the backbone: notes the images; answers ones in the right shape."""

  def __init__(self):
    self.images = []

  def apply(self, variables, image_NHWC, sample_keys, patches=True):
    assert patches  # The reconstruction is made of them.
    self.images.append(image_NHWC)
    n, grid = len(image_NHWC), SIZE // PATCH
    return models.BackboneOutput(jnp.ones((n, 24)), jnp.ones((n, grid, grid, 24)), {})


def constant_head(objective, seed=1):
  """Parameters whose prediction is one patch everywhere, and the image that this makes."""
  params, extra = objective.init(jax.random.key(0), None)
  bias = np.random.default_rng(seed).normal(size=3 * PATCH**2).astype(np.float32)
  kernel = np.zeros_like(params['reconstruction']['proj']['kernel'])
  params |= {'reconstruction': {'proj': {'kernel': kernel, 'bias': bias}}}
  patch_HWC = bias.reshape(3, PATCH, PATCH).transpose(1, 2, 0)
  return params, extra, np.tile(patch_HWC, (SIZE // PATCH, SIZE // PATCH, 1))


def seen_by_student(objective, batch=BATCH):
  """What the student is shown, in [0, 1] again."""
  recorder = Recorder()
  params, extra = objective.init(jax.random.key(0), None)
  parts = dataclasses.replace(objective.parts, backbone=recorder)

  @jax.jit
  def shown(batch):
    dataclasses.replace(objective, parts=parts).loss(params, None, extra, batch, RNG, STEP)
    return recorder.images

  (image_BHWC,) = shown(batch)
  return image_BHWC * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)


def distances(guess_HWC, target_BHWC):
  """MFM's distance at every coefficient of the full spectrum, summed over channels, [B, H, W]."""
  spectrum = np.fft.fft2(guess_HWC - target_BHWC, axes=(1, 2), norm='ortho')
  return np.sqrt(np.abs(spectrum) ** 2 + 1e-12).sum(-1)


def disk(radius=4):
  """True inside MFM's disk, DC at [0, 0]."""
  offset = np.fft.ifftshift(np.arange(SIZE) - SIZE // 2)
  return offset[:, None] ** 2 + offset**2 < radius**2


def filtered(image_HWC, kept_HW):
  spectrum = np.fft.fft2(image_HWC, axes=(0, 1)) * kept_HW[..., None]
  return np.clip(np.fft.ifft2(spectrum, axes=(0, 1)).real, 0, 1)


def test_mfm_shows_low_or_high_pass_and_judges_what_it_removed(parts):
  objective = make_objective('mfm', parts, MFM)
  shown_BHWC = seen_by_student(objective)
  removed = []
  for image, shown in zip(IMAGES_BHWC, shown_BHWC, strict=True):
    gaps = {low: np.abs(filtered(image, disk() == low) - shown).max() for low in (True, False)}
    low = min(gaps, key=gaps.get)
    assert gaps[low] < 1e-5 < 0.05 < gaps[not low]
    removed.append(disk() != low)
  assert {mask[0, 0] for mask in removed} == {True, False}

  params, extra, guess_HWC = constant_head(objective)
  output = jax.jit(objective.loss)(params, None, extra, BATCH, RNG, STEP)
  distance_BHW = distances(guess_HWC, normalised(IMAGES_BHWC))
  masked_BHW = np.stack(removed)
  # Pooled: one mean over all masked coefficients of the batch and three channels.
  expected = distance_BHW[masked_BHW].sum() / (3 * masked_BHW.sum())
  # Sums of some 10^4 float32 terms of like size.
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  assert output.metrics['loss_reconstruction'] == output.loss

  per_image = make_objective('mfm', parts, MFM | {'reduce': 'per_image'})
  output = jax.jit(per_image.loss)(params, None, extra, BATCH, RNG, STEP)
  means_B = [(d[m] / 3).mean() for d, m in zip(distance_BHW, removed, strict=True)]
  np.testing.assert_allclose(output.loss, np.mean(means_B), rtol=1e-5)


def test_mfm_with_com_rcom_sees_what_folk_does(parts, make_folk):
  """FOLK's ablation: the same filter, the same draws, and no teacher."""
  fields = MFM | {'filter': 'com_rcom', 'portions': (0.05,), 'clamp': False, 'reduce': 'per_image'}
  mfm = make_objective('mfm', parts, fields)
  folk = dataclasses.replace(make_folk(distillation_weight=0.0, has_teacher=False), parts=parts)
  np.testing.assert_array_equal(seen_by_student(mfm), seen_by_student(folk))
  params, extra, _ = constant_head(mfm)
  ours = jax.jit(mfm.loss)(params, None, extra, BATCH, RNG, STEP)
  folks = jax.jit(folk.loss)(params, None, extra, BATCH, RNG, STEP)
  np.testing.assert_allclose(ours.loss, folks.loss, rtol=1e-6)


@pytest.mark.parametrize('name', RESTORATION)
def test_restoration_is_judged_over_the_whole_spectrum(parts, name):
  objective = make_objective(name, parts, RESTORATION[name])
  params, extra, guess_HWC = constant_head(objective)
  output = jax.jit(objective.loss)(params, None, extra, BATCH, RNG, STEP)
  expected = distances(guess_HWC, normalised(IMAGES_BHWC)).mean() / 3
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)


def test_restoration_degrades_what_the_student_sees(parts):
  """Each by its own mark: 4 x 4 means survive, variance falls, variance grows by sigma squared."""
  shown = {
    name: np.asarray(seen_by_student(make_objective(name, parts, fields)))
    for name, fields in RESTORATION.items()
  }
  small = shown['super_resolution'][:, 2::4, 2::4]
  assert np.abs(shown['super_resolution'] - IMAGES_BHWC).max() > 0.1
  assert 0 <= small.min() and small.max() <= 1
  assert shown['deblur'].var() < 0.5 * IMAGES_BHWC.var()
  noise = shown['denoise'] - IMAGES_BHWC
  # 4,608 draws: the standard error of a deviation of 0.3 is 0.003.
  assert abs(noise.std() - 0.3) < 0.015 and abs(noise.mean()) < 0.02


@pytest.mark.parametrize('name', ['mfm', 'deblur', 'denoise'])
def test_draws_belong_to_the_sample_and_not_to_its_place(parts, name):
  objective = make_objective(name, parts, RESTORATION.get(name, MFM))
  order = np.array([3, 1, 0, 5, 4, 2])
  shuffled = {key: value[order] for key, value in BATCH.items()}
  # Within rounding: FFTs and products of another batch layout.
  np.testing.assert_allclose(
    seen_by_student(objective, shuffled), seen_by_student(objective)[order], atol=1e-6
  )


@pytest.mark.parametrize(
  'name, fields, words',
  [
    ('mfm', {'filter': 'disc'}, "unknown config.objective.filter 'disc'"),
    ('mfm', {'reduce': 'mean'}, "unknown config.objective.reduce 'mean'"),
    ('mfm', {'gamma': -1.0}, 'config.objective.gamma -1.0 must be positive'),
    ('super_resolution', {'factor': 1}, 'config.objective.factor 1 must be at least 2'),
    ('super_resolution', {'factor': 17}, 'at most the image size, 16'),
    ('deblur', {'kernel_sizes': (4,)}, 'the sizes of the blur are (4,): give odd numbers'),
    ('denoise', {'sigma': 0.0}, 'config.objective.sigma 0.0 must be positive'),
    ('denoise', {'factor': 8}, 'config.objective.factor is unknown'),
  ],
)
def test_bad_fields_are_refused_in_words(parts, name, fields, words):
  with pytest.raises(UserError) as refused:
    make_objective(name, parts, RESTORATION.get(name, MFM) | fields)
  assert words in str(refused.value) and '\n' not in str(refused.value)


def test_held_out_reconstruction_beside_the_mean(parts):
  objective = make_objective('denoise', parts, RESTORATION['denoise'])
  params, extra, guess_HWC = constant_head(objective)
  batch = BATCH | {'valid': np.array([True, False, True, True, True, True])}
  sums = jax.jit(objective.evaluate)(params, None, extra, batch, RNG)
  target_BHWC = normalised(IMAGES_BHWC)[batch['valid']]
  expected = {
    'count': 5.0,
    'reconstruction': distances(guess_HWC, target_BHWC).mean((1, 2)).sum() / 3,
    'reconstruction_of_mean': distances(0 * guess_HWC, target_BHWC).mean((1, 2)).sum() / 3,
  }
  assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected, rel=1e-5)
