"""One step of FOLK on one device and on eight CPU devices, as JSON on the last line."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from folk_jax import config as config_lib
from folk_jax.train import loop, run, sharding
from folk_jax.train import state as state_lib

BATCH, SIZE = 32, 16
# Small models have no leaf that is worth sharding; this spreads most of them.
sharding._SHARD_FROM = 2**8


def make_config(accumulate: int):
  c = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  c.batch_size, c.image_size, c.accumulate = BATCH, SIZE, accumulate
  c.model.update({'width': 24, 'heads': 2, 'drop_path': 0.3})
  c.projection.update({'hidden': 32, 'bottleneck': 16, 'outputs': 24})
  c.objective.patch_weight = 0.5
  # Adam's first moment is then a tenth of the gradient, for every parameter.
  c.optimizer.update({'clip': 0.0, 'freeze_last_layer_epochs': 0.0, 'warmup_epochs': 0.0})
  for view in (c.views.view_1, c.views.view_2):
    view.blur_sigma = (0.1, 0.5)  # five taps instead of thirteen to compile
  return c


def make_batch():
  rng = np.random.default_rng(0)
  return {
    'views': rng.integers(0, 256, (BATCH, 2, SIZE, SIZE, 3), dtype=np.uint8),
    'label': np.zeros(BATCH, np.int32),
    'index': rng.permutation(1000)[:BATCH],
    'valid': np.ones(BATCH, bool),
  }


def make_state(made):
  """A state in which student and teacher differ and no parameter or centre is zero."""
  state = jax.jit(made.new_state)(jax.random.key(0), {})
  rng = np.random.default_rng(1)

  def perturb(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return np.asarray(x)
    return np.float32(x + 0.05 * rng.normal(size=x.shape))

  teacher = jax.tree.map(perturb, state_lib.teacher_of(state))
  return jax.tree.map(np.asarray, state).replace(
    params=jax.tree.map(perturb, state.params),
    extra=jax.tree.map(perturb, state.extra),
    opt_state=optax.tree.set(jax.tree.map(np.asarray, state.opt_state), teacher=teacher),
  )


def gradient_of(state):
  """The step's gradient by name, from Adam's first moments; key biases by themselves."""
  gradient = {}
  for _, tree in optax.tree.get_all_with_path(state.opt_state, 'mu'):
    for path, leaf in jax.tree.leaves_with_path(tree):
      gradient[jax.tree_util.keystr(path, simple=True, separator='/')] = np.asarray(leaf) / 0.1
  keys = {}
  for name in [name for name in gradient if name.endswith('qkv/bias')]:
    query, keys[name], value = np.split(gradient.pop(name), 3, axis=-1)
    gradient |= {f'{name}/query': query, f'{name}/value': value}
  return gradient, keys


def error(found, expected) -> float:
  """The largest difference over the largest value."""
  found, expected = np.asarray(found), np.asarray(expected)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def collectives(hlo: str):
  """(operation, elements of its largest result) of what moves data, and how many all-reduces."""
  moved, all_reduces = [], 0
  for line in hlo.splitlines():
    match = re.search(
      r'= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(-start)?\(',
      line,
    )
    if match is None:
      continue
    if match[2] in ('all-reduce', 'reduce-scatter'):
      all_reduces += 1
      continue
    shapes = re.findall(r'\w+\[([\d,]*)\]', match[1])
    moved.append((match[2], max(math.prod(int(n) for n in s.split(',') if n) for s in shapes)))
  return moved, all_reduces


def one_step(state, devices: int, fsdp: int, accumulate: int):
  made = run.make_run(make_config(accumulate), 256)
  mesh = jax.make_mesh(
    (devices // fsdp, fsdp),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:devices],
  )
  with jax.set_mesh(mesh):
    shardings = sharding.state_shardings(state, mesh)
    state, batch = jax.device_put(state, shardings), sharding.put_batch(make_batch(), mesh)
    step = loop.compile_step(made, state, mesh).lower(state, batch).compile()
    state, metrics = step(state, batch)
  moved, all_reduces = collectives(step.as_text())
  result = {
    'losses': {k: float(v) for k, v in metrics.items() if k.startswith('loss')},
    'moved': moved,
    'all_reduces': all_reduces,
    'sharded_leaves': sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)),
  }
  return result, jax.device_get(state)


def main():
  results = {'pixels_per_device': BATCH * 2 * SIZE**2 * 3 // 8}
  start = make_state(run.make_run(make_config(1), 256))
  results['1 device'], reference = one_step(start, 1, 1, 1)
  expected, keys = gradient_of(reference)
  results['1 device']['key_bias_share'] = max(
    float(np.abs(key).max() / np.abs(expected[f'{name}/value']).max()) for name, key in keys.items()
  )
  for name, layout in {
    '8 devices': (8, 1, 1),
    '8 devices, fsdp 4, accumulate 2': (8, 4, 2),
  }.items():
    results[name], state = one_step(start, *layout)
    found, _ = gradient_of(state)
    results[name] |= {
      'gradient_errors': {key: error(found[key], expected[key]) for key in expected},
      'centre_error': max(jax.tree.leaves(jax.tree.map(error, state.extra, reference.extra))),
      'teacher_error': max(
        jax.tree.leaves(
          jax.tree.map(error, state_lib.teacher_of(state), state_lib.teacher_of(reference))
        )
      ),
    }
  print(json.dumps(results))


if __name__ == '__main__':
  main()
