"""Which image of a step is to blame, and which operation: what `folk_jax.replay` and `config.debug` say.

The images are run one by one on one device, with the draws they had in the step: draws are keyed on a sample's number,
not on its place. A loss over the whole batch, and BatchNorm, which looks at all its images, are something else for one
image: where none is to blame alone, the batch is looked at whole.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.objectives import Objective
from folk_jax.train import sharding
from folk_jax.train.origins import Origin, first_nonfinite
from folk_jax.train.state import TrainState, teacher_of


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What was found.

  Attributes:
    loss_B: each image's own loss, float32 [B].
    bad_B: whether its own loss or the gradient of it is not finite, bool [B].
    row: the row that `origin` is of; None for the whole batch.
    origin: the first operation whose result was not finite; None where all were finite.
  """

  loss_B: np.ndarray
  bad_B: np.ndarray
  row: int | None
  origin: Origin | None


def explain(
  objective: Objective, state: TrainState, batch: Mapping[str, Any], seed: int
) -> Explanation:
  """Runs a step's loss and gradient image by image, and that of the first bad one operation by operation.

  Args:
    objective: the method.
    state: before the step; its arrays must all be this process's.
    batch: the step's, whole.
    seed: of the run.
  """
  with jax.set_mesh(sharding.make_mesh(1, jax.local_devices()[:1])):
    state, batch = jax.tree.map(
      lambda leaf: jnp.asarray(jax.device_get(leaf)), (state, dict(batch))
    )
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(inputs, part):
      # One tree of inputs, so that each has a name.
      output = objective.loss(
        inputs['params'], inputs['teacher'], inputs['extra'], part, rng, state.step
      )
      return output.loss

    inputs = {'params': state.params, 'teacher': teacher_of(state), 'extra': state.extra}

    def loss_of(params, part):
      return loss(inputs | {'params': params}, part)

    @jax.jit
    def alone(part):
      value, gradient = jax.value_and_grad(loss_of)(state.params, part)
      norm = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
      return value, ~(jnp.isfinite(value) & jnp.isfinite(norm))

    def rows(start: int) -> dict[str, jax.Array]:
      return {name: array[start : start + 1] for name, array in batch.items()}

    found = [alone(rows(row)) for row in range(batch['index'].shape[0])]
    loss_B, bad_B = (np.asarray([one[i] for one in found]) for i in (0, 1))
    row = int(np.argmax(bad_B)) if bad_B.any() else None
    part = batch if row is None else rows(row)
    origin = first_nonfinite(lambda named: loss(named, part), inputs)
    if origin is None:
      gradient = jax.grad(lambda named: loss_of(named['params'], part))
      origin = first_nonfinite(gradient, {'params': state.params})
  return Explanation(loss_B, bad_B, row, origin)
