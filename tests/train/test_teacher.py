"""The EMA teacher against numbers worked by hand, and a NumPy twin at the end of a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folk_jax import schedules
from folk_jax.train.teacher import EmaTeacherState, ema_teacher


def test_three_steps_by_hand():
  """Momentum 0, 1/2, 3/4 on a student that goes 8 -> 4 -> 6 -> 2."""
  teacher = ema_teacher(lambda step: jnp.array([0.0, 0.5, 0.75])[step], ('backbone',))
  params = {'backbone': {'w': jnp.array([8.0])}}
  state = teacher.init(params)
  seen = [float(state.teacher['backbone']['w'][0])]
  for change in (-4.0, 2.0, -4.0):
    updates, state = teacher.update({'backbone': {'w': jnp.array([change])}}, state, params)
    assert float(updates['backbone']['w'][0]) == change
    params = optax.apply_updates(params, updates)
    seen.append(float(state.teacher['backbone']['w'][0]))
  # 0 * 8 + 1 * 4; 0.5 * 4 + 0.5 * 6; 0.75 * 5 + 0.25 * 2.
  assert seen == [8.0, 4.0, 5.0, 4.25]
  assert int(state.count) == 3


def test_follows_the_student_that_the_whole_chain_makes():
  """Last in a chain it averages what the parameters become; its momentum is a cosine."""
  steps, momentum = 5, schedules.cosine(0.9, 1.0, 5)
  optimizer = optax.chain(optax.trace(0.5), optax.scale(-0.1), ema_teacher(momentum, ('head',)))
  params = {'head': jnp.array([1.0, -2.0]), 'other': jnp.array([3.0])}
  state = optimizer.init(params)
  student, velocity = np.array([1.0, -2.0]), np.zeros(2)
  expected = student.copy()
  update = jax.jit(optimizer.update)
  for step in range(steps):
    gradient = {'head': jnp.array([1.0 + step, -1.0]), 'other': jnp.array([1.0])}
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    velocity = 0.5 * velocity + np.array([1.0 + step, -1.0])
    student = student - 0.1 * velocity
    m = 1.0 - 0.1 * (1 + np.cos(np.pi * step / steps)) / 2
    expected = m * expected + (1 - m) * student
  found = optax.tree.get(state, 'teacher')
  assert set(found) == {'head'}
  np.testing.assert_allclose(params['head'], student, rtol=1e-6)
  np.testing.assert_allclose(found['head'], expected, rtol=1e-6)


def test_mirrors_the_named_parts_alone():
  params = {name: {'w': jnp.ones(2)} for name in ('backbone', 'projection', 'reconstruction')}
  state = ema_teacher(lambda _: 0.5, ('backbone', 'projection')).init(params)
  assert set(state.teacher) == {'backbone', 'projection'}


def test_starts_as_a_copy_and_not_an_alias():
  """One buffer in both trees would be donated twice by the training step."""
  params = {'backbone': {'w': jnp.arange(4.0)}}
  optimizer = optax.chain(optax.sgd(0.1), ema_teacher(lambda _: 0.5, ('backbone',)))
  state = optimizer.init(params)
  copy = optax.tree.get(state, 'teacher')['backbone']['w']
  np.testing.assert_array_equal(copy, params['backbone']['w'])
  assert copy.unsafe_buffer_pointer() != params['backbone']['w'].unsafe_buffer_pointer()

  def step(params, state):
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    return optax.apply_updates(params, updates), state

  params, state = jax.jit(step, donate_argnums=(0, 1))(params, state)
  np.testing.assert_allclose(params['backbone']['w'], np.arange(4.0) - 0.1, rtol=1e-6)
  teacher = optax.tree.get(state, 'teacher')['backbone']['w']
  np.testing.assert_allclose(teacher, np.arange(4.0) - 0.05, rtol=1e-6)


def test_averages_in_float32_whatever_the_students_type():
  params = {'backbone': jnp.ones(3, jnp.bfloat16)}
  teacher = ema_teacher(lambda _: 0.999, ('backbone',))
  state = teacher.init(params)
  for _ in range(2):
    updates = {'backbone': jnp.full(3, 1.0, jnp.bfloat16)}
    _, state = teacher.update(updates, state, params)
  # 1 + 0.001, then 0.999 * 1.001 + 0.001 * 2: both are 1 in bfloat16.
  assert state.teacher['backbone'].dtype == jnp.float32
  np.testing.assert_allclose(state.teacher['backbone'], 1.001999, rtol=1e-6)


def test_momentum_one_never_moves_and_zero_is_the_student():
  params = {'backbone': jnp.array([1.0, 2.0])}
  updates = {'backbone': jnp.array([0.25, 0.5])}
  for momentum, expected in ((1.0, [1.0, 2.0]), (0.0, [1.25, 2.5])):
    teacher = ema_teacher(lambda _, m=momentum: m, ('backbone',))
    _, state = teacher.update(updates, teacher.init(params), params)
    np.testing.assert_array_equal(state.teacher['backbone'], np.float32(expected))


def test_needs_the_parameters():
  teacher = ema_teacher(lambda _: 0.5, ('backbone',))
  params = {'backbone': jnp.ones(1)}
  state = teacher.init(params)
  assert isinstance(state, EmaTeacherState)
  with pytest.raises(ValueError, match='params'):
    teacher.update(params, state)
