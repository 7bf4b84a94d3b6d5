"""Attacks on classifiers whose worst case is known, accuracy under them, corruption errors, class subsets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.evals import robustness
from folk_jax.evals.robustness import EPSILON, Attack, Corrupt, fgsm, pgd

SIDE, CLASSES = 8, 6
FEATURES = SIDE * SIDE * 3
WEIGHT = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)


def linear(image_BHWC):
  return image_BHWC.reshape(len(image_BHWC), -1) @ WEIGHT


def curved(image_BHWC):
  return jnp.tanh(linear(image_BHWC) / 4) @ WEIGHT[:CLASSES, :CLASSES]


def first_two(image_BHWC):
  """Two classes; the gradient's sign is the same everywhere: up in the second class's favour."""
  return linear(image_BHWC)[:, :2]


def images(batch=5, seed=1):
  random = np.random.default_rng(seed)
  image = random.random((batch, SIDE, SIDE, 3), dtype=np.float32)
  image[:, 0] = np.round(image[:, 0])  # Some values at the borders of the range.
  return image


def keys(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


@functools.cache
def compiled(attack, logits_fn):
  return jax.jit(functools.partial(attack, logits_fn))


LABELS = np.array([0, 1, 0, 1, 1])


def test_fgsm_worked_by_hand():
  image = images()
  attacked = compiled(fgsm(0.1), first_two)(image, LABELS, keys(5))
  # The loss of the true class rises along the other's weights less its own.
  towards = np.sign(WEIGHT[:, 1] - WEIGHT[:, 0]).reshape(SIDE, SIDE, 3)
  sign_B = np.where(LABELS == 0, 1, -1)[:, None, None, None]
  expected = np.clip(image + np.float32(0.1) * sign_B * towards, 0, 1)
  # Two ways to an ulp of 1. One of these classifiers is so sure that its softmax is 1 in float32.
  np.testing.assert_allclose(attacked, expected, atol=1.2e-7)
  assert jax.nn.softmax(first_two(image)).max() == 1


def test_pgd_reaches_a_linear_classifiers_corner():
  image = images()
  corner = compiled(fgsm(0.1), first_two)(image, LABELS, keys(5))
  # 2.5 epsilon of way is enough from anywhere in the cube.
  reached = compiled(pgd(0.1, steps=10), first_two)(image, LABELS, keys(5))
  np.testing.assert_allclose(reached, corner, atol=1e-7)
  # Two small steps from the image go two small steps.
  short = compiled(Attack(0.1, 2, 0.01, False), first_two)(image, LABELS, keys(5))
  inside = (image > 0.02) & (image < 0.98)
  np.testing.assert_allclose(np.abs(short - image)[inside], 0.02, atol=1e-6)


@pytest.mark.parametrize('attack', [fgsm(), pgd(steps=3), pgd(0.2, 4, 0.15)])
def test_within_the_cube_and_the_range(attack):
  image = images()
  attacked = np.asarray(compiled(attack, curved)(image, LABELS, keys(5)))
  assert attacked.dtype == np.float32 and attacked.min() >= 0 and attacked.max() <= 1
  # The cube's faces are float32 numbers: an ulp of 1 beyond.
  assert np.abs(np.float64(attacked) - image).max() <= attack.epsilon + 6e-8
  assert np.abs(attacked - image).max() > 0.9 * attack.epsilon


def test_more_steps_are_worse_for_the_classifier():
  image, label = images(64), np.arange(64) % CLASSES

  def loss(attack):
    attacked = compiled(attack, curved)(image, label, keys(64)) if attack else image
    log_probability = jax.nn.log_softmax(curved(attacked))
    return -float(np.mean(np.take_along_axis(log_probability, label[:, None], 1)))

  clean, one, many = loss(None), loss(fgsm(0.03)), loss(pgd(0.03, 20))
  assert clean < one < many


def test_random_starts_are_the_images_own():
  image, attack = images(), Attack(0.2, 1, 1e-6, True)
  run = compiled(attack, curved)
  start = np.asarray(run(image, LABELS, keys(5))) - image
  inside = (image > 0.2) & (image < 0.8)
  # Uniform in the cube: a mean of 0 and a deviation of 0.2 / sqrt(3), five standard errors of about
  # 570 draws; the fourth moment is 9 / 5 of the variance squared.
  draws = start[inside]
  assert abs(draws.mean()) < 5 * 0.2 / np.sqrt(3 * len(draws))
  assert abs(draws.var() - 0.04 / 3) < 5 * 0.04 / 3 * np.sqrt(0.8 / len(draws))
  order = np.array([3, 1, 4, 0, 2])
  moved = run(image[order], LABELS[order], keys(5)[order])
  np.testing.assert_array_equal(np.asarray(moved) - image[order], start[order])
  assert np.abs(np.asarray(run(image, LABELS, keys(5, 1))) - image - start).max() > 0.1


def test_defaults_and_bad_settings():
  assert fgsm() == Attack(EPSILON, 1, EPSILON, False)
  assert pgd() == Attack(1 / 255, 10, 2.5 / 255 / 10, True)
  for make in (lambda: fgsm(0.0), lambda: fgsm(8), lambda: pgd(0.1, 3, -1.0)):
    with pytest.raises(UserError, match=r'images lie in \[0, 1\], choose it above 0'):
      make()
  with pytest.raises(UserError, match='0 steps'):
    pgd(steps=0)


def batches(image, label, size, valid=None, index=None):
  """uint8 batches, the last padded with rows of no class."""
  valid = np.ones(len(label), bool) if valid is None else valid
  index = np.arange(len(label)) if index is None else index
  for first in range(0, len(label), size):
    rows = slice(first, first + size)
    missing = size - len(label[rows])
    yield {
      'views': np.pad(image[rows, None], [(0, missing)] + [(0, 0)] * 4, constant_values=77),
      'label': np.pad(label[rows], (0, missing), constant_values=-1).astype(np.int32),
      'index': np.pad(index[rows], (0, missing)),
      'valid': np.pad(valid[rows], (0, missing)),
    }


def apply(params, image_BHWC):
  return image_BHWC.reshape(len(image_BHWC), -1) @ params


def counted(seed=3, count=21):
  image = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
  logits = image.reshape(count, -1).astype(np.float64) / 255 @ WEIGHT
  return image, logits


RNG = jax.random.key(9)


def test_accuracy_counts_valid_rows_alone():
  image, logits = counted()
  label = logits.argmax(1)
  label[::3] = logits.argmin(1)[
    ::3
  ]  # Wrong, and of six classes the only rank outside the first five.
  found = robustness.accuracy_under(None, apply, WEIGHT, batches(image, label, 8), rng=RNG)
  assert (found.count, found.top1, found.top5) == (
    21,
    pytest.approx(14 / 21),
    pytest.approx(14 / 21),
  )
  valid = np.arange(21) % 3 > 0
  label[~valid] = [-1, 99, 0, 5, -7, 3, 2]
  found = robustness.accuracy_under(None, apply, WEIGHT, batches(image, label, 8, valid), rng=RNG)
  assert (found.count, found.top1, found.top5) == (14, 1, 1)
  assert found.calibration.accuracy == 1
  with pytest.raises(UserError, match='3 labels lie outside the classes'):
    robustness.accuracy_under(None, apply, WEIGHT, batches(image, label, 8), rng=RNG)
  with pytest.raises(UserError, match='data set is empty'):
    robustness.accuracy_under(None, apply, WEIGHT, [], rng=RNG)


def test_progress_counts_valid_rows_batch_by_batch():
  image, logits = counted()
  valid, rows = np.arange(21) % 3 > 0, []
  robustness.accuracy_under(
    None,
    apply,
    WEIGHT,
    batches(image, logits.argmax(1), 8, valid),
    rng=RNG,
    progress=rows.append,
  )
  # Of rows 0 to 20 every third is left out, from the first on; three batches of eight.
  assert rows == [5, 5, 4]


def test_an_attack_flips_exactly_those_within_reach():
  image, _ = counted()
  weight = WEIGHT[:, :2]
  margin = image.reshape(21, -1).astype(np.float64) / 255 @ (weight[:, 0] - weight[:, 1])
  label = np.where(margin > 0, 0, 1)
  # So that about half are.
  epsilon = float(np.median(np.abs(margin)) / np.abs(weight[:, 0] - weight[:, 1]).sum())
  # By hand: each value moves by epsilon against the margin, as far as the range goes.
  x = image.reshape(21, -1) / 255
  slope = np.sign(margin)[:, None] * np.sign(weight[:, 0] - weight[:, 1])
  reach = np.abs(np.clip(x - epsilon * slope, 0, 1) - x) @ np.abs(weight[:, 0] - weight[:, 1])
  expected = np.mean(np.abs(margin) > reach)
  assert 0.3 < expected < 0.8
  for attack in (fgsm(epsilon), pgd(epsilon)):
    found = robustness.accuracy_under(attack, apply, weight, batches(image, label, 8), rng=RNG)
    assert found.top1 == pytest.approx(expected)


def test_a_corruption_depends_on_the_sample_and_not_on_its_batch():
  image, logits = counted()
  label, index = logits.argmax(1), np.arange(100, 121)
  corrupt = Corrupt('gaussian_noise', 5)
  found = [
    robustness.accuracy_under(
      corrupt, apply, WEIGHT, batches(image[order], label[order], size, index=index[order]), rng=RNG
    )
    for order, size in ((np.arange(21), 8), (np.random.default_rng(0).permutation(21), 8))
  ]
  assert found[0].calibration.counts == found[1].calibration.counts
  assert 0.3 < found[0].top1 == found[1].top1 < 1
  with pytest.raises(UserError, match='unknown corruption'):
    robustness.accuracy_under(Corrupt('rain', 1), apply, WEIGHT, batches(image, label, 8), rng=RNG)


def test_a_subset_leaves_the_other_classes_out():
  image, logits = counted()
  subset = robustness.class_subset(['a', 'b', 'c', 'd', 'e', 'f'], ['e', 'b', 'c'], 'imagenet-x')
  np.testing.assert_array_equal(subset, [4, 1, 2])
  np.testing.assert_array_equal(
    robustness.subset_logits(logits, subset), np.float32(logits[:, [4, 1, 2]])
  )
  label = logits[:, [4, 1, 2]].argmax(1)
  found = robustness.accuracy_under(
    None, apply, WEIGHT, batches(image, label, 8), rng=RNG, subset_S=subset
  )
  assert found.top1 == 1 and np.mean(label == logits.argmax(1)) < 0.9
  # An attack, too, sees those classes alone.
  small = robustness.accuracy_under(
    fgsm(0.05), apply, WEIGHT[:, [4, 1, 2]], batches(image, label, 8), rng=RNG
  )
  attacked = robustness.accuracy_under(
    fgsm(0.05), apply, WEIGHT, batches(image, label, 8), rng=RNG, subset_S=subset
  )
  assert attacked.top1 == small.top1 < 1


def test_folders_that_do_not_fit_are_refused_in_words():
  model = ['n01', 'n02', 'n03']
  with pytest.raises(
    UserError, match='sketch has 1 of 2 classes .* 3 of the model: n99; .*n01, n02'
  ):
    robustness.class_subset(model, ['n02', 'n99'], 'sketch')
  with pytest.raises(UserError, match='classes of sketch are listed twice: n02'):
    robustness.class_subset(model, ['n02', 'n02'], 'sketch')
  with pytest.raises(UserError, match='0 of 0 classes'):
    robustness.class_subset(model, [], 'sketch')
  with pytest.raises(UserError, match='a0, a1, a2, a3, a4 and 2 more'):
    robustness.class_subset(model, [f'a{k}' for k in range(7)], 'sketch')


def test_corruption_error_worked_by_hand():
  errors = {'fog': [0.1, 0.2, 0.3, 0.4, 0.5], 'snow': [0.2, 0.2, 0.2, 0.2, 0.2]}
  plain = robustness.corruption_error(errors)
  assert plain.errors == pytest.approx({'fog': 0.3, 'snow': 0.2})
  assert plain.mean == pytest.approx(0.25) and plain.normalised is plain.mce is None
  against = robustness.corruption_error(errors, {'fog': 0.6, 'snow': 0.8, 'frost': 0.1})
  assert against.normalised == pytest.approx({'fog': 0.5, 'snow': 0.25})
  # The mean of ratios, 0.375, and not the ratio of means, 0.357.
  assert against.mce == pytest.approx(0.375) and against.mean == plain.mean
  alexnet = robustness.ALEXNET_ERRORS
  itself = robustness.corruption_error({name: [e] * 5 for name, e in alexnet.items()}, alexnet)
  assert len(alexnet) == 15 and itself.mce == pytest.approx(1)


def test_bad_errors_are_refused_in_words():
  for errors, words in (
    ({}, 'as many for each'),
    ({'fog': [0.1], 'snow': [0.1, 0.2]}, r'\[1, 2\] severities'),
    ({'fog': [12.0]}, 'not percent'),
    ({'fog': [float('nan')]}, 'not percent'),
  ):
    with pytest.raises(UserError, match=words):
      robustness.corruption_error(errors)
  with pytest.raises(UserError, match='no error above 0 for snow'):
    robustness.corruption_error({'fog': [0.1], 'snow': [0.1]}, {'fog': 0.2, 'snow': 0.0})


_EIGHT_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from folk_jax.evals.robustness import Corrupt, pgd

random = np.random.default_rng(0)
weight = random.normal(size=(192, 7)).astype(np.float32)
image, label = random.random((16, 8, 8, 3), dtype=np.float32), np.arange(16) % 7
keys = jax.random.split(jax.random.key(0), 16)

def logits(image_BHWC):
  return jnp.tanh(image_BHWC.reshape(-1, 192) @ weight)

assert jax.device_count() == 8
for perturb in (pgd(0.1, 4), Corrupt('motion_blur', 3)):
  run = jax.jit(functools.partial(perturb, logits))
  alone = run(image, label, keys)
  mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    batch = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    arrays = jax.device_put((image, label, keys), batch)
    program = run.lower(*arrays).compile()
    shared = program(*arrays)
    assert shared.sharding.is_equivalent_to(batch, 4)
  for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert collective not in program.as_text(), collective
  # The same operations on fewer images; products may be summed in another order.
  np.testing.assert_allclose(shared, alone, atol=1e-6)
"""


def test_eight_devices_equal_one_and_tell_each_other_nothing(run_with_devices):
  run_with_devices(_EIGHT_DEVICES)
