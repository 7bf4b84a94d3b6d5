"""Every method's own recipe, made small, with a state in which no parameter is zero; and, run as a script, one
gradient of each on one device and on eight, as JSON on the last line.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax import config as config_lib
from folk_jax.train import run, sharding
from folk_jax.train import state as state_lib

# Name -> recipe and arguments.
RECIPES = {
  'folk': ('vit_b.py', 'smoke'),
  'folk_resnet': ('resnet50.py', 'smoke'),
  'mfm': ('mfm.py', 'smoke'),
  'mfm_resnet': ('mfm.py', 'model=resnet50,smoke'),
  'super_resolution': ('restoration.py', 'task=super_resolution,smoke'),
  'deblur': ('restoration.py', 'task=deblur,smoke'),
  'denoise': ('restoration.py', 'task=denoise,smoke'),
  'wavelet_mim': ('wavelet_mim.py', 'smoke'),
  'mae': ('mae.py', 'smoke'),
  'dino': ('dino.py', 'local_crops=2,smoke'),
  'ibot': ('ibot.py', 'local_crops=2,smoke'),
  'supervised': ('finetune.py', 'smoke'),
  'linear_probe': ('linear.py', 'smoke'),
  'segment': ('camvid.py', 'head=upernet,smoke'),
}
IMAGES, CLASSES = 256, 10
RNG, STEP = jax.random.key(7), 3


def make_config(name: str, **model):
  """A smoke recipe with everything that may act switched on; it compiles in seconds."""
  file, arg = RECIPES[name]
  c = config_lib.load_recipe(f'configs/{file}', arg)
  if c.model.name == 'vit':
    c.model.update({'width': 24, 'heads': 2, 'drop_path': 0.3})
  c.model.update(model)
  if 'projection' in c:
    c.projection.update({'hidden': 32, 'bottleneck': 16, 'outputs': 24})
  c.optimizer.update({'warmup_epochs': 0.0, 'freeze_last_layer_epochs': 0.0})
  for view in c.views.values():
    view.blur_sigma = (0.1, 0.5)  # five taps instead of thirteen to compile
  if 'local_views' in c:
    c.local_views.blur_sigma = (0.1, 0.5)
  return c


def make_batch(config, size: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  side, views = config.image_size, len(config.views)
  batch = {
    'views': rng.integers(0, 256, (size, views, side, side, 3), dtype=np.uint8),
    'label': rng.integers(0, CLASSES, size, dtype=np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }
  if 'masks' in config.data:
    shape = (size, 1, side, side)
    batch['mask'] = rng.integers(0, config.data.masks.classes + 1, shape, dtype=np.uint8)
  if 'local_views' in config:
    local = config.local_views
    shape = (size, local.count, local.size, local.size, 3)
    batch['local_views'] = rng.integers(0, 256, shape, dtype=np.uint8)
  return batch


def perturbed(tree, seed: int):
  """Away from zero biases, unit gains and a teacher that equals the student; variances stay positive."""
  rng = np.random.default_rng(seed)

  def move(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return np.asarray(x)
    return np.float32(
      np.abs(x + 0.05 * rng.normal(size=x.shape))
      if np.all(x == 1)
      else x + 0.05 * rng.normal(size=x.shape)
    )

  return jax.tree.map(move, tree)


def make_state(made):
  """Student parameters, teacher (or None) and extra of a run."""
  state = jax.jit(made.new_state)(jax.random.key(0), {})
  teacher = state_lib.teacher_of(state)
  return (
    perturbed(state.params, 1),
    None if teacher is None else perturbed(teacher, 2),
    perturbed(state.extra, 3),
  )


def loss_and_gradients(objective):
  """(params, teacher, extra, batch) -> (gradients of params and of teacher, LossOutput)."""

  def loss(params, teacher, extra, batch):
    output = objective.loss(params, teacher, extra, batch, RNG, jnp.int32(STEP))
    return output.loss, output

  return jax.grad(loss, argnums=(0, 1), has_aux=True)


def named(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def without_key_biases(gradients):
  """Attention doesn't see a vector that is added to all keys: only rounding is left there."""
  kept = {}
  for name, leaf in gradients.items():
    if name.endswith('qkv/bias'):
      query, key, value = np.split(leaf, 3, axis=-1)
      # Equal where the backbone is frozen: all are 0.
      assert np.abs(key).max() <= 1e-4 * max(np.abs(value).max(), np.abs(query).max()), name
      leaf = np.concatenate([query, value], axis=-1)
    kept[name] = leaf
  return kept


def _gap(found, expected) -> float:
  """The largest difference of any leaf, over the largest value of that leaf."""
  return max(
    float(np.abs(found[name] - leaf).max() / max(np.abs(leaf).max(), 1e-6))
    for name, leaf in expected.items()
  )


def main():
  results = {}
  for name in RECIPES:
    config = make_config(name)
    made = run.make_run(config, IMAGES, CLASSES)
    state, batch = make_state(made), make_batch(config, 16)
    gradients = loss_and_gradients(made.objective)
    found = {}
    for devices in (1, 8):
      mesh = jax.make_mesh(
        (devices, 1),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
      )
      with jax.set_mesh(mesh):
        placed = jax.device_put(state, sharding.replicated(mesh))
        (student, _), output = jax.jit(gradients)(*placed, sharding.put_batch(batch, mesh))
        found[devices] = (
          float(output.loss),
          without_key_biases(named(jax.device_get(student))),
          named(jax.device_get(output.extra)),
        )
    results[name] = {
      'loss': abs(found[8][0] / found[1][0] - 1),
      'gradient': _gap(found[8][1], found[1][1]),
      'extra': _gap(found[8][2], found[1][2]) if found[1][2] else 0.0,
    }
  print(json.dumps(results))


if __name__ == '__main__':
  main()
