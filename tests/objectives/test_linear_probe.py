"""The linear probe: many heads in one run are each a run of their own, and the backbone never moves.

Shape letters: B images, N images in a row, D width of a feature, R learning rates, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.models.features import feature
from folk_jax.objectives import make_objective
from folk_jax.objectives.base import with_statistics
from folk_jax.objectives.linear_probe import choose, head_name
from folk_jax.signal.augment import Augmentation
from folk_jax.train import run as run_lib

CLASSES, STEPS = 5, 4
RATES, FEATURES = (0.01, 0.3), ('pooled', 'concat')
RNG = jax.random.key(7)


def make_config(arg='smoke', rates=RATES, features=FEATURES, base_rate=1.0):
  c = config_lib.load_recipe('configs/linear.py', arg)
  if c.model.name == 'vit':
    c.model.update({'width': 24, 'heads': 2})
  c.objective.update({'learning_rates': rates, 'features': features})
  c.optimizer.learning_rate = base_rate * 256 / c.batch_size
  return c


def make_batch(seed, size=16, views=1):
  rng = np.random.default_rng(seed)
  return {
    'views': rng.integers(0, 256, (size, views, 32, 32, 3), dtype=np.uint8),
    'label': np.int32(np.arange(size) % CLASSES),
    'index': np.arange(size),
    'valid': np.ones(size, bool),
  }


def train(config):
  """The states before and after a few steps on the same batches, whatever the configuration."""
  run = run_lib.make_run(config, images=256, classes=CLASSES)
  state = first = jax.jit(run.new_state)(jax.random.key(0), {})
  step = jax.jit(run.step)
  for number in range(STEPS):
    state, metrics = step(state, make_batch(number))
  return run, first, state, metrics


@pytest.fixture(scope='module')
def joint():
  return train(make_config())


@pytest.fixture(scope='module')
def features_of(joint):
  """Frozen features of one view an image, by name, from the backbone's own output."""
  run, first, _, _ = joint
  parts = run.objective.parts

  @jax.jit
  def compute(view_BHWC):
    image = (view_BHWC.astype(jnp.float32) / 255 - np.array(parts.mean)) / np.array(parts.std)
    output, _ = parts.encode(first.params['backbone'], {}, image.astype(jnp.float32))
    return {name: feature(output, name) for name in FEATURES}

  return lambda batch: jax.device_get(compute(batch['views'][:, 0]))


@pytest.mark.parametrize('place, name', [(0, 'concat'), (1, 'pooled')])
def test_a_head_of_many_is_the_run_of_its_own_rate(joint, place, name):
  """Momentum and cosine included: alone, with the rate in the optimiser instead of the loss."""
  _, first, last, _ = joint
  _, alone_first, alone, _ = train(make_config('smoke', (1.0,), (name,), RATES[place]))
  for leaf in ('kernel', 'bias'):
    start, expected = (s.params['heads'][name][leaf][0] for s in (alone_first, alone))
    # The same draws: a polynomial of the same uniforms, that programs of other shapes round apart by a bit or two.
    np.testing.assert_array_max_ulp(first.params['heads'][name][leaf][place], start, 4)
    found = last.params['heads'][name][leaf][place]
    # Each step rounds the product of rate and gradient at another place.
    np.testing.assert_allclose(found - start, expected - start, rtol=1e-3, atol=1e-6)
    assert np.abs(expected - start).max() > 1e-3 * RATES[place]


def test_the_backbone_does_not_move_and_gets_no_gradient(joint):
  run, first, last, _ = joint
  for a, b in zip(*(jax.tree.leaves(s.params['backbone']) for s in (first, last)), strict=True):
    np.testing.assert_array_equal(a, b)

  def loss(params):
    return run.objective.loss(params, None, {}, make_batch(0), RNG, jnp.int32(0)).loss

  gradient = jax.jit(jax.grad(loss))(first.params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient['backbone']))
  for leaf in jax.tree.leaves(gradient['heads']):
    assert all(np.abs(head).max() > 1e-5 for head in leaf)


def log_softmax(logit):
  logit = np.float64(logit) - logit.max(axis=-1, keepdims=True)
  return logit - np.log(np.exp(logit).sum(axis=-1, keepdims=True))


def test_the_loss_is_the_sum_of_rates_times_cross_entropies(joint, features_of):
  run, _, last, _ = joint
  batch = make_batch(9)
  entropies = {}
  for name, feature_BD in features_of(batch).items():
    head = jax.device_get(last.params['heads'][name])
    for place, rate in enumerate(RATES):
      log_BK = log_softmax(feature_BD @ head['kernel'][place] + head['bias'][place])
      entropies[rate, name] = -log_BK[np.arange(16), batch['label']].mean()
  output = jax.jit(run.objective.loss)(last.params, None, {}, batch, RNG, jnp.int32(0))
  expected = sum(rate * value for (rate, _), value in entropies.items())
  # Products of 48 terms and a mean, in float32.
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  np.testing.assert_allclose(output.metrics['loss_best'], min(entropies.values()), rtol=1e-5)
  assert output.metrics['loss'] == output.loss and output.extra == {}


def test_evaluation_counts_right_answers_of_each_head_on_valid_images(joint, features_of):
  run, _, last, _ = joint
  batch = make_batch(10) | {'valid': np.arange(16) < 11}
  sums = jax.device_get(jax.jit(run.objective.evaluate)(last.params, None, {}, batch, RNG))
  expected = {'count': 11}
  for name, feature_BD in features_of(batch).items():
    head = jax.device_get(last.params['heads'][name])
    for place, rate in enumerate(RATES):
      guess_B = (feature_BD @ head['kernel'][place] + head['bias'][place]).argmax(axis=1)
      expected[head_name(rate, name)] = np.sum((guess_B == batch['label'])[:11])
  assert sums == expected
  assert set(sums) == {'count', *run.objective.head_names}
  assert run.objective.head_names[0] == 'top1_lr0.01_pooled'
  assert 0 < sum(expected.values()) - 11 < 4 * 11  # Neither all wrong nor all right.


def test_batchnorm_statistics_are_used_and_stay():
  config = make_config('model=resnet50,smoke', features=('pooled',))
  run = run_lib.make_run(config, images=256, classes=CLASSES)
  state = jax.jit(run.new_state)(jax.random.key(0), {})
  loss = jax.jit(run.objective.loss)

  def found(extra):
    return loss(state.params, None, extra, make_batch(0), RNG, jnp.int32(0))

  output = found(state.extra)
  assert jax.tree.structure(output.extra) == jax.tree.structure(state.extra)
  for a, b in zip(*map(jax.tree.leaves, (output.extra, state.extra)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert found(jax.tree.map(lambda leaf: 2 * leaf, state.extra)).loss != output.loss
  loaded = jax.tree.map(lambda leaf: leaf + 1, state.extra['batch_stats']['student'])
  imported = with_statistics(state.extra, loaded)
  for a, b in zip(*map(jax.tree.leaves, (imported, loaded)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'scores, best',
  [
    ({'top1_lr0.1_pooled': 0.5, 'top1_lr0.01_concat': 0.6, 'count': 9.0}, 'top1_lr0.01_concat'),
    ({'eval/top1_lr0.1_last4': 0.6, 'eval/knn_top1': 0.9}, 'eval/top1_lr0.1_last4'),
    # Equal: the lower rate by value, not by spelling; then the first by name.
    ({'top1_lr0.001_b': 0.5, 'top1_lr1e-05_b': 0.5, 'top1_lr1_b': 0.5}, 'top1_lr1e-05_b'),
    ({'top1_lr0.1_mean_patch': 0.5, 'top1_lr0.1_concat': 0.5}, 'top1_lr0.1_concat'),
    ({'top1_lr0.1_pooled': float('nan'), 'top1_lr0.3_pooled': 0.0}, 'top1_lr0.3_pooled'),
  ],
)
def test_the_best_head_on_validation_images(scores, best):
  assert choose(scores) == best
  assert choose(dict(reversed(scores.items()))) == best


def test_every_name_is_one_that_can_be_chosen(joint):
  names = joint[0].objective.head_names
  for name in names:
    assert choose({other: float(other == name) for other in names}) == name


@pytest.mark.parametrize('scores', [{}, {'eval/knn_top1': 0.9}, {'top1_lr1_a': float('nan')}])
def test_without_a_score_there_is_no_choice(scores):
  with pytest.raises(UserError, match='no head of a linear probe'):
    choose(scores)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'classes': 0}, 'config.data has 0: use a labelled data set'),
    ({'learning_rates': (0.1, 0.1)}, 'must differ'),
    ({'learning_rates': (0.1, 0.10000001)}, 'first six digits'),
    ({'learning_rates': ()}, 'learning_rates is empty'),
    ({'learning_rates': (0.1, 0.0)}, 'must be positive'),
    ({'features': ('pooled', 'cls')}, "unknown feature 'cls'"),
    ({'features': ('last4',)}, 'config.model.depth is 2'),
  ],
)
def test_mistakes_are_refused_in_words(make_folk, change, words):
  parts = dataclasses.replace(
    make_folk().parts,
    augmentations=(Augmentation(),),
    has_teacher=False,
    classes=change.pop('classes', CLASSES),
  )
  with pytest.raises(UserError, match=words):
    make_objective('linear_probe', parts, {'learning_rates': RATES, 'features': FEATURES} | change)
