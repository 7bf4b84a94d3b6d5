"""A ResNet's training pass on one device and on eight CPU devices, in float64, as JSON on the last line."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax import models
from folk_jax.models import resnet
from folk_jax.train import sharding

jax.config.update('jax_enable_x64', True)
BATCH, SIZE = 16, 32


class Float64(resnet.ResNet):
  """The same network in float64, which users are refused."""

  def check(self):
    pass


def make_variables(model, image):
  """Random parameters and statistics: none at an initial 0 or 1."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)

  def draw(path, leaf):
    if leaf.ndim > 1:
      return rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    return rng.uniform(0.5, 1.5, leaf.shape)

  drawn = jax.tree.map_with_path(draw, shapes)
  return drawn['params'], drawn['batch_stats']


def make_step(model, statistics):
  def energy(params, image):
    output, after = models.encode(model, params, statistics, image, train=True)
    return jnp.mean(jnp.sin(output.patches)), (output.patches, after)

  gradient = jax.value_and_grad(energy, argnums=(0, 1), has_aux=True)

  def step(params, image):
    (_, (output, after)), (by_params, by_image) = gradient(params, image)
    return {
      'output': output,
      'statistics': after,
      'gradient': by_params,
      'image_gradient': by_image,
    }

  return step


def error(found, expected) -> float:
  """The largest difference over the largest value, of the worst leaf."""
  return max(
    float(np.abs(a - b).max() / np.abs(b).max())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  )


def main():
  image = np.random.default_rng(0).normal(size=(BATCH, SIZE, SIZE, 3))
  model = Float64(SIZE, depth=10, width=4, dtype='float64')
  params, statistics = make_variables(model, image)
  step = make_step(model, statistics)
  expected = jax.device_get(jax.jit(step)(params, image))

  mesh = sharding.make_mesh()
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  out = {'output': rows, 'statistics': whole, 'gradient': whole, 'image_gradient': rows}
  compiled = jax.jit(step, in_shardings=(whole, rows), out_shardings=out)
  compiled = compiled.lower(params, image).compile()
  found = compiled(jax.device_put(params, whole), jax.device_put(image, rows))
  hlo = compiled.as_text()
  share = jax.jit(step)(params, image[: BATCH // 8])['output']
  print(
    json.dumps(
      {
        'errors': {name: error(jax.device_get(found[name]), expected[name]) for name in expected},
        'per_device_norm_error': error(jax.device_get(share), expected['output'][: BATCH // 8]),
        'all_reduces': len(re.findall(r' all-reduce(?:-start)?\(', hlo)),
        'moved': re.findall(r' (all-gather|all-to-all|collective-permute)(?:-start)?\(', hlo),
      }
    )
  )


if __name__ == '__main__':
  main()
