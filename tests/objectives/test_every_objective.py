"""What holds for every method, through its own recipe: gradients, one trace, eight devices, resume, bfloat16."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.objectives import OBJECTIVES
from folk_jax.train import run, sharding
from folk_jax.train import state as state_lib

SUPPORT = pathlib.Path(__file__).parents[1] / 'support' / 'every_objective.py'
NAMES = (
  'folk',
  'folk_resnet',
  'mfm',
  'mfm_resnet',
  'super_resolution',
  'deblur',
  'denoise',
  'wavelet_mim',
  'mae',
  'dino',
  'ibot',
  'supervised',
  'linear_probe',
  'segment',
)


@pytest.fixture(scope='module')
def every(support):
  return support('every_objective')


class Case:
  """A method's run, its state, and its compiled gradient with a count of its traces."""

  def __init__(self, every, name: str):
    self.config = every.make_config(name)
    self.run = run.make_run(self.config, every.IMAGES, every.CLASSES)
    self.state = every.make_state(self.run)
    self.batch = every.make_batch(self.config, 4)
    self.traces = 0
    gradients = every.loss_and_gradients(self.run.objective)

    def counted(*args):
      self.traces += 1
      return gradients(*args)

    self.gradients = jax.jit(counted)
    self.plain = gradients
    self.found = self.gradients(*self.state, self.batch)


@pytest.fixture(scope='module')
def case_of(every):
  return functools.cache(functools.partial(Case, every))


def test_every_registered_objective_has_a_recipe_here(every):
  objectives = {every.make_config(name).objective.name for name in NAMES}
  assert objectives == set(OBJECTIVES) and set(NAMES) == set(every.RECIPES)


@pytest.mark.parametrize('name', NAMES)
def test_every_student_parameter_gets_a_gradient_and_no_teacher_parameter_does(
  every, case_of, name
):
  (student, teacher), output = case_of(name).found
  for key, leaf in every.named(teacher).items():
    assert not np.any(leaf), key
  gradients = every.without_key_biases(every.named(student))
  assert {key.split('/')[0] for key in gradients} == set(case_of(name).state[0])
  largest = max(np.abs(leaf).max() for leaf in gradients.values())
  frozen = case_of(name).config.optimizer.frozen
  for key, leaf in gradients.items():
    if key.split('/')[0] in frozen:
      assert not np.any(leaf), key
      continue
    for layer in leaf if '/blocks/' in key else leaf[None]:
      assert np.abs(layer).max() > 1e-7 * largest, key
  assert np.isfinite(output.loss) and output.metrics['loss'] == output.loss


@pytest.mark.parametrize('name', NAMES)
def test_compiled_once_and_equal_to_the_plain_call(case_of, name):
  case = case_of(name)
  other = case.batch | {
    'index': case.batch['index'] + 5,
    'views': 255 - case.batch['views'],
    'label': (case.batch['label'] + 1) % 10,
  }
  assert case.gradients(*case.state, other)[1].loss != case.found[1].loss
  assert case.traces == 1
  output = case.run.objective.loss(*case.state, case.batch, jax.random.key(7), jnp.int32(3))
  # Sums in another order; the sharpened teacher multiplies logits' rounding by 25.
  np.testing.assert_allclose(output.loss, case.found[1].loss, rtol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(every, case_of, name, tmp_path):
  """Three steps, against one step, a checkpoint on disk, and two more: bit for bit."""
  case = case_of(name)
  batches = [every.make_batch(case.config, 4, seed) for seed in range(3)]
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    state = jax.jit(case.run.new_state)(jax.random.key(0), {})
    step = jax.jit(case.run.step)
    with checkpoint.Checkpoints(str(tmp_path), 1, 2, 0, False) as checkpoints:
      state, _ = step(state, batches[0])
      checkpoints.save(1, state, {'step': 1}, force=True)
      restored, _ = checkpoints.restore(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
      )
    for batch in batches[1:]:
      state, _ = step(state, batch)
      restored, _ = step(restored, batch)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
    np.testing.assert_array_equal(a, b)
  assert int(restored.step) == 3


@pytest.mark.parametrize('name', NAMES)
def test_bfloat16_stays_finite(every, name):
  config = every.make_config(name, dtype='bfloat16')
  made = run.make_run(config, every.IMAGES, every.CLASSES)
  params, teacher, extra = every.make_state(made)
  batch = every.make_batch(config, 4)
  output = jax.jit(made.objective.loss)(
    params, teacher, extra, batch, jax.random.key(7), jnp.int32(3)
  )
  for leaf in jax.tree.leaves(output):
    assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))


def test_eight_devices_equal_one(run_with_devices):
  results = json.loads(run_with_devices(SUPPORT, timeout=900).splitlines()[-1])
  assert set(results) == set(NAMES)
  for name, gaps in results.items():
    # Sums of 16 images in another order, through a loss whose teacher sharpens 25 times; BatchNorm of a few
    # positions an image divides by small deviations.
    assert gaps['loss'] < 1e-4 and gaps['gradient'] < 2e-3 and gaps['extra'] < 1e-4, (name, gaps)


@pytest.mark.parametrize('recipe', ['mae.py', 'wavelet_mim.py', 'ibot.py'])
def test_a_method_that_masks_patches_refuses_a_resnet_and_says_who_can(every, recipe):
  every.RECIPES['refused'] = (recipe, 'model=resnet50,smoke')
  try:
    with pytest.raises(UserError) as refused:
      run.make_run(every.make_config('refused'), 256)
  finally:
    del every.RECIPES['refused']
  message = str(refused.value)
  assert 'trains vit alone' in message and "'resnet'" in message and 'folk, mfm' in message


def test_statistics_by_network(case_of):
  """FOLK's teacher sees clean views and has statistics of its own; MFM's student saw filtered images alone."""
  folk, mfm = (case_of(name).found[1].extra for name in ('folk_resnet', 'mfm_resnet'))
  assert set(folk['batch_stats']) == {'student', 'teacher'} and set(folk['clean_stats']) == {
    'student'
  }
  assert set(mfm['batch_stats']) == set(mfm['clean_stats']) == {'student'}
  before = case_of('folk_resnet').state[2]
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), folk['batch_stats'], before['batch_stats']
  )
  assert all(jax.tree.leaves(moved))
  assert not any(
    jax.tree.leaves(
      jax.tree.map(lambda a, b: np.any(a != b), folk['clean_stats'], before['clean_stats'])
    )
  )
  state = state_lib.TrainState(jnp.int32(1), {}, (), folk)
  assert state_lib.statistics(state, 'teacher') is folk['batch_stats']['teacher']
  assert state_lib.statistics(state, 'student') is folk['clean_stats']['student']
