"""One optimiser step: microbatches, gradients, the optax chain (teacher last), metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from folk_jax.objectives import LossOutput, Objective
from folk_jax.train.state import TrainState, teacher_of

Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
  objective: Objective, optimizer: optax.GradientTransformation, *, seed: int, accumulate: int = 1
) -> Step:
  """The pure function (state, batch) -> (state, metrics); the loop compiles it with shardings and donated state.

  Args:
    objective: gives the loss of a batch.
    optimizer: the whole chain.
    seed: of the run; the step's key is (seed, step) and a sample's draws are keyed on its number, so that they don't
      depend on hosts, devices or microbatches.
    accumulate: microbatches a step; each spreads over all devices.

  Returns:
    The step. Its metrics are float32 scalars: the objective's, `gradient_norm` and `nonfinite` (1 where the loss or
    the gradient's norm isn't finite).
  """

  def step(
    state: TrainState, batch: dict[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    teacher = teacher_of(state)

    def loss(params, part):
      output = objective.loss(params, teacher, state.extra, part, rng, state.step)
      return output.loss, output

    gradient, output = accumulated(jax.grad(loss, has_aux=True), state.params, batch, accumulate)
    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(output.loss)
    metrics = output.metrics | {
      'gradient_norm': norm,
      'nonfinite': 1.0 - finite.astype(jnp.float32),
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      extra=output.extra,
    )
    return state, metrics

  return step


def accumulated(
  gradient: Callable[[Any, Any], tuple[Any, LossOutput]], params: Any, batch: Any, accumulate: int
) -> tuple[Any, LossOutput]:
  """The mean of `gradient(params, microbatch)` over `accumulate` interleaved microbatches, one after the other.

  Microbatch a takes the samples a, a + accumulate, ...: each device's contiguous rows give their share to every
  microbatch, so that none moves between devices.
  """
  if accumulate == 1:
    return gradient(params, batch)
  parts = jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1),
    batch,
  )

  def add(total, part):
    return jax.tree.map(jnp.add, total, gradient(params, part)), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first)
  )
  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / accumulate, total)
