"""Fine-tuning: its loss and head in NumPy, exact top-1 and top-5, whom it judges, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.objectives import OBJECTIVES
from folk_jax.objectives.supervised import evaluation_statistics, ranks
from folk_jax.signal.mixing import draw_weights
from folk_jax.train import run
from folk_jax.train import state as state_lib

CLASSES, BATCH = 7, 8
OFF = {'mixup': 0.0, 'cutmix': 0.0, 'erasing': 0.0}


def make(arg='smoke', classes=CLASSES, teacher=False, model=None, **fields):
  c = config_lib.load_recipe('configs/finetune.py', arg)
  c.image_size, c.teacher.enabled = 16, teacher
  if c.model.name == 'vit':
    c.model.update({'width': 24, 'heads': 2, 'drop_path': 0.0})
  c.model.update(model or {})
  c.objective.update(fields)
  return run.make_run(c, 64, classes).objective


def make_batch(size=BATCH, seed=0, side=16):
  rng = np.random.default_rng(seed)
  return {
    'views': rng.integers(0, 256, (size, 1, side, side, 3), dtype=np.uint8),
    'label': rng.integers(0, CLASSES, size).astype(np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }


def softened(params, seed=0):
  """A head whose logits differ, and every parameter away from where it starts."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), params)


@pytest.fixture(scope='module')
def plain():
  """Without mixing or erasing: objective, parameters, extra, compiled loss and evaluation."""
  objective = make(**OFF)
  params, extra = jax.jit(lambda rng: objective.init(rng, None))(jax.random.key(0))
  return objective, softened(params), extra, jax.jit(objective.loss), jax.jit(objective.evaluate)


@pytest.fixture(scope='module')
def logits_of(plain):
  """Logits by the objective, checked once against a NumPy head on the backbone's patches."""
  objective, params = plain[0], plain[1]

  @jax.jit
  def features(params, image):
    output, _ = objective.parts.encode(params['backbone'], {}, image)
    return output.patches

  def logits(params, batch):
    parts = objective.parts
    image = (batch['views'][:, 0] / np.float64(255) - parts.mean) / np.array(parts.std)
    feature = np.float64(features(params, np.float32(image))).mean(axis=(1, 2))
    feature -= feature.mean(axis=1, keepdims=True)
    feature /= np.sqrt(feature.var(axis=1, keepdims=True) + 1e-6)
    head = params['head']
    feature = feature * head['norm']['scale'] + head['norm']['bias']
    return feature @ np.float64(head['kernel']) + head['bias'], np.float32(image)

  found, image = logits(params, make_batch())
  # float32 sums of 24 values of size 1.
  np.testing.assert_allclose(objective.logits(params, {}, image), found, atol=1e-5)
  return lambda params, batch: logits(params, batch)[0]


def log_softmax(logits):
  shifted = logits - logits.max(axis=1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_the_loss_is_smoothed_cross_entropy(plain, logits_of):
  _, params, extra, loss, _ = plain
  batch = make_batch()
  output = loss(params, None, extra, batch, jax.random.key(1), jnp.int32(0))
  logits = logits_of(params, batch)
  target = 0.1 / CLASSES + 0.9 * np.eye(CLASSES)[batch['label']]
  expected = -(target * log_softmax(logits)).sum(axis=1).mean()
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)  # float32
  assert output.metrics['right'] == np.mean(logits.argmax(axis=1) == batch['label'])
  assert output.metrics['loss'] == output.loss and output.extra == extra == {}


def test_mixed_images_have_mixed_targets(plain):
  """The loss is the cross-entropy of what `_inputs` gives, with the batch's share between neighbours."""
  base, params, extra = plain[:3]
  objective = dataclasses.replace(base, mixup=0.8, cutmix=1.0)
  batch, rng = make_batch(), jax.random.key(1)
  key = jax.random.fold_in(rng, 2**32 - 1)
  own_HW1, share = jax.device_get(draw_weights(key, objective._mixing, 16, 16))
  assert 0.05 < share < 0.95
  parts = objective.parts
  image = np.float32((batch['views'][:, 0] / 255.0 - parts.mean) / np.array(parts.std))
  flipped = np.array([1, 0, 3, 2, 5, 4, 7, 6])
  mixed = own_HW1 * image + (1 - own_HW1) * image[flipped]
  target = 0.1 / CLASSES + 0.9 * np.eye(CLASSES)[batch['label']]
  target = share * target + (1 - share) * target[flipped]
  logits = np.float64(objective.logits(params, {}, mixed))
  expected = -(target * log_softmax(logits)).sum(axis=1).mean()
  output = objective.loss(params, None, extra, batch, rng, jnp.int32(0))
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  assert output.metrics['right'] == np.mean(logits.argmax(axis=1) == target.argmax(axis=1))


def test_erasing_changes_what_the_network_sees(plain):
  base, params, extra = plain[:3]
  batch, args = make_batch(), (jax.random.key(1), jnp.int32(0))
  losses = {
    p: float(dataclasses.replace(base, erasing=p).loss(params, None, extra, batch, *args).loss)
    for p in (0.0, 1.0)
  }
  assert losses[0.0] != losses[1.0]


def test_evaluation_counts_valid_rows_exactly(plain, logits_of):
  _, params, extra, _, evaluate = plain
  batch = make_batch(32, seed=3)
  batch['valid'] = np.arange(32) < 21
  batch['label'][25:] = -1  # padding has no label, and doesn't count
  sums = evaluate(params, None, extra, batch, jax.random.key(0))
  logits = logits_of(params, batch)[:21]
  order = np.argsort(-logits, axis=1)
  hits = order == batch['label'][:21, None]
  assert {name: float(value) for name, value in sums.items() if name != 'loss'} == {
    'count': 21,
    'top1': hits[:, 0].sum(),
    'top5': hits[:, :5].sum(),
  }
  assert 0 < hits[:, 0].sum() < hits[:, :5].sum() < 21
  expected = -log_softmax(logits)[np.arange(21), batch['label'][:21]].sum()
  np.testing.assert_allclose(sums['loss'], expected, rtol=1e-5)


def test_ranks_by_hand():
  """Ties go to the lower number, and a NaN comes last."""
  logits_BK = jnp.array([[3.0, 5, 5, 1], [0, 0, 0, 0], [1, jnp.nan, 2, 3], [1, jnp.nan, 2, 3]])
  for label, expected in ((0, [2, 0, 3]), (1, [0, 1, 4]), (2, [1, 2, 2]), (3, [3, 3, 1])):
    np.testing.assert_array_equal(ranks(logits_BK[:3], jnp.full(3, label)), expected)
  rng = np.random.default_rng(0)
  logits_BK = rng.normal(size=(50, 9)).astype(np.float32)
  label_B = rng.integers(0, 9, 50)
  expected = (logits_BK > logits_BK[np.arange(50), label_B][:, None]).sum(axis=1)
  np.testing.assert_array_equal(ranks(jnp.asarray(logits_BK), jnp.asarray(label_B)), expected)


def test_what_has_no_label_is_never_counted_as_another_class(plain):
  _, params, extra, loss, evaluate = plain
  for wrong in (-1, CLASSES):
    batch = make_batch()
    batch['label'][2] = wrong
    assert np.isnan(loss(params, None, extra, batch, jax.random.key(1), jnp.int32(0)).loss)
    sums = evaluate(params, None, extra, batch, jax.random.key(0))
    assert all(np.isnan(sums[name]) for name in ('top1', 'top5', 'loss')) and sums['count'] == 8


def test_the_moving_average_is_judged_where_there_is_one(plain):
  objective, params, extra, _, evaluate = plain
  teacher, batch = softened(params, seed=9), make_batch()
  judged = {
    name: float(evaluate(params, other, extra, batch, jax.random.key(0))['loss'])
    for name, other in (('student', None), ('teacher', teacher))
  }
  alone = float(evaluate(teacher, None, extra, batch, jax.random.key(0))['loss'])
  assert judged['teacher'] == alone != judged['student']
  assert objective.teacher_parts == ('backbone', 'head')


def test_a_fresh_head_says_next_to_nothing():
  objective = make()
  params, _ = objective.init(jax.random.key(0), None)
  head = params['head']
  assert set(head) == {'kernel', 'bias', 'norm'} and not np.any(head['bias'])
  # 0.02 * 0.001; the deviation of 24 * 7 values is within 5 * 1 / sqrt(2 * 168) of it.
  assert np.std(head['kernel']) == pytest.approx(2e-5, rel=0.28)


@pytest.fixture(scope='module')
def resnet():
  """With a moving average: objective, state, batch."""
  c = config_lib.load_recipe('configs/finetune.py', 'model=resnet50,smoke')
  c.teacher.enabled = True
  made = run.make_run(c, 64, CLASSES)
  return made, jax.jit(made.new_state)(jax.random.key(0), {})


def test_a_resnet_is_judged_by_statistics_of_its_own_network(resnet):
  made, state = resnet
  extra, objective, batch = state.extra, made.objective, make_batch(side=32)
  assert set(extra['batch_stats']) == {'student'}
  assert set(extra['clean_stats']) == {'student', 'teacher'}
  assert set(state.params['head']) == {'kernel', 'bias'}
  assert evaluation_statistics(extra, 'teacher') is extra['clean_stats']['teacher']
  assert evaluation_statistics(extra, 'student') is extra['clean_stats']['student']
  assert evaluation_statistics({}, 'student') == {}
  evaluate, losses = jax.jit(objective.evaluate), {}
  params = softened(state.params)
  for moved in ('none', 'student', 'teacher'):
    clean = dict(extra['clean_stats'])
    if moved in clean:
      clean[moved] = jax.tree.map(lambda x: x + 0.5, clean[moved])
    sums = evaluate(params, params, extra | {'clean_stats': clean}, batch, jax.random.key(0))
    losses[moved] = float(sums['loss'])
  assert losses['none'] == losses['student'] != losses['teacher']


def test_a_step_moves_a_resnets_weights_average_and_statistics(resnet):
  made, state = resnet
  after, metrics = jax.jit(made.step)(state, make_batch(16, side=32))
  assert metrics['nonfinite'] == 0
  for part in ('backbone', 'head'):
    moved = jax.tree.map(
      lambda a, b: bool(np.any(a != b)), state_lib.teacher_of(after)[part], after.params[part]
    )
    assert any(jax.tree.leaves(moved))
  changed = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), after.extra['batch_stats'], state.extra['batch_stats']
  )
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'classes': 0}, 'config.data has 0 labelled classes and supervised training needs 2 or more'),
    (
      {'pooling': 'max'},
      "unknown config.objective.pooling 'max'. Known: pooled, mean_patch, concat.",
    ),
    ({'label_smoothing': 1.0}, 'label_smoothing 1.0 must lie in [0, 1).'),
    ({'erasing': 1.5}, 'erasing 1.5 must lie in [0, 1].'),
    ({'head_scale': -1.0}, 'head_scale -1.0 must not be negative.'),
    ({'mixup': -1.0}, 'mixup is -1.0'),
  ],
)
def test_what_makes_no_sense_is_refused(changes, words):
  with pytest.raises(UserError) as refused:
    make(**changes)
  assert words in str(refused.value)


def test_more_than_one_view_is_refused(plain):
  parts = dataclasses.replace(plain[0].parts, augmentations=plain[0].parts.augmentations * 2)
  with pytest.raises(UserError, match='config.views has 2 views; supervised training takes 1'):
    dataclasses.replace(plain[0], parts=parts)


@pytest.mark.parametrize('model, epochs', [('vit_b', 100), ('vit_s', 200), ('resnet50', 100)])
def test_the_recipes_are_the_papers(model, epochs):
  c = config_lib.load_recipe('configs/finetune.py', f'model={model}')
  config_lib.validate(c)
  assert (c.epochs, c.batch_size, c.optimizer.warmup_epochs) == (epochs, 2048, 5)
  assert c.objective.name in OBJECTIVES and c.evaluation.held_out_images == 0
  if model == 'resnet50':
    assert c.optimizer.layer_decay == 1 and c.image_size == 160
    return
  # 2e-3 for 512 images is 8e-3 for 2048; timm's warm-up and a floor of 2.5e-7 for 512.
  assert c.optimizer.learning_rate * c.batch_size / 256 == pytest.approx(8e-3)
  assert c.optimizer.final_learning_rate == pytest.approx(2.5e-7 * 2048 / 512)
  assert (c.optimizer.layer_decay, c.optimizer.weight_decay, c.model.drop_path) == (0.8, 0.05, 0.1)
