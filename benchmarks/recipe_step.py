"""A recipe's compiled train step on a batch of noise that lies on the devices: what step.py and scaling.py time."""

import time
from typing import Any

import jax
import ml_collections
import numpy as np
import report

from folk_jax.config import load_recipe
from folk_jax.train import loop, sharding
from folk_jax.train.run import make_run

IMAGENET = 1_281_167  # images of an epoch: the schedules' length
CLASSES = 1000
_WARM_UP = 3


def load(recipe: str) -> ml_collections.ConfigDict:
  """`configs/x.py:argument`, with the schedules of a long run that nobody waits for."""
  path, _, argument = recipe.partition(':')
  config = load_recipe(str(report.ROOT / path), argument or None)
  config.epochs, config.total_steps = 300, 0
  return config


def compiled(config: ml_collections.ConfigDict) -> tuple[Any, Any, dict[str, jax.Array], float]:
  """The step for all devices, its state, a batch, and the seconds that compiling took."""
  mesh, side = sharding.make_mesh(), config.image_size
  shape = (config.batch_size, len(config.views), side, side, 3)
  rows = {
    'views': np.random.default_rng(0).integers(0, 256, shape, np.uint8),
    'label': np.zeros(config.batch_size, np.int32),
    'index': np.arange(config.batch_size),
    'valid': np.ones(config.batch_size, bool),
  }
  with jax.set_mesh(mesh):
    run = make_run(config, IMAGENET, CLASSES)
    shapes = jax.eval_shape(run.new_state, jax.random.key(0), {})
    shardings = sharding.state_shardings(shapes, mesh)
    state = jax.jit(run.new_state, out_shardings=shardings)(jax.random.key(0), {})
    batch = sharding.put_batch(rows, mesh)
    began = time.perf_counter()
    step = loop.compile_step(run, state, mesh).lower(state, batch).compile()
  return step, state, batch, time.perf_counter() - began


def seconds_a_step(step: Any, state: Any, batch: Any, steps: int) -> tuple[float, dict[str, Any]]:
  """Over `steps` steps after a few that don't count; and the last one's metrics."""
  for _ in range(_WARM_UP):
    state, metrics = step(state, batch)
  jax.block_until_ready(state)
  began = time.perf_counter()
  for _ in range(steps):
    state, metrics = step(state, batch)
  jax.block_until_ready(state)
  return (time.perf_counter() - began) / steps, metrics
