"""One optimiser step: microbatches, gradients, the optax chain (teacher last), metrics.

A step whose loss, gradient or next `extra` isn't finite is skipped inside the compiled program: parameters, optimiser,
teacher and `extra` stay as they were, bit for bit, and the run's step goes on, which the data, the random draws and the
schedules are functions of. On CPUs and TPUs it is a branch and not a choice value by value, which would keep both
values of every moment and parameter and pass over them once more (10 % more temporary memory and 2 % more bytes for
ViT-S on a CPU). On GPUs it is the choice: XLA's runtime there brings a branch's condition to the host and waits for it,
by its source, so that nothing of the next step could be launched before this one's gradient is there. That hasn't been
measured yet.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from folk_jax.objectives import LossOutput, Objective
from folk_jax.train.optimizer import without_update
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
    The step. Its metrics are float32 scalars: the objective's; `gradient_norm`, and `gradient_norm_<name>` of each
    tree of the parameters; and `nonfinite`, 1 where the step was skipped because its loss, its gradient (whose squares
    must be finite in sum, too) or the objective's next state isn't finite.
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
      norms = {name: optax.tree.norm(tree) for name, tree in gradient.items()}
      norm = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()))
      finite = jnp.isfinite(norm) & jnp.isfinite(output.loss)
      # The objective's state is small: a variance may overflow where the loss doesn't.
      for leaf in jax.tree.leaves(output.extra):
        finite &= jnp.all(jnp.isfinite(leaf))

      def update():
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state, output.extra

      def skip():
        _, moved = optimizer.update(gradient, state.opt_state, state.params)
        return state.params, without_update(state.opt_state, moved), state.extra

      def branch():
        return jax.lax.cond(finite, update, skip)

      def choose():
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(), skip())

      # Decided when it is compiled: a platform's program has one of the two.
      params, opt_state, extra = jax.lax.platform_dependent(
        cuda=choose, rocm=choose, default=branch
      )
    metrics = output.metrics | {
      'gradient_norm': norm,
      **{f'gradient_norm_{name}': value for name, value in norms.items()},
      'nonfinite': 1.0 - finite.astype(jnp.float32),
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      extra=extra,
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
