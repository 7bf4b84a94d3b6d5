"""The step on an objective small enough to work by hand: keys, microbatches, metrics, teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folk_jax.objectives import LossOutput
from folk_jax.objectives.base import sample_keys
from folk_jax.train import state as state_lib
from folk_jax.train.step import accumulated, make_train_step
from folk_jax.train.teacher import ema_teacher


@dataclasses.dataclass(frozen=True)
class Line:
  """Loss mean((w * x - teacher)^2) / 2; the centre follows the mean of x; reports a draw a sample."""

  teacher_parts: tuple[str, ...] = ('backbone',)

  def init(self, rng, batch):
    return {'backbone': jnp.array([2.0]), 'head': jnp.array([1.0])}, {'centre': jnp.zeros(())}

  def loss(self, params, teacher, extra, batch, rng, step):
    x_B = batch['views'][:, 0]
    loss = jnp.mean((params['backbone'] * x_B - teacher['backbone']) ** 2) / 2
    draw = jnp.mean(jax.vmap(jax.random.uniform)(sample_keys(rng, batch['index'], 0)))
    centre = 0.5 * extra['centre'] + 0.5 * jnp.mean(x_B)
    return LossOutput(loss, {'loss': loss, 'draw': draw, 'step': step * 1.0}, {'centre': centre})


X = [1.0, 2.0, 3.0, 6.0]


def batch_of(values, index=None):
  index = range(len(values)) if index is None else index
  return {'views': jnp.array(values)[:, None], 'index': jnp.array(list(index), jnp.int32)}


def start(rate: float = 0.1, momentum: float = 0.75, accumulate: int = 1, seed: int = 0):
  objective = Line()
  optimizer = optax.chain(optax.sgd(rate), ema_teacher(lambda _: momentum, objective.teacher_parts))
  state = state_lib.create(*objective.init(None, None), optimizer)
  return state, jax.jit(make_train_step(objective, optimizer, seed=seed, accumulate=accumulate))


@pytest.mark.parametrize('accumulate', [1, 2, 4])
def test_one_step_by_hand(accumulate):
  """w = t = 2 and x = 1, 2, 3, 6: the residuals w x - t are 0, 2, 4, 10."""
  state, step = start(accumulate=accumulate)
  state, metrics = step(state, batch_of(X))
  assert metrics['loss'] == pytest.approx((0 + 4 + 16 + 100) / 8)
  gradient = (0 * 1 + 2 * 2 + 4 * 3 + 10 * 6) / 4
  assert metrics['gradient_norm'] == pytest.approx(gradient)
  assert metrics['nonfinite'] == 0
  assert int(state.step) == 1
  np.testing.assert_allclose(state.params['backbone'], 2 - 0.1 * gradient, rtol=1e-6)
  assert state.params['head'] == 1
  # Once a step, whatever the number of microbatches: 0.75 * 2 + 0.25 * w; the centre half of 3.
  teacher = state_lib.teacher_of(state)
  assert set(teacher) == {'backbone'}
  np.testing.assert_allclose(teacher['backbone'], 1.5 + 0.25 * (2 - 0.1 * gradient), rtol=1e-6)
  assert int(optax.tree.get(state.opt_state, 'count')) == 1
  np.testing.assert_allclose(state.extra['centre'], 1.5, rtol=1e-6)


def test_draws_do_not_depend_on_microbatches():
  draws = []
  for accumulate in (1, 2, 4):
    state, step = start(accumulate=accumulate)
    draws.append(float(step(state, batch_of(X))[1]['draw']))
  np.testing.assert_allclose(draws, draws[0], rtol=1e-6)


def test_draws_depend_on_seed_step_and_sample():
  state, step = start()
  once, metrics = step(state, batch_of(X))
  draws = [metrics['draw'], step(once, batch_of(X))[1]['draw']]
  draws.append(step(state, batch_of(X, index=range(4, 8)))[1]['draw'])
  state, other = start(seed=1)
  draws.append(other(state, batch_of(X))[1]['draw'])
  assert len({float(draw) for draw in draws}) == 4
  assert step(once, batch_of(X))[1]['step'] == 1


def test_microbatches_are_interleaved():
  """Sample i goes to microbatch i mod 3: a device's contiguous rows are spread over all of them."""
  seen = []

  def gradient(params, part):
    jax.debug.callback(lambda rows: seen.append(rows.tolist()), part['x'], ordered=True)
    return params * jnp.mean(part['x']), LossOutput(jnp.mean(part['x']), {}, {})

  slope, output = jax.jit(lambda x: accumulated(gradient, jnp.ones(()), {'x': x}, 3))(
    jnp.arange(6.0)
  )
  jax.effects_barrier()
  assert seen == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
  assert slope == output.loss == 2.5


@pytest.mark.parametrize('value', [np.nan, np.inf, 3e38])
def test_numbers_that_are_not_finite_are_reported(value):
  """3e38 squared overflows in the loss alone."""
  state, step = start()
  _, metrics = step(state, batch_of([1.0, value]))
  assert metrics['nonfinite'] == 1


def test_weights_are_the_teachers_where_it_has_them():
  state, step = start(momentum=1.0)
  state, _ = step(state, batch_of(X))
  teacher, student = (state_lib.weights(state, which) for which in ('teacher', 'student'))
  assert teacher['backbone'] == 2 and student['backbone'] != 2
  assert teacher['head'] is student['head'] is state.params['head']


def test_a_run_without_a_teacher_has_none():
  state = state_lib.create({'backbone': jnp.ones(1)}, {}, optax.sgd(0.1))
  assert state_lib.teacher_of(state) is None
  assert state_lib.weights(state, 'teacher') == state.params
