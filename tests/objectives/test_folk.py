"""FOLK's objective: who sees what, the numbers of its losses by NumPy, and where gradients go.

Shape letters: B images, V views, N = B*V, H, W pixels, C channels, K prototypes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.signal.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation

# As make_folk builds it.
SIZE, PATCH, K = 16, 8, 24
AUGMENTED = Augmentation(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, solarise_probability=0.2)


def make_batch(size: int = 4, seed: int = 0):
  rng = np.random.default_rng(seed)
  return {
    'views': rng.integers(0, 256, (size, 2, SIZE, SIZE, 3), dtype=np.uint8),
    'label': np.zeros(size, np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }


def perturbed(tree, seed: int, scale: float = 0.05):
  """Away from zero biases and unit gains, so that every parameter has something to do."""
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return treedef.unflatten([np.float32(x + scale * rng.normal(size=x.shape)) for x in leaves])


def make_state(objective):
  """A student, a teacher that differs from it, and centres that aren't zero."""
  params, extra = jax.jit(lambda key: objective.init(key, None))(jax.random.key(0))
  teacher = {name: perturbed(params[name], 1) for name in objective.teacher_parts}
  return perturbed(params, 2), teacher, perturbed(extra, 3)


BATCH = make_batch()
RNG, STEP = jax.random.key(7), jnp.int32(3)


def compiled(objective):
  """(params, teacher, extra, batch, rng, step) -> LossOutput."""
  return jax.jit(objective.loss)


def compiled_gradient(objective, of_teacher: bool = True):
  """As `compiled`, with the gradients of the student and of the teacher in front."""

  def loss(params, teacher, extra, batch, rng, step):
    output = objective.loss(params, teacher, extra, batch, rng, step)
    return output.loss, output

  return jax.jit(jax.grad(loss, argnums=(0, 1) if of_teacher else (0,), has_aux=True))


@pytest.fixture(scope='module')
def full(make_folk):
  """Everything switched on, real augmentations: objective, its state, its compiled gradient."""
  objective = make_folk(
    (AUGMENTED, AUGMENTED),
    portions=(0.02, 0.1),
    reconstruction_weight=2.0,
    distillation_weight=0.5,
    patch_weight=0.25,
  )
  return objective, make_state(objective), compiled_gradient(objective)


@pytest.fixture(scope='module')
def plain(make_folk):
  """The paper's two losses on views as they come."""
  objective = make_folk()
  return objective, make_state(objective), compiled(objective)


# NumPy's side of the story.


def spectrum_mask(image_HWC, portion: float):
  """True where the full spectrum's magnitude, summed over channels, is among the largest."""
  magnitude_HW = np.abs(np.fft.fft2(image_HWC, axes=(0, 1))).sum(-1)
  # Conjugate coefficients tie on paper and not in floating point.
  mirrored_HW = np.roll(magnitude_HW[::-1, ::-1], 1, axis=(0, 1))
  magnitude_HW = (magnitude_HW + mirrored_HW) / 2
  k = round(np.ceil(portion * magnitude_HW.size))
  return magnitude_HW >= np.sort(magnitude_HW, axis=None)[-k] * (1 - 1e-12)


def numpy_distance(prediction_HWC, target_HWC, masked_HW):
  """MFM's distance averaged over the masked coefficients and channels, in float64."""
  difference = np.fft.fft2(np.float64(prediction_HWC) - target_HWC, axes=(0, 1), norm='ortho')
  return np.sqrt(np.abs(difference[masked_HW]) ** 2 + 1e-12).mean()


def numpy_normalise(image):
  return (image - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)


def bias_only(params, seed: int):
  """A reconstruction head that answers the same patch everywhere, and the image that this makes."""
  bias = np.random.default_rng(seed).normal(size=3 * PATCH**2).astype(np.float32)
  head = {
    'proj': {'kernel': np.zeros_like(params['reconstruction']['proj']['kernel']), 'bias': bias}
  }
  patch_HWC = bias.reshape(3, PATCH, PATCH).transpose(1, 2, 0)
  return params | {'reconstruction': head}, np.tile(patch_HWC, (SIZE // PATCH, SIZE // PATCH, 1))


def numpy_cross_entropy(
  student_BVK, teacher_BVK, centre_K, student_temperature, teacher_temperature
):
  def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

  target = np.exp(log_softmax((np.float64(teacher_BVK) - centre_K) / teacher_temperature))
  guess = log_softmax(np.float64(student_BVK) / student_temperature)
  # u~ answers for v, v~ for u.
  return -np.mean([(target[:, 1] * guess[:, 0]).sum(-1), (target[:, 0] * guess[:, 1]).sum(-1)])


@pytest.mark.parametrize('com, reduce', [(1.0, 'per_image'), (0.0, 'pooled')])
def test_reconstruction_is_the_distance_on_what_the_filter_removed(make_folk, com, reduce):
  """Com removes what isn't prominent, RCom what is; the target is the normalised clean view."""
  objective = make_folk(
    com_probability=com, reduce=reduce, distillation_weight=0.0, reconstruction_weight=3.0
  )
  params, _, extra = make_state(objective)
  params, guess_HWC = bias_only(params, 0)
  output = compiled(objective)(params, None, extra, BATCH, RNG, STEP)
  image_NHWC = BATCH['views'].reshape(-1, SIZE, SIZE, 3) / 255
  prominent = [spectrum_mask(image, 0.05) for image in image_NHWC]
  masked = [~mask if com else mask for mask in prominent]
  distances = [
    numpy_distance(guess_HWC, numpy_normalise(image), mask)
    for image, mask in zip(image_NHWC, masked, strict=True)
  ]
  weights = [mask.sum() for mask in masked] if reduce == 'pooled' else None
  expected = np.average(distances, weights=weights)
  # Sums of some 10^3 float32 terms of like size.
  np.testing.assert_allclose(output.metrics['loss_reconstruction'], expected, rtol=1e-5)
  np.testing.assert_allclose(output.loss, 3 * expected, rtol=1e-5)


def test_distillation_is_across_views_from_filtered_to_clean(plain):
  """The loss and the new centre, put together from the backbone, the heads and NumPy."""
  objective = dataclasses.replace(plain[0], com_probability=1.0)
  params, teacher, extra = plain[1]
  backbone = dataclasses.replace(objective.parts.backbone, drop_path=0.0)
  objective = dataclasses.replace(
    objective, parts=dataclasses.replace(objective.parts, backbone=backbone)
  )
  head = models.ProjectionHead(**objective.parts.projection)

  @jax.jit
  def logits(params, image_NHWC):
    pooled = backbone.apply({'params': params['backbone']}, image_NHWC).pooled
    return head.apply({'params': params['projection']}, pooled).reshape(-1, 2, K)

  image_NHWC = np.float32(BATCH['views'].reshape(-1, SIZE, SIZE, 3) / 255)
  kept = [spectrum_mask(image, 0.05)[..., None] for image in image_NHWC]
  filtered_NHWC = np.stack(
    [
      np.fft.ifft2(np.fft.fft2(image, axes=(0, 1)) * mask, axes=(0, 1)).real
      for image, mask in zip(image_NHWC, kept, strict=True)
    ]
  )
  student_BVK = logits(params, np.float32(numpy_normalise(filtered_NHWC)))
  teacher_BVK = logits(teacher, np.float32(numpy_normalise(image_NHWC)))
  output = compiled(objective)(params, teacher, extra, BATCH, RNG, STEP)
  # Step 3 of a ramp from 0.04 to 0.07 over 2 epochs of 5 steps.
  expected = numpy_cross_entropy(student_BVK, teacher_BVK, extra['centre'], 0.1, 0.04 + 0.3 * 0.03)
  # Logits agree to 1e-6 and are divided by a temperature of 0.05.
  np.testing.assert_allclose(output.metrics['loss_distillation'], expected, rtol=1e-4)
  centre_K = 0.9 * extra['centre'] + 0.1 * np.mean(teacher_BVK, axis=(0, 1))
  np.testing.assert_allclose(output.extra['centre'], centre_K, atol=1e-6)


def test_uniform_teacher_and_student_give_ln_k(plain):
  """A last layer of zeros answers zero logits: with no centre, uniform."""
  _, (params, teacher, extra), loss = plain

  def muted(tree):
    kernel = np.zeros_like(tree['projection']['last_layer']['kernel'])
    return tree | {'projection': tree['projection'] | {'last_layer': {'kernel': kernel}}}

  no_centre = {'centre': np.zeros_like(extra['centre'])}
  both = loss(muted(params), muted(teacher), no_centre, BATCH, RNG, STEP)
  np.testing.assert_allclose(both.metrics['loss_distillation'], np.log(K), rtol=1e-6)
  np.testing.assert_allclose(both.metrics['teacher_entropy'], 1.0, rtol=1e-6)
  np.testing.assert_allclose(both.extra['centre'], 0.0, atol=1e-9)
  # Whatever the teacher says, a uniform student pays ln K; of a uniform teacher another pays more.
  student = loss(muted(params), teacher, extra, BATCH, RNG, STEP)
  np.testing.assert_allclose(student.metrics['loss_distillation'], np.log(K), rtol=1e-6)
  teacher_only = loss(params, muted(teacher), no_centre, BATCH, RNG, STEP)
  assert teacher_only.metrics['loss_distillation'] > np.log(K) * 1.001


def test_total_is_the_weighted_sum(full):
  _, (params, teacher, extra), gradient = full
  _, output = gradient(params, teacher, extra, BATCH, RNG, STEP)
  m = {name: float(value) for name, value in output.metrics.items()}
  parts = 2 * m['loss_reconstruction'] + 0.5 * m['loss_distillation'] + 0.25 * m['loss_patch']
  assert min(m['loss_reconstruction'], m['loss_distillation'], m['loss_patch']) > 0.01
  assert float(output.loss) == m['loss'] == pytest.approx(parts, rel=1e-6)


def test_no_gradient_reaches_the_teacher_and_every_student_parameter_gets_one(full):
  _, (params, teacher, extra), gradient = full
  (student_gradient, teacher_gradient), _ = gradient(params, teacher, extra, BATCH, RNG, STEP)
  for path, leaf in jax.tree.leaves_with_path(teacher_gradient):
    assert not np.any(leaf), jax.tree_util.keystr(path)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(student_gradient))
  for path, leaf in jax.tree.leaves_with_path(student_gradient):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    layers = leaf if '/blocks/' in name else leaf[None]
    for layer in np.asarray(layers):
      if name.endswith('qkv/bias'):
        query, key, value = np.split(layer, 3)
        # Attention doesn't see a vector that is added to all keys: only rounding is left there.
        assert np.abs(key).max() < 1e-5 * np.abs(value).max()
        layer = np.concatenate([query, value])
      assert np.abs(layer).max() > 1e-7 * largest, name


class Recorder:
  """Stands in for the backbone: notes who was shown which images and whose patches are read; answers in that shape."""

  def __init__(self):
    self.calls, self.read = [], []

  def apply(self, variables, image_NHWC, sample_keys, patches):
    self.calls.append((variables['params'], image_NHWC, sample_keys))
    self.read.append((variables['params'], patches))
    n = image_NHWC.shape[0]
    grid = SIZE // PATCH
    pooled = jnp.tile(jnp.arange(24.0), (n, 1))
    return models.BackboneOutput(pooled, jnp.ones((n, grid, grid, 24)) if patches else None, {})


@pytest.mark.parametrize('clamp', [False, True])
def test_the_student_sees_filtered_views_only_and_the_teacher_clean_ones(plain, clamp):
  objective, (params, teacher, extra), _ = plain
  recorder = Recorder()
  parts = dataclasses.replace(objective.parts, backbone=recorder)
  objective = dataclasses.replace(objective, parts=parts, clamp=clamp)
  params = params | {'backbone': 'student'}
  teacher = teacher | {'backbone': 'teacher'}

  @jax.jit
  def shown(batch):
    objective.loss(params, teacher, extra, batch, RNG, STEP)
    return [call[1:] for call in recorder.calls]

  (seen_NHWC, keys), (clean_NHWC, no_keys) = shown(BATCH)
  assert [call[0] for call in recorder.calls] == ['student', 'teacher'] and no_keys is None
  assert keys.shape == (8,) and len(np.unique(jax.random.key_data(keys), axis=0)) == 8
  image_NHWC = BATCH['views'].reshape(-1, SIZE, SIZE, 3) / 255
  np.testing.assert_allclose(clean_NHWC, numpy_normalise(image_NHWC), atol=1e-5)
  assert recorder.read == [('student', True), ('teacher', False)]
  kinds = set()
  for image, seen in zip(image_NHWC, seen_NHWC, strict=True):
    mask = spectrum_mask(image, 0.05)[..., None]
    found = seen * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    filters = {}
    for name, kept in (('com', mask), ('rcom', ~mask)):
      result = np.fft.ifft2(np.fft.fft2(image, axes=(0, 1)) * kept, axes=(0, 1)).real
      filters[name] = np.clip(result, 0, 1) if clamp else result
    errors = {name: np.abs(found - result).max() for name, result in filters.items()}
    kinds.add(min(errors, key=errors.get))
    assert min(errors.values()) < 1e-5
    assert np.abs(found - image).max() > 0.1
  assert kinds == {'com', 'rcom'}


def test_draws_belong_to_the_sample_and_not_to_its_place(full):
  """A permuted batch gives the same loss, gradient and centre; by position none would agree."""
  _, (params, teacher, extra), gradient = full
  (expected, _), before = gradient(params, teacher, extra, BATCH, RNG, STEP)
  order = np.array([2, 0, 3, 1])
  permuted = {name: rows[order] for name, rows in BATCH.items()}
  (found, _), after = gradient(params, teacher, extra, permuted, RNG, STEP)
  # Sums over the batch in another order.
  np.testing.assert_allclose(after.loss, before.loss, rtol=1e-6)
  np.testing.assert_allclose(after.extra['centre'], before.extra['centre'], atol=1e-7)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found, expected)
  # The same pixels under other numbers, or at another step, are drawn anew.
  renamed = BATCH | {'index': BATCH['index'][order]}
  for other in ((renamed, RNG), (BATCH, jax.random.key(8))):
    _, output = gradient(params, teacher, extra, *other, STEP)
    assert abs(output.loss / before.loss - 1) > 1e-4


def test_one_trace_serves_every_step_and_batch(plain):
  objective, (params, teacher, extra), _ = plain
  traces = []

  @jax.jit
  def loss(*args):
    traces.append(1)
    return objective.loss(*args).loss

  batches = [BATCH, make_batch(seed=1), make_batch(seed=2)]
  found = {
    float(loss(params, teacher, extra, batch, RNG, jnp.int32(i))) for i, batch in enumerate(batches)
  }
  assert len(traces) == 1 and len(found) == 3


@pytest.mark.slow
def test_compiled_equals_eager(plain):
  objective, (params, teacher, extra), loss = plain
  eager = objective.loss(params, teacher, extra, BATCH, RNG, STEP)
  jitted = loss(params, teacher, extra, BATCH, RNG, STEP)
  # Fused or not, float32; logits are divided by temperatures below 0.1.
  for name in ('loss', 'loss_reconstruction', 'loss_distillation', 'effective_rank', 'feature_std'):
    np.testing.assert_allclose(jitted.metrics[name], eager.metrics[name], rtol=1e-4)
  np.testing.assert_allclose(jitted.extra['centre'], eager.extra['centre'], atol=1e-6)


def test_the_teachers_temperature_follows_the_step(plain):
  """Sharper at the start: a lower entropy, and the same from the ramp's end on."""
  _, (params, teacher, extra), loss = plain

  def entropy(step):
    metrics = loss(params, teacher, extra, BATCH, RNG, jnp.int32(step)).metrics
    return float(metrics['teacher_entropy'])

  assert entropy(0) < entropy(5) < entropy(10) == entropy(100)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(make_folk, plain):
  _, (params, teacher, extra), loss = plain
  half = compiled_gradient(make_folk(dtype='bfloat16'), of_teacher=False)
  (gradient,), output = half(params, teacher, extra, BATCH, RNG, STEP)
  expected = loss(params, teacher, extra, BATCH, RNG, STEP)
  for leaf in jax.tree.leaves((gradient, output)):
    assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))
  # Eight bits of mantissa: it must differ, and by no more than a few of them.
  ratio = float(output.loss / expected.loss)
  assert ratio != 1 and abs(ratio - 1) < 0.03


@pytest.mark.parametrize(
  'fields',
  [
    {'ranking': 'per_channel', 'clamp': True},
    {'reduce': 'pooled', 'gamma': 2.0},
    {'patch_weight': 1.0, 'reconstruction_weight': 0.0},
  ],
  ids=['per_channel, clamp', 'pooled, gamma 2', 'patches'],
)
def test_gradients_of_the_options_are_the_slope_of_the_loss(make_folk, fields):
  objective = make_folk(depth=1, **fields)
  params, teacher, extra = make_state(objective)
  gradient = compiled_gradient(objective, of_teacher=False)
  (slope,), _ = gradient(params, teacher, extra, BATCH, RNG, STEP)
  norm = float(jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(slope))))
  # Along the gradient, where the slope is steepest, with a random direction on top.
  rng = np.random.default_rng(0)
  noise = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
  direction = jax.tree.map(lambda g, n: g / norm + 0.1 * n / 100, slope, noise)
  expected = sum(
    float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (slope, direction)), strict=True)
  )
  step = 2e-3 / norm

  def moved(distance):
    there = jax.tree.map(lambda p, d: p + distance * d, params, direction)
    return float(gradient(there, teacher, extra, BATCH, RNG, STEP)[1].loss)

  # A loss near 3 in float32 changes by 4e-3: 1e-3 of rounding, and the curve's third order.
  assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(expected, rel=1e-2)


def test_evaluation_counts_valid_images_and_sets_the_mean_beside_it(make_folk):
  objective = make_folk(com_probability=1.0, distillation_weight=0.0)
  params, _, extra = make_state(objective)
  params, guess_HWC = bias_only(params, 1)
  batch = BATCH | {'views': BATCH['views'][:, :1], 'valid': np.array([True, False, True, True])}
  sums = jax.jit(objective.evaluate)(params, None, extra, batch, RNG)
  image_BHWC = BATCH['views'][:, 0] / 255
  expected = {'reconstruction': 0.0, 'reconstruction_of_mean': 0.0, 'count': 3}
  for image in image_BHWC[batch['valid']]:
    target, masked = numpy_normalise(image), ~spectrum_mask(image, 0.05)
    expected['reconstruction'] += numpy_distance(guess_HWC, target, masked)
    expected['reconstruction_of_mean'] += numpy_distance(0 * target, target, masked)
  assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected, rel=1e-5)
