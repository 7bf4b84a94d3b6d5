"""The optimiser's links against the reference's numbers, hand-made cases and optax's own AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folk_jax.errors import UserError
from folk_jax.train.optimizer import (
  OptimizerSettings,
  clip_by_parameter,
  decay_mask,
  delayed,
  make_optimizer,
)

SETTINGS = OptimizerSettings(
  learning_rate=4e-3,
  final_learning_rate=1e-4,
  warmup_epochs=1.0,
  schedule='dino',
  weight_decay=0.04,
  final_weight_decay=0.4,
  decay_exclude=(),
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  clip=0.0,
  clip_by='parameter',
  freeze_last_layer_epochs=0.0,
)
RUN = {'batch_size': 64, 'steps_per_epoch': 2.0, 'total_steps': 8}
PARAMS = {
  'backbone': {
    'blocks': {
      'norm': {'scale': np.ones((2, 3), np.float32)},
      'fc': np.ones((2, 3, 4), np.float32),
    },
    'pos_embed': np.ones((1, 5, 3), np.float32),
    'norm': np.ones(3, np.float32),
  },
  'projection': {
    'mlp_0': np.ones((3, 2), np.float32),
    'last_layer': {'kernel': np.ones((2, 6), np.float32)},
  },
}


def gradients(step: int, like=PARAMS):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)


def trained(optimizer, steps: int, params=PARAMS, first: int = 0):
  """The parameters after each of `steps` steps."""
  params = jax.tree.map(jnp.asarray, params)
  state, history, update = optimizer.init(params), [], jax.jit(optimizer.update)
  for step in range(first, first + steps):
    updates, state = update(gradients(step, params), state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history


def assert_trees_close(found, expected, rtol):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), found, expected)


def test_clipping_matches_the_reference(golden):
  """DINO's utils.clip_gradients at 1.5; the tolerances are the reference file's, float32 rounding."""
  numbers = golden('dino_ibot_loss')
  gradient = {name: numbers[f'clip.{name}.grad'] for name in ('p0', 'p1', 'p2')}
  assert max(numbers['clip.norms']) > 1.5 > min(numbers['clip.norms'])
  clip = clip_by_parameter(1.5)
  clipped, _ = clip.update(gradient, clip.init(gradient))
  for name, value in clipped.items():
    np.testing.assert_allclose(value, numbers[f'clip.{name}.clipped'], atol=1e-6, rtol=1e-5)


def test_stacked_layers_are_clipped_one_by_one():
  """Rows of norm 5 and 0.5 under a limit of 1: the first shrinks by 5, the second stays."""
  gradient = {
    'blocks': {'w': jnp.array([[3.0, 4.0], [0.3, 0.4]])},
    'w': jnp.array([[3.0, 4.0], [0, 0]]),
  }
  clip = clip_by_parameter(1.0)
  clipped, _ = clip.update(gradient, clip.init(gradient))
  np.testing.assert_allclose(clipped['blocks']['w'], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
  np.testing.assert_allclose(clipped['w'], [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_decay_spares_what_is_one_dimensional_in_a_layer():
  assert decay_mask(PARAMS) == {
    'backbone': {
      'blocks': {'norm': {'scale': False}, 'fc': True},
      'pos_embed': True,
      'norm': False,
    },
    'projection': {'mlp_0': True, 'last_layer': {'kernel': True}},
  }


def test_decay_spares_what_is_named():
  mask = decay_mask(PARAMS, exclude=('pos_embed', 'last_layer'))
  assert not mask['backbone']['pos_embed'] and not mask['projection']['last_layer']['kernel']
  assert mask['backbone']['blocks']['fc'] and mask['projection']['mlp_0']


def test_schedules_are_the_recipes():
  _, rates = make_optimizer(SETTINGS, **RUN, teacher_parts=('backbone',), momentum=(0.9, 1.0))
  assert set(rates) == {'learning_rate', 'weight_decay', 'teacher_momentum'}
  # The peak is 4e-3 * 64 / 256, twice in DINO's convention: the end of two warm-up steps, and the
  # cosine's start.
  cosine = [(1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
  rate = [0, 1e-3, *(1e-4 + 9e-4 * c for c in cosine)]
  half = np.array([(1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)])
  expected = {
    'learning_rate': rate,
    'weight_decay': 0.4 - 0.36 * half,
    'teacher_momentum': 1 - 0.1 * half,
  }
  for name, schedule in rates.items():
    np.testing.assert_allclose(
      [schedule(step) for step in range(8)], expected[name], rtol=1e-6, atol=1e-9
    )


def test_a_run_without_a_teacher_logs_no_momentum():
  optimizer, rates = make_optimizer(SETTINGS, **RUN)
  assert set(rates) == {'learning_rate', 'weight_decay'}
  assert optax.tree.get(optimizer.init(PARAMS), 'teacher', None) is None


def numpy_adamw(settings, rates, steps, params, first=0):
  """AdamW (arXiv 1711.05101) in float64 with both schedules; its own first step is `first`."""
  leaves, mask = jax.tree.leaves(params), jax.tree.leaves(decay_mask(params))
  values = [np.float64(leaf) for leaf in leaves]
  mean, square = ([np.zeros_like(v) for v in values] for _ in range(2))
  for step in range(first, steps):
    rate, decay = float(rates['learning_rate'](step)), float(rates['weight_decay'](step))
    count = step - first + 1
    for i, g in enumerate(jax.tree.leaves(gradients(step, params))):
      mean[i] = settings.b1 * mean[i] + (1 - settings.b1) * g
      square[i] = settings.b2 * square[i] + (1 - settings.b2) * np.float64(g) ** 2
      direction = (mean[i] / (1 - settings.b1**count)) / (
        np.sqrt(square[i] / (1 - settings.b2**count)) + settings.eps
      )
      values[i] = values[i] - rate * (direction + decay * values[i] * mask[i])
  return jax.tree.unflatten(jax.tree.structure(params), values)


def test_matches_adamw_in_numpy():
  optimizer, rates = make_optimizer(SETTINGS, **RUN)
  found = trained(optimizer, 8)[-1]
  # Eight float32 steps of relative size 1e-3 on values near 1.
  assert_trees_close(found, numpy_adamw(SETTINGS, rates, 8, PARAMS), rtol=1e-6)


def test_the_last_layer_rests_for_an_epoch_and_then_starts_afresh():
  """Frozen for 1.5 epochs of two steps; from step 3 on an AdamW whose first step that is."""
  settings = dataclasses.replace(SETTINGS, freeze_last_layer_epochs=1.5)
  optimizer, rates = make_optimizer(settings, **RUN)
  history = trained(optimizer, 8)
  for params in history[:3]:
    np.testing.assert_array_equal(params['projection']['last_layer']['kernel'], 1.0)
  late = numpy_adamw(settings, rates, 8, PARAMS, first=3)['projection']['last_layer']
  assert_trees_close(history[-1]['projection']['last_layer'], late, rtol=1e-6)
  # Everything else never noticed.
  unfrozen = trained(make_optimizer(SETTINGS, **RUN)[0], 8)[-1]
  assert_trees_close(history[-1]['backbone'], unfrozen['backbone'], rtol=0)
  assert_trees_close(history[-1]['projection']['mlp_0'], unfrozen['projection']['mlp_0'], rtol=0)


def test_delayed_is_exactly_the_optimiser_that_starts_later():
  params = PARAMS['projection']
  late = trained(delayed(optax.adamw(1e-2), 3), 6, params)
  fresh = trained(optax.adamw(1e-2), 3, params, first=3)
  assert_trees_close(late[2], params, rtol=0)
  for found, expected in zip(late[3:], fresh, strict=True):
    assert_trees_close(found, expected, rtol=0)


@pytest.mark.parametrize('clip_by', ['parameter', 'global'])
def test_clipping_comes_before_the_moments(clip_by):
  """Adam's first step forgets the gradient's size; its moments hold the clipped gradient."""
  settings = dataclasses.replace(SETTINGS, clip=0.5, clip_by=clip_by)
  optimizer, _ = make_optimizer(settings, **RUN)
  gradient = gradients(0)
  _, state = jax.jit(optimizer.update)(gradient, optimizer.init(PARAMS), PARAMS)
  moments = [
    leaf / 0.1
    for _, tree in optax.tree.get_all_with_path(state, 'mu')
    for leaf in jax.tree.leaves(tree)
  ]
  norms = np.array([np.linalg.norm(m) for m in moments])
  if clip_by == 'global':
    np.testing.assert_allclose(np.linalg.norm(norms), 0.5, rtol=1e-5)
  else:
    # One row a layer for the stacked ones: two rows of 0.5 each make 0.5 * sqrt(2).
    stacked = len(jax.tree.leaves(PARAMS['backbone']['blocks']))
    np.testing.assert_allclose(sorted(norms)[-stacked:], 0.5 * 2**0.5, rtol=1e-5)
    np.testing.assert_allclose(sorted(norms)[:-stacked], 0.5, rtol=1e-5)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'clip_by': 'layer'}, "unknown config.optimizer.clip_by 'layer'. Known: parameter, global."),
    ({'schedule': 'step'}, "unknown config.optimizer.schedule 'step'. Known: dino, timm."),
    ({'warmup_epochs': 4.0}, "warmup_epochs 4.0 is 8 steps, which is not less than the run's 8"),
  ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
  with pytest.raises(UserError) as refused:
    make_optimizer(dataclasses.replace(SETTINGS, **change), **RUN)
  assert message in str(refused.value)
