"""SGD against torch's, layer decay against MFM's numbers, and parameters that never move."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.interop import timm
from folk_jax.train.optimizer import OptimizerSettings, decay_mask, layer_scales, make_optimizer

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'layer_decay.json'
SETTINGS = OptimizerSettings(
  name='sgd',
  learning_rate=0.4,
  final_learning_rate=1e-3,
  warmup_epochs=1.0,
  schedule='timm',
  weight_decay=0.05,
  final_weight_decay=0.05,
  decay_exclude=(),
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  momentum=0.9,
  layer_decay=1.0,
  frozen=(),
  clip=0.0,
  clip_by='global',
  freeze_last_layer_epochs=0.0,
)
RUN = {'batch_size': 64, 'steps_per_epoch': 2.0, 'total_steps': 6}
PARAMS = {
  'backbone': {
    'blocks': {'bias': np.ones((2, 4), np.float32), 'fc': np.ones((2, 3, 4), np.float32)},
    'patch_embed': {'kernel': np.ones((5, 3), np.float32)},
    'pos_embed': np.ones((1, 5, 3), np.float32),
    'norm': np.ones(3, np.float32),
  },
  'head': {'kernel': np.ones((3, 2), np.float32), 'bias': np.ones(2, np.float32)},
}


def gradients(step: int):
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)


def trained(settings):
  """Parameters after the run's six steps, the optimiser's state, and the schedules."""
  optimizer, rates = make_optimizer(settings, **RUN)
  params = jax.tree.map(jnp.asarray, PARAMS)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for step in range(RUN['total_steps']):
    updates, state = update(gradients(step), state, params)
    params = optax.apply_updates(params, updates)
  return params, state, rates


def change(**fields):
  return dataclasses.replace(SETTINGS, **fields)


@pytest.mark.parity
@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_sgd_is_torchs(momentum):
  import torch

  found, _, rates = trained(change(momentum=momentum))
  tensors = [torch.tensor(leaf) for leaf in jax.tree.leaves(PARAMS)]
  groups = [
    {'params': [tensor], 'weight_decay': 0.05 * decays}
    for tensor, decays in zip(tensors, jax.tree.leaves(decay_mask(PARAMS)), strict=True)
  ]
  optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
  for step in range(RUN['total_steps']):
    for group in optimizer.param_groups:
      group['lr'] = float(rates['learning_rate'](step))
    for tensor, leaf in zip(tensors, jax.tree.leaves(gradients(step)), strict=True):
      tensor.grad = torch.tensor(leaf)
    optimizer.step()
  for leaf, tensor in zip(jax.tree.leaves(found), tensors, strict=True):
    np.testing.assert_allclose(leaf, tensor.numpy(), atol=2e-6)  # six float32 steps near 1


def test_sgd_by_hand():
  """Two parameters at 1 under gradients of 1, momentum 1/2, decay 1/10 of the kernel alone; rate 0, then 1/10."""
  settings = change(learning_rate=0.8, momentum=0.5, weight_decay=0.1, final_weight_decay=0.1)
  optimizer, rates = make_optimizer(settings, **RUN)
  params = {'head': {'kernel': jnp.ones((1, 1)), 'bias': jnp.ones(1)}}
  state, gradient = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
  for step in range(2):
    assert rates['learning_rate'](step) == pytest.approx(0.1 * step)
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  # Momentum holds 1 + 1/2 for the bias and 1.1 + 0.55 for the kernel.
  np.testing.assert_allclose(params['head']['bias'], 1 - 0.15, rtol=1e-6)
  np.testing.assert_allclose(params['head']['kernel'], 1 - 0.165, rtol=1e-6)


@pytest.mark.parametrize('decay', ['0.65', '0.75', '0.8'])
def test_layer_scales_are_the_references(decay):
  """By timm's names, for a ViT of 12 blocks; and so is what weight decay spares."""
  golden = json.loads(GOLDEN.read_text())
  backbone = models.make_backbone('vit', 16, width=8, depth=12, heads=2, patch=8)
  params = backbone.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))['params']
  tree = {'backbone': params, 'head': {'kernel': jnp.ones((8, 2)), 'bias': jnp.ones(2)}}
  scales = layer_scales(tree, float(decay))
  spread = jax.tree.map(lambda s, x: np.broadcast_to(s, x.shape), scales, tree)
  found = timm.to_timm(spread['backbone'], {})
  expected = {name: row for name, row in golden['timm_vit'].items() if 'head' not in name}
  assert set(found) == set(expected)
  for name, row in expected.items():
    scale = golden['decay'][decay]['scales'][row['layer_id']]
    np.testing.assert_allclose(found[name], scale, rtol=1e-6, err_msg=name)  # float32
  assert set(map(float, jax.tree.leaves(scales['head']))) == {1.0}
  mask = jax.tree.map(
    lambda d, x: np.full(x.shape, d), decay_mask(params, ('cls_token', 'pos_embed')), params
  )
  for name, decayed in timm.to_timm(mask, {}).items():
    assert np.all(decayed == expected[name]['wd']), name


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_layer_decay_scales_what_a_step_adds(name):
  """After one step every leaf has moved by its layer's factor of what it moves without, weight decay included."""
  settings = change(name=name, warmup_epochs=0.0)
  moved = []
  for decay in (1.0, 0.5):
    optimizer, _ = make_optimizer(dataclasses.replace(settings, layer_decay=decay), **RUN)
    updates, _ = jax.jit(optimizer.update)(gradients(0), optimizer.init(PARAMS), PARAMS)
    moved.append(jax.device_get(updates))
  plain, scaled = moved
  # Two blocks: 1/2 for the last, 1/4 for the first, 1/8 for what comes before; powers of 2 are exact.
  for where, factor in (('patch_embed', 1 / 8), ('pos_embed', 1 / 8), ('norm', 1.0)):
    jax.tree.map(
      lambda a, b, factor=factor: np.testing.assert_array_equal(a, factor * b),
      scaled['backbone'][where],
      plain['backbone'][where],
    )
  for leaf in ('bias', 'fc'):
    for block, factor in ((0, 1 / 4), (1, 1 / 2)):
      np.testing.assert_array_equal(
        scaled['backbone']['blocks'][leaf][block],
        factor * plain['backbone']['blocks'][leaf][block],
      )
  jax.tree.map(np.testing.assert_array_equal, scaled['head'], plain['head'])
  assert all(np.any(leaf) for leaf in jax.tree.leaves(scaled))


def test_no_layer_decay_changes_nothing():
  plain = make_optimizer(change(name='adamw'), **RUN)[0].init(PARAMS)
  names = {type(link).__name__ for link in plain}
  assert names == {'PartitionState'} and set(plain[0].inner_states) == {'now', 'late'}


@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_what_is_frozen_never_moves_and_has_no_moments(name):
  params, state, _ = trained(change(name=name, frozen=('backbone',)))
  jax.tree.map(np.testing.assert_array_equal, params['backbone'], PARAMS['backbone'])
  free, _, _ = trained(change(name=name))
  jax.tree.map(np.testing.assert_array_equal, params['head'], free['head'])
  assert np.any(params['head']['kernel'] != 1)
  shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
  assert shapes == {(), (3, 2), (2,)}  # counts, and moments of the head


def test_a_clip_of_the_norm_does_not_count_what_is_frozen():
  """The head alone, its gradient clipped to 1, against the same with a backbone of 1,000 times the gradient."""
  head = {'head': PARAMS['head']}
  gradient = gradients(0)
  gradient['backbone'] = jax.tree.map(lambda g: 1000 * g, gradient['backbone'])
  settings = change(clip=1.0, warmup_epochs=0.0, weight_decay=0.0, final_weight_decay=0.0)
  alone, _ = make_optimizer(settings, **RUN)
  expected, _ = alone.update({'head': gradient['head']}, alone.init(head), head)
  both, _ = make_optimizer(dataclasses.replace(settings, frozen=('backbone',)), **RUN)
  found, _ = both.update(gradient, both.init(PARAMS), PARAMS)
  jax.tree.map(np.testing.assert_array_equal, found['head'], expected['head'])
  # At a rate of 0.1 the clipped gradient of norm 1 is a step of 0.1.
  assert optax.tree.norm(found) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'name': 'lion'}, "unknown config.optimizer.name 'lion'. Known: adamw, sgd."),
    ({'layer_decay': 0.0}, 'layer_decay 0.0 must lie in (0, 1]; 1.0 is none.'),
    ({'layer_decay': 1.5}, 'layer_decay 1.5 must lie in (0, 1]'),
    ({'momentum': 1.0}, 'momentum 1.0 must lie in [0, 1).'),
    ({'frozen': ('head', 'neck')}, "frozen 'neck'. Known: backbone, head."),
  ],
)
def test_what_makes_no_sense_is_refused(fields, words):
  with pytest.raises(UserError) as refused:
    make_optimizer(change(**fields), **RUN)[0].init(PARAMS)
  assert words in str(refused.value)


def test_layer_decay_refuses_a_resnet():
  backbone = models.make_backbone('resnet', 32, depth=10, width=8)
  params = backbone.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  optimizer, _ = make_optimizer(change(layer_decay=0.8), **RUN)
  with pytest.raises(UserError, match=r'layer_decay 0.8 needs a ViT.*set it to 1\.0'):
    optimizer.init({'backbone': params})
