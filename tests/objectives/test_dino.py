"""DINO and iBOT: which view answers for which, masks, local crops, and the losses by NumPy.

Shape letters: B images, V views, L local views, N = B*V views in a row, h, w patches a side, T patches, K prototypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.objectives import LocalViews, make_objective
from folk_jax.signal.augment import Augmentation

SIZE, K, LOCAL = 16, 24, 8
RNG, STEP = jax.random.key(7), jnp.int32(10)  # The ramp of two epochs of five steps is over.
DINO = {
  'student_temperature': 0.1,
  'teacher_temperature': 0.07,
  'teacher_temperature_start': 0.04,
  'teacher_temperature_epochs': 2.0,
  'centre_momentum': 0.9,
}
IBOT = DINO | {
  'mask_probability': 1.0,
  'mask_ratio': 0.5,
  'mask_ratio_spread': 0.2,
  'patch_weight': 1.0,
}


def make_batch(size=4):
  rng = np.random.default_rng(0)
  return {
    'views': rng.integers(0, 256, (size, 2, SIZE, SIZE, 3), dtype=np.uint8),
    'local_views': rng.integers(0, 256, (size, 3, LOCAL, LOCAL, 3), dtype=np.uint8),
    'label': np.zeros(size, np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }


BATCH = make_batch()


@pytest.fixture(scope='module')
def parts(make_folk):
  """Two views of 16 pixels without augmentation, patch 4, no drop path."""
  backbone = models.make_backbone('vit', SIZE, width=24, depth=2, heads=2, patch=4)
  return dataclasses.replace(make_folk().parts, backbone=backbone, patch=4)


@pytest.fixture(scope='module')
def local_parts(parts):
  return dataclasses.replace(parts, local_views=LocalViews(3, LOCAL, Augmentation()))


def perturbed(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape)), tree)


def make_state(objective):
  params, extra = jax.jit(lambda key: objective.init(key, None))(jax.random.key(0))
  teacher = {name: perturbed(params[name], 1) for name in objective.teacher_parts}
  return perturbed(params, 2), teacher, perturbed(extra, 3)


class Recorder:
  """Passes everything to a backbone and notes who was shown what."""

  def __init__(self, backbone):
    self.backbone, self.calls = backbone, []

  def apply(self, variables, image_NHWC, **options):
    output = self.backbone.apply(variables, image_NHWC, **options)
    self.calls.append((image_NHWC, options, output))
    return output


def watched(objective, state, batch=BATCH):
  """The loss, and the calls of the backbone with their arrays."""
  recorder = Recorder(objective.parts.backbone)
  parts = dataclasses.replace(objective.parts, backbone=recorder)
  params, teacher, extra = state

  @jax.jit
  def run(batch):
    output = dataclasses.replace(objective, parts=parts).loss(
      params, teacher, extra, batch, RNG, STEP
    )
    arrays = [
      (image, {k: v for k, v in options.items() if k != 'sample_keys'}, found)
      for image, options, found in recorder.calls
    ]
    return output, arrays

  return run(batch)


def log_softmax(x):
  x = np.float64(x) - np.max(x, -1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(student, teacher, centre):
  """Over the last axis, at DINO's temperatures."""
  target = np.exp(log_softmax((np.float64(teacher) - centre) / 0.07))
  return -(target * log_softmax(np.float64(student) / 0.1)).sum(-1)


def logits(objective, params, feature):
  head = models.ProjectionHead(**objective.parts.projection)
  return np.asarray(head.apply({'params': params['projection']}, feature))


@pytest.mark.parametrize('crops', [0, 3])
def test_dino_is_across_views_and_local_views_answer_for_both(parts, local_parts, crops):
  objective = make_objective('dino', local_parts if crops else parts, DINO)
  state = params, teacher, extra = make_state(objective)
  output, calls = watched(objective, state)
  student, seen = calls[0][2], calls[1][2]
  # Student and teacher see the same two views, augmented once.
  np.testing.assert_array_equal(calls[0][0], calls[1][0])
  answers = logits(objective, params, student.pooled).reshape(4, 2, K)
  if crops:
    assert calls[2][0].shape == (12, LOCAL, LOCAL, 3) and len(calls) == 3
    local = logits(objective, params, calls[2][2].pooled).reshape(4, 3, K)
    answers = np.concatenate([answers, local], axis=1)
  targets = logits(objective, teacher, seen.pooled).reshape(4, 2, K)
  pairs = [(v, q) for v in range(2 + crops) for q in range(2) if v != q]
  expected = np.mean(
    [cross_entropy(answers[:, v], targets[:, q], extra['centre']) for v, q in pairs]
  )
  # Logits agree to 1e-6 and are divided by a temperature of 0.07.
  np.testing.assert_allclose(output.loss, expected, rtol=1e-4)
  centre_K = 0.9 * extra['centre'] + 0.1 * targets.mean((0, 1))
  np.testing.assert_allclose(output.extra['centre'], centre_K, atol=1e-6)


def test_ibot_adds_the_masked_patches_of_the_same_view(parts):
  objective = make_objective('ibot', parts, IBOT | {'patch_weight': 0.5})
  state = params, teacher, extra = make_state(objective)
  output, calls = watched(objective, state)
  (image, options, student), (clean, no_options, seen) = calls
  mask_Nhw = np.asarray(options['mask_Nhw'])
  np.testing.assert_array_equal(image, clean)
  assert not no_options and mask_Nhw.shape == (8, 4, 4)
  # A share in 0.3 to 0.7 of 16 patches, another for each view.
  counts_N = mask_Nhw.sum((1, 2))
  assert counts_N.min() >= 4 and counts_N.max() <= 11 and len(set(counts_N)) > 1

  class_loss = np.mean(
    [
      cross_entropy(
        logits(objective, params, student.pooled).reshape(4, 2, K)[:, v],
        logits(objective, teacher, seen.pooled).reshape(4, 2, K)[:, 1 - v],
        extra['centre'],
      )
      for v in (0, 1)
    ]
  )
  patch_Nhw = cross_entropy(
    logits(objective, params, student.patches),
    logits(objective, teacher, seen.patches),
    extra['patch_centre'],
  )
  patch_loss = np.mean([row[mask].mean() for row, mask in zip(patch_Nhw, mask_Nhw, strict=True)])
  np.testing.assert_allclose(output.metrics['loss_distillation'], class_loss, rtol=1e-4)
  np.testing.assert_allclose(output.metrics['loss_patch'], patch_loss, rtol=1e-4)
  np.testing.assert_allclose(output.loss, class_loss + 0.5 * patch_loss, rtol=1e-4)


def test_views_that_are_not_masked_have_no_patch_loss(parts):
  """With so small a probability no view of this batch is masked: iBOT is DINO."""
  ibot = make_objective('ibot', parts, IBOT | {'mask_probability': 1e-9})
  dino = make_objective('dino', parts, DINO)
  params, teacher, extra = make_state(ibot)
  found, _ = watched(ibot, (params, teacher, extra))
  wanted, _ = watched(dino, (params, teacher, {'centre': extra['centre']}))
  assert found.metrics['loss_patch'] == 0.0
  np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)


def test_draws_belong_to_the_sample_and_not_to_its_place(parts):
  objective = make_objective('ibot', parts, IBOT)
  state = make_state(objective)
  order = np.array([2, 0, 3, 1])
  shuffled = {name: value[order] for name, value in BATCH.items()}
  plain, calls = watched(objective, state)
  output, shuffled_calls = watched(objective, state, shuffled)
  masks, moved = (
    np.asarray(found[0][1]['mask_Nhw']).reshape(4, 2, 4, 4) for found in (calls, shuffled_calls)
  )
  np.testing.assert_array_equal(moved, masks[order])
  np.testing.assert_allclose(output.loss, plain.loss, rtol=1e-5)


@pytest.mark.parametrize(
  'name, fields, changes, words',
  [
    ('dino', {'student_temperature': 0.0}, {}, 'student_temperature 0.0 must be positive'),
    ('dino', {}, {'has_teacher': False}, 'config.teacher.enabled is False'),
    ('dino', {}, {'projection': None}, 'distillation needs config.projection'),
    ('dino', {}, {'augmentations': (Augmentation(),)}, 'needs two views'),
    ('ibot', {'mask_ratio_spread': 0.6}, {}, 'must lie between 0 and 1'),
    ('ibot', {'mask_probability': 0.0}, {}, 'must be above 0 and at most 1'),
    ('ibot', {'patch_weight': 0.0}, {}, 'without it, iBOT is dino'),
    ('ibot', {'mask': 0.3}, {}, "config.objective.mask is unknown: objective 'ibot'"),
  ],
)
def test_bad_fields_are_refused_in_words(parts, name, fields, changes, words):
  base = IBOT if name == 'ibot' else DINO
  with pytest.raises(UserError) as refused:
    make_objective(name, dataclasses.replace(parts, **changes), base | fields)
  assert words in str(refused.value) and '\n' not in str(refused.value)
