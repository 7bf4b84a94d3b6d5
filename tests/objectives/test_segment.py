"""Segmentation as an objective: the pixel loss by hand, gradients of every parameter, evaluation as a NumPy twin
counts.

Shape letters: B images, H, W pixels, K classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.objectives import Parts, make_objective
from folk_jax.objectives.segment import pixel_loss
from folk_jax.signal.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation

CLASSES, IGNORE = 3, 5
FIELDS = {
  'head': 'upernet',
  'layers': (),
  'channels': 4,
  'dropout': 0.1,
  'auxiliary_weight': 0.4,
  'classes': CLASSES,
  'ignore': IGNORE,
  'stride': 0.5,
}
BACKBONES = {
  'vit': {'width': 12, 'depth': 2, 'heads': 2, 'patch': 8, 'drop_path': 0.2},
  'still_vit': {'width': 12, 'depth': 2, 'heads': 2, 'patch': 8},
  'resnet': {'depth': 18, 'width': 4},
}


def make(model='vit', image_size=16, views=1, has_teacher=False, classes=0, **fields):
  name = 'resnet' if model == 'resnet' else 'vit'
  backbone = models.make_backbone(name, image_size, **BACKBONES[model])
  parts = Parts(
    backbone=backbone,
    model=name,
    image_size=image_size,
    patch=backbone.stride,
    projection=None,
    augmentations=(Augmentation(),) * views,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    steps_per_epoch=5.0,
    has_teacher=has_teacher,
    dtype='float32',
    classes=classes,
  )
  return make_objective('segment', parts, FIELDS | fields)


def batch_of(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'views': rng.integers(0, 256, (3, 1, height, width, 3), np.uint8),
    'mask': rng.choice([*range(CLASSES), IGNORE], (3, 1, height, width)).astype(np.uint8),
    'index': np.arange(3, dtype=np.int32),
    'valid': np.array([True, False, True]),
  }


class Case:
  """An objective, parameters away from zero, and its compiled gradient."""

  def __init__(self, model, head):
    self.objective = make(model, 32 if model == 'resnet' else 16, head=head)
    params, self.extra = jax.jit(lambda key: self.objective.init(key, None))(jax.random.key(0))
    rng = np.random.default_rng(1)
    self.params = jax.tree.map(lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape)), params)

    def loss(params, batch):
      return self.objective.loss(params, None, self.extra, batch, jax.random.key(1), jnp.int32(0))

    def pair(params, batch):
      output = loss(params, batch)
      return output.loss, output

    self.loss = jax.jit(loss)
    self.gradient = jax.jit(jax.grad(pair, has_aux=True))
    self.predict = jax.jit(self.objective.predict)
    self.evaluate = jax.jit(self.objective.evaluate)


@pytest.fixture(scope='module')
def case_of():
  return functools.cache(Case)


def test_the_loss_by_hand():
  logits_BHWK = jnp.log(jnp.array([[[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]]]]))
  for mask, expected in (
    ([[[0, 1]]], -(np.log(0.5) + np.log(0.6)) / 2),
    ([[[2, IGNORE]]], -np.log(0.25) / 2),  # Over all pixels, labelled or not.
    ([[[IGNORE, 255]]], 0.0),
  ):
    found = pixel_loss(logits_BHWK, jnp.array(mask, jnp.uint8), CLASSES)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_every_parameter_gets_a_gradient(case_of):
  case = case_of('vit', 'upernet')
  gradient, output = case.gradient(case.params, batch_of(16, 16))
  assert set(gradient) == {'backbone', 'head'}
  for path, leaf in jax.tree.leaves_with_path(gradient):
    # The pooled maps of one position are among these: a norm that empties them would show.
    assert np.abs(leaf).max() > 1e-9, jax.tree_util.keystr(path)
  parts = output.metrics['loss_segmentation'] + 0.4 * output.metrics['loss_auxiliary']
  assert output.loss == pytest.approx(float(parts), rel=1e-6)


def test_pixels_that_do_not_count_give_no_gradient(case_of):
  case = case_of('vit', 'upernet')
  batch = batch_of(16, 16)
  nothing = batch | {'mask': np.full_like(batch['mask'], IGNORE)}
  gradient, output = case.gradient(case.params, nothing)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
  assert output.loss == 0 and output.metrics['pixel_accuracy'] == 0


def test_a_resnet_trains_by_the_batch_and_is_judged_by_what_it_saw_in_training(case_of):
  case = case_of('resnet', 'upernet')
  output = case.loss(case.params, batch_of(32, 32))
  assert np.isfinite(output.loss)
  moved = jax.tree.map(lambda a, b: np.any(a != b), output.extra, case.extra)
  assert moved['batch_stats'] and all(jax.tree.leaves(moved)) and case.extra['clean_stats'] == {}
  shape = jax.eval_shape(
    case.objective.predict, case.params, case.extra, jnp.zeros((2, 40, 64, 3), jnp.uint8)
  )
  assert shape.shape == (2, 40, 64) and shape.dtype == jnp.int32


def test_evaluation_is_the_confusion_of_its_predictions(case_of):
  case = case_of('vit', 'upernet')
  batch = batch_of(20, 27)  # Windows of 16 every 8, the last moved back.
  sums = case.evaluate(case.params, None, case.extra, batch, jax.random.key(0))
  guess_BHW = np.asarray(case.predict(case.params, case.extra, batch['views'][:, 0]))
  twin_KK = np.zeros((CLASSES, CLASSES))
  mask_BHW = batch['mask'][:, 0]
  for b, row, column in np.ndindex(mask_BHW.shape):
    if batch['valid'][b] and mask_BHW[b, row, column] != IGNORE:
      twin_KK[mask_BHW[b, row, column], guess_BHW[b, row, column]] += 1
  assert sums['count'] == 2
  np.testing.assert_array_equal(sums['confusion'], twin_KK)
  scores = case.objective.finish(
    {name: 2 * np.asarray(value, np.float64) for name, value in sums.items()}
  )
  both_K = np.diag(twin_KK)
  assert scores['miou'] == pytest.approx(
    np.mean(both_K / (twin_KK.sum(0) + twin_KK.sum(1) - both_K))
  )
  assert scores['pixel_accuracy'] == pytest.approx(both_K.sum() / twin_KK.sum())


def test_an_image_of_one_window_is_what_training_sees(case_of):
  """Without drop path, dropout and augmentation, the classes that training scores highest are the prediction."""
  case = case_of('still_vit', 'linear')
  batch = batch_of(16, 16)
  guess_BHW = np.asarray(case.predict(case.params, case.extra, batch['views'][:, 0]))
  assert len(np.unique(guess_BHW)) > 1
  guessed = batch | {'mask': guess_BHW[:, None].astype(np.uint8)}
  assert case.loss(case.params, guessed).metrics['pixel_accuracy'] == 1


@pytest.mark.parametrize(
  ('fields', 'complaint'),
  [
    ({'head': 'uppernet'}, "unknown config.objective.head 'uppernet'. Known: linear, upernet"),
    ({'views': 2}, 'config has 2 views'),
    ({'has_teacher': True}, 'without a teacher'),
    ({'classes': 6}, 'classes 6 and ignore 5'),
    ({'stride': 0.0}, 'stride 0.0'),
    ({'dropout': 1.0}, 'dropout 1.0'),
    ({'layers': (0, 1, 2, 3)}, 'the vit has the layers 0..1'),
    ({'layers': (0, 1)}, 'upernet takes 4'),
  ],
)
def test_mistakes_are_refused(fields, complaint):
  if 'classes' in fields:
    with pytest.raises(UserError, match='classes is 3 and the data have 4'):
      make(classes=4)
    number = fields['classes']
    with pytest.raises(UserError, match=complaint):
      make_objective('segment', make().parts, FIELDS | {'classes': number})
    return
  with pytest.raises(UserError, match=complaint):
    make(**fields)
