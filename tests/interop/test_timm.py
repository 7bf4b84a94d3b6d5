"""timm's names: a bijection with our tree, refusals that name what doesn't fit, and timm's own features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.interop import timm as interop

FIELDS = {'width': 24, 'depth': 2, 'heads': 3, 'patch': 4}


def random_backbone(image_size, seed=0, **fields):
  """A ViT with parameters of which none is at its (often zero) initial value."""
  module = models.make_backbone('vit', image_size, **{**FIELDS, **fields})
  size = (image_size, image_size) if isinstance(image_size, int) else image_size
  template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size, 3)))['params']
  rng = np.random.default_rng(seed)
  draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32)
  return module, jax.tree.map(draw, template)


@pytest.mark.parametrize('layer_scale', [None, 0.1])
def test_there_and_back_is_exact(layer_scale):
  module, params = random_backbone(16, layer_scale=layer_scale)
  state = interop.to_timm(params)
  back = interop.from_timm(state, params, grid=module.grid)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert ('blocks.1.ls1.gamma' in state) == (layer_scale is not None)
  assert sum(value.size for value in state.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_layouts_by_hand():
  _, params = random_backbone(16)
  state = interop.to_timm(params)
  kernel = params['patch_embed']['kernel']  # row, column, channel in, channel out
  assert state['patch_embed.proj.weight'][5, 2, 1, 3] == kernel[1, 3, 2, 5]
  assert state['blocks.1.attn.qkv.weight'][30, 7] == params['blocks']['attn']['qkv']['kernel'][1, 7, 30]
  assert state['norm.weight'].dtype == np.float32


def test_another_size_resamples_the_positions_and_nothing_else():
  _, small = random_backbone(16)
  module, template = random_backbone(24)
  loaded = interop.from_timm(interop.to_timm(small), template, grid=module.grid)
  assert loaded['pos_embed'].shape == (1, 37, 24)
  np.testing.assert_array_equal(loaded['pos_embed'][:, 0], small['pos_embed'][:, 0])
  np.testing.assert_array_equal(loaded['blocks']['mlp']['fc1']['kernel'], small['blocks']['mlp']['fc1']['kernel'])


def test_a_classifier_is_ignored_and_listed():
  module, params = random_backbone(16)
  state = interop.to_timm(params) | {'head.weight': np.zeros((10, 24), np.float32)}
  jax.tree.map(np.testing.assert_array_equal, interop.from_timm(state, params, grid=module.grid), params)
  assert interop.ignored_names(state) == ['head.weight']


def test_what_does_not_fit_is_named_on_both_sides():
  module, params = random_backbone(16)
  state = interop.to_timm(params)
  del state['norm.bias']
  state['reg_token'] = np.zeros(3, np.float32)
  state['blocks.0.mlp.fc1.weight'] = np.zeros((7, 24), np.float32)
  with pytest.raises(UserError) as caught:
    interop.from_timm(state, params, grid=module.grid)
  for piece in ('norm.bias', 'reg_token', 'blocks.0.mlp.fc1.weight', '[7, 24]', '[96, 24]'):
    assert piece in str(caught.value)


@pytest.mark.parametrize(('name', 'content'), [('x.safetensors', b'junk'), ('x.npz', b'junk'), ('x.pth', b'')])
def test_files_that_are_not_what_they_say(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=name.replace('.', r'\.')):
    interop.load_timm_file(tmp_path / name)
  with pytest.raises(UserError, match='no such file'):
    interop.load_timm_file(tmp_path / 'absent.safetensors')


@pytest.mark.parametrize(
  ('fields', 'model', 'args'),
  [
    ((384, 12, 6, 16, 224), 'vit_small_patch16_224', {'num_classes': 0}),
    ((1024, 24, 16, 14, 518), 'vit_large_patch14_224', {'num_classes': 0, 'img_size': 518}),
    (
      (96, 3, 3, 4, 32),
      'vit_base_patch16_224',
      {'num_classes': 0, 'patch_size': 4, 'embed_dim': 96, 'depth': 3, 'num_heads': 3, 'img_size': 32},
    ),
  ],
)
def test_timm_models_by_name(fields, model, args):
  names = ('width', 'depth', 'heads', 'patch', 'image_size')
  assert interop.timm_model(**dict(zip(names, fields, strict=True))) == {'model': model, 'args': args}


def timm_tokens(about, state, image_NHWC):
  import timm
  import torch

  model = timm.create_model(about['model'], **about['args']).eval()
  model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
  with torch.no_grad():
    return model.forward_features(torch.from_numpy(image_NHWC.transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.parity
@pytest.mark.parametrize(
  ('image_size', 'fields'),
  [(16, {}), ((12, 20), {'layer_scale': 0.2}), (28, {'patch': 14, 'depth': 3, 'mlp_ratio': 3.0})],
)
def test_features_are_timms(image_size, fields):
  module, params = random_backbone(image_size, **fields)
  size = (image_size, image_size) if isinstance(image_size, int) else image_size
  image_NHWC = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
  output = module.apply({'params': params}, image_NHWC)
  ours = np.concatenate([output.pooled[:, None], output.patches.reshape(2, -1, 24)], axis=1)
  about = interop.timm_model(image_size=image_size, **{**FIELDS, **fields})
  # float32 on both sides; 1e-4 is the issue's bound, a hundred times float32's rounding at this depth.
  np.testing.assert_allclose(ours, timm_tokens(about, interop.to_timm(params), image_NHWC), atol=1e-4)


@pytest.mark.parity
def test_timm_reads_the_big_vision_file(tmp_path):
  import timm
  import torch

  module, params = random_backbone(16)
  file = tmp_path / 'weights.npz'
  np.savez(file, **interop.to_big_vision(params, heads=3))
  about = interop.timm_model(image_size=16, **FIELDS)
  model = timm.create_model(about['model'], **about['args'] | {'no_embed_class': True}).eval()
  model.load_pretrained(str(file))
  image_NHWC = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.from_numpy(image_NHWC.transpose(0, 3, 1, 2).copy())).numpy()
  np.testing.assert_allclose(module.apply({'params': params}, image_NHWC).pooled, theirs, atol=1e-4)
