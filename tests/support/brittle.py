"""A method for tests of faults: it looks at images linearly, and some of them, by number, divide by zero.

The faults are real arithmetic: image `bad` has a distance of 0 that the loss divides by. Shape letters: B images, D
features, K outputs.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from folk_jax.objectives.base import LossOutput, Parts, count_valid
from folk_jax.objectives.statistics import feature_statistics

WIDTH = 8


@dataclasses.dataclass(frozen=True)
class Brittle:
  """A student follows a teacher's features of the same image; its centre follows the teacher's mean.

  Attributes:
    parts: as every objective's.
    bad: numbers of the images whose loss is not finite.
    loud: numbers of the images whose loss counts a thousandfold.
    outputs: K, of the last layer.
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit',)
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone', 'projection')

  parts: Parts
  bad: tuple[int, ...]
  loud: tuple[int, ...]
  outputs: int

  def init(self, rng: jax.Array, batch: Any) -> tuple[dict[str, Any], Any]:
    """Two layers, and a centre of zeros."""
    del batch
    first, second = jax.random.split(rng)
    params = {
      'backbone': {'kernel': jax.random.normal(first, (3, WIDTH)), 'bias': jnp.zeros(WIDTH)},
      'projection': {'last_layer': {'kernel': jax.random.normal(second, (WIDTH, self.outputs))}},
    }
    return params, {'centre': jnp.zeros(self.outputs)}

  def loss(self, params, teacher, extra, batch, rng, step) -> LossOutput:
    """See `Objective.loss`."""
    del rng, step
    index_B = batch['index']
    image_B3 = batch['views'][:, 0].astype(jnp.float32).mean(axis=(1, 2)) / 255.0
    with jax.named_scope('student'):
      student_BD, student_BK = _outputs(params, image_B3)
    _, teacher_BK = _outputs(teacher, image_B3)
    distance_B = jnp.mean((student_BK - teacher_BK + extra['centre'] + 0.5) ** 2, axis=1)
    with jax.named_scope('weighing'):
      # 0 / 0 for those images, as a normalisation by a spread that vanishes would have it.
      weight_B = jnp.where(_are_among(index_B, self.bad), 0.0, 1.0)
      times_B = jnp.where(_are_among(index_B, self.loud), 1000.0, 1.0)
      loss = jnp.mean(times_B * distance_B * weight_B / weight_B)
    centre = 0.9 * extra['centre'] + 0.1 * jnp.mean(teacher_BK, axis=0)
    metrics = {'loss': loss, 'loss_distance': loss} | feature_statistics(student_BD)
    return LossOutput(loss, metrics, {'centre': jax.lax.stop_gradient(centre)})

  def evaluate(self, params, teacher, extra, batch, rng) -> dict[str, jax.Array]:
    """See `Objective.evaluate`."""
    del params, teacher, extra, rng
    return count_valid(batch)


def _are_among(index_B: jax.Array, numbers: tuple[int, ...]) -> jax.Array:
  return jnp.any(index_B[:, None] == jnp.asarray(numbers, jnp.int32), axis=1)


def _outputs(params: Any, image_B3: jax.Array) -> tuple[jax.Array, jax.Array]:
  feature_BD = jax.nn.gelu(image_B3 @ params['backbone']['kernel'] + params['backbone']['bias'])
  return feature_BD, feature_BD @ params['projection']['last_layer']['kernel']


def make_config(
  config: Any, bad: tuple[int, ...] = (), loud: tuple[int, ...] = (), **changes: Any
) -> Any:
  """The smoke recipe `config` as a run of this method in a second: 12 steps of 8 of 40 synthetic images."""
  with config.unlocked():
    config.objective = type(config)({'name': 'brittle', 'bad': bad, 'loud': loud, 'outputs': 16})
  config.update_from_flattened_dict(
    {
      'image_size': 16,
      'batch_size': 8,
      'total_steps': 12,
      'data.source': 'synthetic',
      'data.limit': 40,
      'data.test_resize': 0,
      'optimizer.learning_rate': 1e-2,
      'optimizer.freeze_last_layer_epochs': 0.4,
      'evaluation.knn': (),
      'evaluation.held_out_images': 1,
      'evaluation.at_start': False,
      'checkpoint.every': 4,
      'checkpoint.keep': 4,
      'logging.tensorboard': False,
      'logging.progress': False,
      'compilation_cache': '',
    }
    | changes
  )
  return config
