"""timm's names and layouts: exact round trips, reports in words, and timm's own forward."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from folk_jax import errors, models
from folk_jax.interop import timm as interop

# Both forwards are float32: values of order 1 after a few blocks, sums in another order.
FEATURE_TOLERANCE = {'atol': 3e-5, 'rtol': 1e-5}


def _model(image_size=8, **changes):
  """A ViT and random parameters, none of them at an initial 0 or 1."""
  fields = {'width': 24, 'depth': 3, 'heads': 3, 'patch': 4} | changes
  model = models.make_backbone('vit', image_size, **fields)
  height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
  image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(0)
  # Deviation 0.2: large enough that a swapped axis or name shows, small enough not to saturate.
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
  return model, params


def test_names_and_layouts_by_hand():
  model, params = _model(layer_scale=1e-5)
  state = interop.to_timm(params)
  assert len(state) == 6 + 3 * 14
  assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in state.values())
  kernel = params['patch_embed']['kernel']
  assert state['patch_embed.proj.weight'][5, 2, 1, 3] == kernel[1, 3, 2, 5]
  assert state['blocks.2.mlp.fc1.weight'][7, 4] == params['blocks']['mlp']['fc1']['kernel'][2, 4, 7]
  assert state['blocks.1.ls2.gamma'][3] == params['blocks']['ls2']['gamma'][1, 3]
  assert state['norm.weight'][0] == params['norm']['scale'][0]
  assert model.grid == (2, 2)


@pytest.mark.parametrize('changes', [{}, {'layer_scale': 1e-5}, {'image_size': (8, 12)}])
def test_round_trip_is_exact(changes):
  model, params = _model(**changes)
  state = interop.to_timm(params) | {'head.weight': np.zeros((10, 24)), 'head.bias': np.zeros(10)}
  shapes = jax.eval_shape(lambda: params)
  back = interop.from_timm(state, shapes, grid=model.grid)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert interop.ignored_names(state) == ['head.bias', 'head.weight']


def test_position_embedding_is_resampled_to_the_grid():
  small, params = _model(image_size=8)
  large, template = _model(image_size=(16, 12))
  loaded = interop.from_timm(interop.to_timm(params), template, grid=large.grid)
  expected = models.resample_position_embedding(jnp.asarray(params['pos_embed']), (2, 2), (4, 3))
  np.testing.assert_array_equal(loaded['pos_embed'], expected)
  # A saved grid that is no square has to be named: 4 x 3 patches could as well be 2 x 6.
  back = interop.from_timm(interop.to_timm(template), params, grid=small.grid, state_grid=(4, 3))
  expected = models.resample_position_embedding(jnp.asarray(template['pos_embed']), (4, 3), (2, 2))
  np.testing.assert_array_equal(back['pos_embed'], expected)
  with pytest.raises(errors.UserError, match='pos_embed'):
    interop.from_timm(interop.to_timm(template), params, grid=small.grid)


def test_report_names_both_sides():
  model, params = _model()
  state = interop.to_timm(params)
  del state['norm.bias']
  state['blocks.3.norm1.weight'] = np.zeros(24)
  state['blocks.0.mlp.fc1.weight'] = np.zeros((48, 24))
  with pytest.raises(errors.UserError) as caught:
    interop.from_timm(state, params, grid=model.grid)
  message = str(caught.value)
  assert '1 missing from the file: norm.bias' in message
  assert '1 unknown to the model: blocks.3.norm1.weight' in message
  assert '1 of another shape: blocks.0.mlp.fc1.weight (file [48, 24], model [96, 24])' in message
  assert '\n' not in message


def test_long_reports_are_cut():
  model, params = _model()
  with pytest.raises(errors.UserError, match='42 missing from the file: .* and 38 more'):
    interop.from_timm({}, params, grid=model.grid)


@pytest.mark.parametrize(
  'fields, expected',
  [
    (('s', 16, 224), ('vit_small_patch16_224', {'num_classes': 0})),
    (('ti', 16, 96), ('vit_tiny_patch16_224', {'num_classes': 0, 'img_size': 96})),
    (('b', 8, (64, 96)), ('vit_base_patch8_224', {'num_classes': 0, 'img_size': [64, 96]})),
    (('l', 14, 224), ('vit_large_patch14_224', {'num_classes': 0})),
    (
      ('s', 4, 32),
      (
        'vit_base_patch16_224',
        {
          'num_classes': 0,
          'patch_size': 4,
          'embed_dim': 384,
          'depth': 12,
          'num_heads': 6,
          'img_size': 32,
        },
      ),
    ),
  ],
)
def test_timm_model_names(fields, expected):
  size, patch, image_size = fields
  width, depth, heads = interop.VIT_SIZES[size]
  found = interop.timm_model(
    width=width, depth=depth, heads=heads, patch=patch, image_size=image_size
  )
  assert (found['model'], found['args']) == expected
  assert json.loads(json.dumps(found)) == found


def test_files_are_read_or_refused_in_words(tmp_path):
  state = {'norm.weight': np.arange(3, dtype=np.float32)}
  safetensors.numpy.save_file(state, tmp_path / 'a.safetensors')
  np.savez(tmp_path / 'a.npz', **state)
  for name in ('a.safetensors', 'a.npz'):
    np.testing.assert_array_equal(interop.load_timm_file(tmp_path / name)['norm.weight'], [0, 1, 2])
  (tmp_path / 'bad.safetensors').write_bytes(b'not one')
  (tmp_path / 'bad.npz').write_bytes(b'not one')
  (tmp_path / 'a.pth').write_bytes(b'')
  for name, message in (
    ('bad.safetensors', 'damaged'),
    ('bad.npz', 'damaged'),
    ('a.pth', 'convert'),
    ('none.safetensors', 'no such file'),
  ):
    with pytest.raises(errors.UserError, match=message):
      interop.load_timm_file(tmp_path / name)


def test_big_vision_layout_by_hand():
  _, params = _model()
  tree = interop.to_big_vision(params, heads=3)
  assert len(tree) == 6 + 3 * 16
  block = 'params/Transformer/encoderblock_1'
  attention = f'{block}/MultiHeadDotProductAttention_0'
  qkv = params['blocks']['attn']['qkv']['kernel'][1]
  # Head 2, channel 5 of the keys is column 24 + 2 * 8 + 5 of the packed kernel.
  np.testing.assert_array_equal(tree[f'{attention}/key/kernel'][:, 2, 5], qkv[:, 24 + 2 * 8 + 5])
  assert tree[f'{attention}/out/kernel'].shape == (3, 8, 24)
  np.testing.assert_array_equal(tree['params/pos_embedding'], params['pos_embed'][:, 1:])
  np.testing.assert_array_equal(
    tree['params/cls'], params['cls_token'] + params['pos_embed'][:, :1]
  )
  with pytest.raises(errors.UserError, match='LayerScale'):
    interop.to_big_vision(_model(layer_scale=0.1)[1], heads=3)


def _timm_tokens(model, image):
  import torch

  with torch.no_grad():
    return (
      model.eval()
      .forward_features(torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2))))
      .numpy()
    )


def _our_tokens(model, params, image):
  with jax.default_matmul_precision('highest'):
    output = jax.jit(model.apply)({'params': params}, image)
  patches = output.patches.reshape(len(image), -1, output.pooled.shape[-1])
  return np.concatenate([output.pooled[:, None], patches], axis=1)


@pytest.mark.parity
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'layer_scale': 0.1},
    {'image_size': (8, 20)},
    {'image_size': 35, 'patch': 7, 'mlp_ratio': 3.0},
  ],
)
def test_features_equal_timm(changes):
  import timm
  import torch

  fields = {'image_size': 8, 'width': 24, 'depth': 3, 'heads': 3, 'patch': 4} | changes
  model, params = _model(**changes)
  named = interop.timm_model(**fields)
  theirs = timm.create_model(named['model'], **named['args'])
  state = interop.to_timm(params)
  theirs.load_state_dict(
    {name: torch.from_numpy(value) for name, value in state.items()}, strict=True
  )
  side = fields['image_size']
  image = np.random.default_rng(1).normal(
    size=(2, *((side, side) if isinstance(side, int) else side), 3)
  )
  image = image.astype(np.float32)
  np.testing.assert_allclose(
    _our_tokens(model, params, image), _timm_tokens(theirs, image), **FEATURE_TOLERANCE
  )


@pytest.mark.parity
def test_timm_names_exist_and_fit():
  """Every name that `timm_model` can give is registered, with the sizes that we took it for."""
  import timm
  import torch

  for size, patches in interop.TIMM_PATCHES.items():
    width, depth, heads = interop.VIT_SIZES[size]
    for patch in patches:
      named = interop.timm_model(width=width, depth=depth, heads=heads, patch=patch, image_size=224)
      assert named['model'].endswith(f'patch{patch}_224')
      with torch.device('meta'):
        theirs = timm.create_model(named['model'], **named['args'])
      assert theirs.embed_dim == width and len(theirs.blocks) == depth
      assert theirs.blocks[0].attn.num_heads == heads and theirs.num_prefix_tokens == 1
      model = models.make_backbone('vit', 224, width=width, depth=depth, heads=heads, patch=patch)
      image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
      template = jax.eval_shape(model.init, jax.random.key(0), image)['params']
      expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
      assert interop.timm_shapes(template) == expected


@pytest.mark.parity
def test_timm_loads_the_big_vision_file(tmp_path):
  import timm

  model, params = _model()
  named = interop.timm_model(image_size=8, width=24, depth=3, heads=3, patch=4)
  theirs = timm.create_model(named['model'], **named['args'], no_embed_class=True)
  np.savez(tmp_path / 'weights.npz', **interop.to_big_vision(params, heads=3))
  theirs.load_pretrained(str(tmp_path / 'weights.npz'))
  image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
  np.testing.assert_allclose(
    _our_tokens(model, params, image), _timm_tokens(theirs, image), **FEATURE_TOLERANCE
  )


@pytest.mark.parity
def test_vit_b_is_imported_computes_the_same_and_is_exported_whole():
  """Not a number is lost of timm's ViT-B/16 at 224 pixels, from timm to us and back."""
  import timm
  import torch

  width, depth, heads = interop.VIT_SIZES['b']
  fields = {'width': width, 'depth': depth, 'heads': heads, 'patch': 16}
  named = interop.timm_model(image_size=224, **fields)
  torch.manual_seed(0)
  theirs = timm.create_model(named['model'], **named['args'])
  for parameter in theirs.parameters():
    if parameter.ndim == 1:  # Norms and biases: timm starts them at 1 and 0.
      torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
  state = {name: value.numpy() for name, value in theirs.state_dict().items()}
  model = models.make_backbone('vit', 224, **fields)
  shape = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  template = jax.eval_shape(model.init, jax.random.key(0), shape)['params']
  params = interop.from_timm(state, template, grid=model.grid)
  image = np.random.default_rng(1).normal(size=(1, 224, 224, 3)).astype(np.float32)
  expected = _timm_tokens(theirs, image)
  # Twelve blocks' worth of float32 sums in another order, on features of order 1.
  np.testing.assert_allclose(_our_tokens(model, params, image), expected, atol=1e-4, rtol=0)
  exported = interop.to_timm(params)
  assert exported.keys() == state.keys()
  for name, value in state.items():
    np.testing.assert_array_equal(exported[name], value)
