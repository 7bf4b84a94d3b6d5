"""Losses against DINO's and iBOT's numbers, slow float64 twins and hand-worked values."""

import functools
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from folk_jax.errors import UserError
from folk_jax.objectives import losses

GOLDEN = Path(__file__).parents[1] / 'golden' / 'dino_ibot_loss.npz'
# The references ran in float64. Logits / 0.04 reach 50, so float32 softmaxes are good to about
# 50 * 6e-8 = 3e-6; the gradients of small probabilities carry that as relative error.
LOSS = {'rtol': 1e-5, 'atol': 1e-6}
GRADIENT = {'rtol': 1e-4, 'atol': 1e-7}

# Compiled whole: operation by operation, most of this file's time would go into compiling.
distillation_loss = jax.jit(losses.distillation_loss)
updated_centre = jax.jit(losses.updated_centre)
distillation_statistics = jax.jit(losses.distillation_statistics)


@functools.partial(jax.jit, static_argnames='chunk')
def patch_distillation_loss(student, teacher, *args, chunk=3):
  """Of logits: with the unit matrix for prototypes, embeddings are the logits themselves."""
  eye = jnp.eye(student.shape[-1])
  return losses.patch_distillation_loss(student, teacher, eye, eye, *args, chunk=chunk)


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


def batch_first(array, views):
  """The references stack views on axis 0."""
  return np.swapaxes(array.reshape(views, -1, *array.shape[1:]), 0, 1)


def float32(array):
  return jnp.asarray(array, jnp.float32)


def logits(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(student, teacher, centre, student_temperature, teacher_temperature):
  """Of one pair of logit vectors, in float64."""
  target = softmax((np.float64(teacher) - centre) / teacher_temperature)
  return -np.sum(target * np.log(softmax(np.float64(student) / student_temperature)))


@pytest.mark.parametrize('views, step', [(2, 0), (2, 1), (4, 0), (4, 1)])
def test_dinos_loss_gradient_and_centre(golden, views, step):
  given = {
    k: golden[f'dino.v{views}.step{step}.{k}']
    for k in ('student', 'teacher', 'center_in', 'teacher_temp')
  }
  expected = {
    k: golden[f'dino.v{views}.step{step}.{k}'] for k in ('loss', 'grad_student', 'center_out')
  }
  student_temperature, momentum = golden[f'dino.v{views}.cfg'][:2]
  student, teacher = batch_first(given['student'], views), batch_first(given['teacher'], 2)
  centre = float32(given['center_in'][0])

  @jax.jit
  @jax.value_and_grad
  def loss(student):
    return distillation_loss(
      student, teacher, centre, student_temperature, given['teacher_temp']
    ).mean()

  value, gradient = loss(student)
  np.testing.assert_allclose(value, expected['loss'], **LOSS)
  np.testing.assert_allclose(gradient, batch_first(expected['grad_student'], views), **GRADIENT)
  moved = updated_centre(centre, teacher, momentum)
  np.testing.assert_allclose(moved, expected['center_out'][0], **LOSS)


@pytest.mark.parametrize('views, step', [(2, 0), (2, 1), (4, 0), (4, 1)])
def test_ibots_losses_gradients_and_centres(golden, views, step):
  name = f'ibot.v{views}.step{step}.'
  array = {key.removeprefix(name): value for key, value in golden.items() if key.startswith(name)}
  student_temperature, *momenta, class_weight, patch_weight = golden[f'ibot.v{views}.cfg']
  student_patch, teacher_patch = (
    batch_first(array[f'{who}_patch'], 2) for who in ('student', 'teacher')
  )
  student_class, teacher_class = (
    batch_first(array[f'{who}_cls'], 2) for who in ('student', 'teacher')
  )
  local = [batch_first(array['student_local'], 2)] if views == 4 else []
  centres = float32(array['center_in'][0]), float32(array['center2_in'][0, 0])
  temperatures = array['teacher_temps']
  mask = np.swapaxes(array['mask'].reshape(*array['mask'].shape[:2], -1), 0, 1)

  def parts(student_class, student_patch):
    seen = jnp.concatenate([student_class, *local], axis=1)
    by_class = distillation_loss(
      seen, teacher_class, centres[0], student_temperature, temperatures[0]
    )
    by_patch = patch_distillation_loss(
      student_patch, teacher_patch, centres[1], student_temperature, temperatures[1], mask
    )
    return class_weight * by_class.mean(), patch_weight * by_patch.mean()

  values = parts(student_class, student_patch)
  gradients = jax.grad(lambda *args: sum(parts(*args)), argnums=(0, 1))(
    student_class, student_patch
  )
  np.testing.assert_allclose(values, [array['cls'], array['patch']], **LOSS)
  np.testing.assert_allclose(gradients[0], batch_first(array['grad_student_cls'], 2), **GRADIENT)
  if step == 0:  # The file holds the patch gradient of the first step only.
    np.testing.assert_allclose(
      gradients[1], batch_first(array['grad_student_patch'], 2), **GRADIENT
    )
  for centre, momentum, teacher, out in zip(
    centres, momenta, (teacher_class, teacher_patch), ('center_out', 'center2_out'), strict=True
  ):
    np.testing.assert_allclose(
      updated_centre(centre, teacher, momentum), array[out].ravel(), **LOSS
    )


@pytest.mark.parametrize(
  'views, teachers, outputs', [(2, 2, 3), (3, 2, 17), (5, 2, 4), (2, 1, 8), (3, 3, 2)]
)
def test_distillation_equals_a_loop_over_pairs(views, teachers, outputs):
  student, teacher = logits(0, 3, views, outputs), logits(1, 3, teachers, outputs)
  centre = logits(2, outputs)
  result = distillation_loss(student, teacher, centre, 0.1, 0.05)
  for image in range(3):
    pairs = [
      cross_entropy(student[image, v], teacher[image, q], centre, 0.1, 0.05)
      for q in range(teachers)
      for v in range(views)
      if v != q
    ]
    np.testing.assert_allclose(result[image], np.mean(pairs), **LOSS)


def test_patch_distillation_equals_a_loop_over_tokens():
  student, teacher = logits(0, 3, 2, 5, 7), logits(1, 3, 2, 5, 7)
  centre, mask = logits(2, 7), np.random.default_rng(3).random((3, 2, 5)) < 0.5
  mask[0, 1] = False
  result = patch_distillation_loss(student, teacher, centre, 0.1, 0.05, mask)
  for image in range(3):
    views = [
      [
        cross_entropy(student[image, v, t], teacher[image, v, t], centre, 0.1, 0.05)
        for t in range(5)
        if mask[image, v, t]
      ]
      for v in range(2)
    ]
    np.testing.assert_allclose(
      result[image], np.mean([np.mean(v) if v else 0.0 for v in views]), **LOSS
    )


@pytest.mark.parametrize('chunk', [1, 2, 4, 5, 16])
def test_chunks_change_neither_loss_nor_gradient(chunk):
  """Also where the last is not full."""
  student, teacher = logits(0, 3, 2, 5, 7), logits(1, 3, 2, 5, 7)
  centre, mask = logits(2, 7), np.random.default_rng(3).random((3, 2, 5)) < 0.5

  def total(student, prototypes, chunk):
    loss_B = losses.patch_distillation_loss(
      student, teacher, prototypes, jnp.eye(7), centre, 0.1, 0.05, mask, chunk
    )
    return loss_B.sum()

  of_both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
  prototypes = logits(4, 7, 7)
  for found, wanted in zip(
    jax.tree.leaves(of_both(student, prototypes, chunk)),
    jax.tree.leaves(of_both(student, prototypes, 3)),
    strict=True,
  ):
    # Another order of summation: seven terms of up to 10, the inverse temperature, 6e-8 each.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=4e-6)


def test_logits_of_all_tokens_never_exist():
  """In neither pass: the largest array is a chunk's logits."""
  tokens, outputs = 40, 64
  student, prototypes = jnp.ones((2, 2, tokens, 4)), jnp.ones((4, outputs))

  def total(student, prototypes):
    return losses.patch_distillation_loss(
      student,
      student,
      prototypes,
      prototypes,
      jnp.zeros(outputs),
      0.1,
      0.05,
      jnp.ones((2, 2, tokens)),
      8,
    ).sum()

  text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(student, prototypes).as_text()
  sizes = [
    math.prod(map(int, found.split('x'))) for found in re.findall(r'tensor<([\dx]+)xf32>', text)
  ]
  assert max(sizes) == 2 * 2 * 8 * outputs  # And not 5 times that.


@pytest.mark.parametrize('outputs', [2, 64, 8192])
def test_uniform_student_and_teacher_rest_at_ln_k(outputs):
  zeros = jnp.zeros((2, 2, outputs))
  # Every term is equal; XLA's float32 logarithm on CPU is off by 6e-7 at some arguments.
  loss = distillation_loss(zeros, zeros, zeros[0, 0], 0.1, 0.04)
  np.testing.assert_allclose(loss, [math.log(outputs)] * 2, rtol=1e-6)


def test_one_pair_by_hand():
  # Centred and divided by 0.5: the teacher says softmax(ln 3, 0) = (3/4, 1/4) of view 2 and
  # (1/2, 1/2) of view 1; the student (1/2, 1/2) of view 1, softmax(ln 4, 0) = (4/5, 1/5) of view 2.
  centre = jnp.array([1.0, 2.0])
  teacher = jnp.array([[[1.0, 2.0], [1.0 + 0.5 * math.log(3), 2.0]]])
  student = jnp.array([[[7.0, 7.0], [0.2 * math.log(4), 0.0]]])
  expected = (math.log(2) + (math.log(5 / 4) + math.log(5)) / 2) / 2
  np.testing.assert_allclose(
    distillation_loss(student, teacher, centre, 0.2, 0.5), [expected], **LOSS
  )


def test_no_gradient_reaches_teacher_or_centre():
  student, teacher, centre = logits(0, 2, 2, 5), logits(1, 2, 2, 5), logits(2, 5)
  patches, mask = np.ones((1, 1, 4, 1), np.float32), np.ones((2, 2, 4))

  def total(student, teacher, centre):
    return (
      distillation_loss(student, teacher, centre, 0.1, 0.05).sum()
      + patch_distillation_loss(
        student[:, :, None] * patches, teacher[:, :, None] * patches, centre, 0.1, 0.05, mask
      ).sum()
      + updated_centre(centre, teacher, 0.9).sum()
      + sum(distillation_statistics(student, teacher, centre, 0.1, 0.05).values())
    )

  gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
  of_student, of_teacher, of_centre = gradient(student, teacher, centre)
  assert not of_teacher.any() and not of_centre.any()
  assert np.abs(of_student).min() > 0


def test_unmasked_tokens_have_no_say():
  student, teacher, centre = logits(0, 2, 2, 4, 5), logits(1, 2, 2, 4, 5), logits(2, 5)
  mask = np.array([[[1, 0, 1, 0], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]], bool)
  loss, pull = jax.vjp(
    lambda s: patch_distillation_loss(s, teacher, centre, 0.1, 0.05, mask),
    jnp.asarray(student),
  )
  (gradient,) = pull(jnp.ones(2))
  assert loss[0] > 0 and loss[1] == 0
  np.testing.assert_array_equal((np.asarray(gradient) != 0).any(axis=-1), mask)


def test_centring_takes_a_common_shift_away():
  student, teacher, shift = logits(0, 4, 2, 6), logits(1, 4, 2, 6), logits(2, 6)
  plain = distillation_loss(student, teacher, jnp.zeros(6), 0.1, 0.05)
  shifted = distillation_loss(student + 3.0, teacher + shift, shift, 0.1, 0.05)
  # Shifted logits, up to 4, round to 2e-7, which a temperature of 0.05 multiplies by 20.
  np.testing.assert_allclose(plain, shifted, rtol=1e-5)


def test_bfloat16_logits_are_taken_to_float32_first():
  student, teacher = (jnp.asarray(logits(i, 4, 2, 6), jnp.bfloat16) for i in (0, 1))
  mask = jnp.ones((4, 2, 1))
  for half, full in (
    (fn(student, teacher, jnp.zeros(6)), fn(float32(student), float32(teacher), jnp.zeros(6)))
    for fn in (
      lambda s, t, c: distillation_loss(s, t, c, 0.1, 0.05),
      lambda s, t, c: patch_distillation_loss(s[:, :, None], t[:, :, None], c, 0.1, 0.05, mask),
      lambda s, t, c: updated_centre(c, t, 0.9),
    )
  ):
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, full)


def test_microbatches_give_the_centre_of_the_batch():
  teacher, centre = logits(0, 6, 2, 5), logits(1, 5)
  parts = [updated_centre(centre, part, 0.9) for part in np.split(teacher, 3)]
  # Two orders of summation of twelve numbers about 1.
  np.testing.assert_allclose(
    np.mean(parts, axis=0), updated_centre(centre, teacher, 0.9), rtol=1e-6, atol=1e-7
  )


def test_centre_by_hand():
  moved = updated_centre(jnp.array([1.0, 0.0]), jnp.array([[[2.0, 4.0], [4.0, 8.0]]]), 0.75)
  np.testing.assert_allclose(moved, [1.5, 1.5])


@pytest.mark.parametrize(
  'views, teachers, words',
  [(1, 1, 'at least two student views'), (2, 3, 'the teacher has 3 views')],
)
def test_views_without_pairs_are_refused(views, teachers, words):
  for loss in (distillation_loss, distillation_statistics):
    with pytest.raises(ValueError, match=words):
      loss(jnp.zeros((2, views, 4)), jnp.zeros((2, teachers, 4)), jnp.zeros(4), 0.1, 0.05)


def test_shapes_that_would_broadcast_are_refused():
  with pytest.raises(AssertionError):
    distillation_loss(jnp.zeros((2, 2, 4)), jnp.zeros((1, 2, 4)), jnp.zeros(4), 0.1, 0.05)
  with pytest.raises(AssertionError):
    distillation_loss(jnp.zeros((2, 2, 4)), jnp.zeros((2, 2, 4)), jnp.zeros(1), 0.1, 0.05)
  with pytest.raises(AssertionError):
    losses.reduce_frequency(jnp.zeros(3), jnp.ones(1), 'pooled')


def test_frequency_reductions_by_hand():
  sums, counts = jnp.array([6.0, 10.0, 0.0]), jnp.array([2, 10, 0])
  np.testing.assert_allclose(losses.reduce_frequency(sums, counts, 'per_image'), (3 + 1 + 0) / 3)
  np.testing.assert_allclose(losses.reduce_frequency(sums, counts, 'pooled'), 16 / 12)
  assert losses.reduce_frequency(jnp.zeros(2), jnp.zeros(2, jnp.int32), 'pooled') == 0


def test_reductions_agree_where_every_image_masks_as_much():
  sums, counts = jnp.array([6.0, 10.0, 1.0]), jnp.full(3, 5)
  pooled, per_image = (
    losses.reduce_frequency(sums, counts, reduce) for reduce in losses.REDUCTIONS
  )
  np.testing.assert_allclose(pooled, per_image, rtol=1e-6)


def test_pooled_counts_may_pass_the_range_of_int32():
  counts = jnp.full(4, 2**30, jnp.int32)
  assert losses.reduce_frequency(counts.astype(jnp.float32), counts, 'pooled') == 1.0


def test_an_unknown_reduction_lists_the_known():
  with pytest.raises(UserError, match='per_image, pooled'):
    losses.reduce_frequency(jnp.zeros(1), jnp.ones(1), 'mean')


def statistics(student, teacher):
  values = distillation_statistics(
    jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), jnp.zeros(4), 0.1, 0.05
  )
  return {name: float(value) for name, value in values.items()}


def test_statistics_of_the_two_collapses_and_of_health():
  one, spread = np.zeros((4, 2, 4)), np.zeros((4, 2, 4))
  one[..., 2] = 50.0
  spread[range(4), :, range(4)] = 50.0
  uniform = statistics(np.zeros((4, 2, 4)), np.zeros((4, 2, 4)))
  assert uniform == pytest.approx(
    {'teacher_entropy': 1, 'teacher_entropy_of_mean': 1, 'student_entropy': 1, 'agreement': 1}
  )
  to_one = statistics(one, one)
  assert to_one == pytest.approx(
    {'teacher_entropy': 0, 'teacher_entropy_of_mean': 0, 'student_entropy': 0, 'agreement': 1},
    abs=1e-6,
  )
  healthy = statistics(spread, spread)
  assert healthy == pytest.approx(
    {'teacher_entropy': 0, 'teacher_entropy_of_mean': 1, 'student_entropy': 0, 'agreement': 1},
    abs=1e-6,
  )


def test_agreement_is_across_views_and_after_centring():
  # The student says 0 and 1 of its two views, the teacher 1 and 2: of the pairs (student 1, teacher
  # 2) and (student 2, teacher 1) the second agrees. Same-view pairs would give 0.
  # Entropy of the mean: two equal outputs of four, half of ln 4.
  student, teacher = np.zeros((1, 2, 4)), np.zeros((1, 2, 4))
  student[0, 0, 0] = student[0, 1, 1] = teacher[0, 0, 1] = teacher[0, 1, 2] = 50.0
  values = statistics(student, teacher)
  assert values['agreement'] == pytest.approx(0.5)
  assert values['teacher_entropy_of_mean'] == pytest.approx(0.5, abs=1e-6)
  centre = jnp.array([0.0, 90.0, 0.0, 0.0])  # Takes the teacher's view 1 away from output 1.
  moved = distillation_statistics(student, teacher + centre / 3, centre, 0.1, 0.05)
  assert moved['agreement'] == 0


def test_the_entropy_of_one_output_is_refused():
  with pytest.raises(ValueError, match='at least two outputs'):
    distillation_statistics(jnp.zeros((2, 2, 1)), jnp.zeros((2, 2, 1)), jnp.zeros(1), 0.1, 0.05)
