"""ViT weights in big_vision's layout: read back, resampled, reported by name; and archives that are none."""

import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.interop import timm as interop

FIELDS = {'width': 24, 'depth': 2, 'heads': 3, 'patch': 4}


def make_model(image_size=8, **changes):
  """A ViT and random parameters, none of them at an initial 0 or 1."""
  model = models.make_backbone('vit', image_size, **FIELDS | changes)
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope='module')
def model():
  return make_model()


def old_names(params):
  """The same weights as the repository before big_vision names them; the class token has a position."""
  state = {}
  for name, array in interop.to_big_vision(params, heads=3).items():
    name = name.removeprefix('params/')
    for new, old in (
      ('LayerNorm_1', 'LayerNorm_2'),
      ('MultiHeadDotProductAttention_0', 'MultiHeadDotProductAttention_1'),
      ('MlpBlock_0', 'MlpBlock_3'),
    ):
      name = name.replace(new, old)
    state[name] = array
  state['cls'] = params['cls_token']
  state['Transformer/posembed_input/pos_embedding'] = params['pos_embed']
  del state['pos_embedding']
  return state


@pytest.mark.parametrize('kind', ['export', 'without params/', 'old', 'checkpoint'])
def test_what_was_written_is_read_back(model, kind):
  _, params = model
  written = interop.to_big_vision(params, heads=3)
  state = {
    'export': written,
    'without params/': {name.removeprefix('params/'): value for name, value in written.items()},
    'old': old_names(params) | {'head/kernel': np.zeros((24, 9)), 'head/bias': np.zeros(9)},
    'checkpoint': written | {'params/head/bias': np.zeros(9), 'opt/0/count': np.zeros(())},
  }[kind]
  assert interop.is_big_vision(state)
  found = interop.from_big_vision(state, jax.eval_shape(lambda: params), heads=3)
  # The class token holds its position, whose own place is empty; everything else is as it was, bit for bit.
  position = params['pos_embed'].copy()
  position[:, 0] = 0
  expected = params | {
    'cls_token': params['cls_token'] + params['pos_embed'][:, :1],
    'pos_embed': position,
  }
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_same_features_come_out(model):
  module, params = model
  state = interop.to_big_vision(params, heads=3)
  found = interop.from_big_vision(state, params, heads=3)
  image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
  before, after = (module.apply({'params': tree}, image).pooled for tree in (params, found))
  # One sum in another order: (class + position) + 0.
  np.testing.assert_allclose(after, before, atol=1e-6)


def test_positions_of_another_size_are_left_for_who_resamples(model):
  _, params = model
  _, larger = make_model(image_size=12)
  found = interop.from_big_vision(interop.to_big_vision(params, heads=3), larger, heads=3)
  assert found['pos_embed'].shape == (1, 5, 24)
  resampled = interop.from_timm(interop.to_timm(found), larger, grid=(3, 3))
  expected = models.resample_position_embedding(found['pos_embed'], (2, 2), (3, 3))
  np.testing.assert_array_equal(resampled['pos_embed'], expected)


def test_what_does_not_fit_is_named_on_both_sides(model):
  _, params = model
  state = interop.to_big_vision(params, heads=3)
  del state['params/Transformer/encoder_norm/bias']
  state['params/MAPHead_0/probe'] = np.zeros((1, 1, 24))
  state['params/embedding/bias'] = np.zeros(12)
  with pytest.raises(UserError) as refused:
    interop.from_big_vision(state, params, heads=3)
  message = str(refused.value)
  assert '1 missing from the file: params/Transformer/encoder_norm/bias' in message
  assert '1 unknown to the model: params/MAPHead_0/probe' in message
  assert '1 of another shape: params/embedding/bias (file [12], model [24])' in message
  assert '\n' not in message


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'depth': 3}, '16 missing from the file: params/Transformer/encoderblock_2/'),
    ({'depth': 1}, '16 unknown to the model: params/Transformer/encoderblock_1/'),
    ({'heads': 4}, 'query/kernel (file [24, 3, 8], model [24, 4, 6])'),
    ({'width': 48, 'heads': 6}, 'params/cls (file [1, 1, 24], model [1, 1, 48])'),
    ({'layer_scale': 0.1}, 'the model is a ViT with LayerScale'),
  ],
)
def test_another_architecture_is_refused(model, changes, words):
  state = interop.to_big_vision(model[1], heads=3)
  _, template = make_model(**changes)
  with pytest.raises(UserError) as refused:
    interop.from_big_vision(state, template, heads=(FIELDS | changes)['heads'])
  assert words in str(refused.value)


def test_a_resnet_does_not_take_it(model):
  template = {'conv1': {'kernel': np.zeros((7, 7, 3, 4))}}
  with pytest.raises(UserError, match='the model is no ViT'):
    interop.from_big_vision(interop.to_big_vision(model[1], heads=3), template)


def test_archives_of_numbers_are_read_and_bfloat16_is_widened(tmp_path):
  values = np.array([1.0, -2.5, 3.0], np.float32)
  np.savez(
    tmp_path / 'a.npz', narrow=np.asarray(values, jnp.bfloat16), whole=values, count=np.int64(3)
  )
  found = interop.read_npz(tmp_path / 'a.npz')
  assert found['narrow'].dtype == np.float32 and found['count'] == 3
  np.testing.assert_array_equal(found['narrow'], values)
  np.testing.assert_array_equal(found['whole'], values)


class Harmful:
  """An object that would run code of its own where it is unpickled."""

  def __reduce__(self):
    return (pytest.fail, ('unpickled',))


def test_archives_that_are_none_are_refused_in_a_line(tmp_path):
  np.savez_compressed(tmp_path / 'whole.npz', weights=np.arange(4000.0))
  whole = (tmp_path / 'whole.npz').read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0xFF
  array = io.BytesIO()
  np.save(array, np.zeros(3))
  for name, data in {
    'empty': b'',
    'text': b'no archive',
    'cut': whole[: len(whole) // 2],
    'flipped': bytes(flipped),
    'array': array.getvalue(),
  }.items():
    (tmp_path / f'{name}.npz').write_bytes(data)
  np.savez(tmp_path / 'objects.npz', weights=np.array([Harmful()], object))
  np.savez(tmp_path / 'strings.npz', weights=np.array(['a', 'b']))
  with zipfile.ZipFile(tmp_path / 'files.npz', 'w') as archive:
    archive.writestr('readme.txt', 'hello')
  for name in ('empty', 'text', 'cut', 'flipped', 'array', 'objects', 'strings', 'files'):
    with pytest.raises(UserError, match=f'{name}.npz: damaged or not what') as refused:
      interop.read_npz(tmp_path / f'{name}.npz')
    assert '\n' not in str(refused.value)
  with pytest.raises(UserError, match='none.npz: no such file'):
    interop.read_npz(tmp_path / 'none.npz')


@pytest.mark.parity
def test_timm_reads_the_old_names_as_we_do(model, tmp_path):
  import timm
  import torch

  module, params = model
  state = old_names(params)
  np.savez(tmp_path / 'old.npz', **state)
  named = interop.timm_model(image_size=8, **FIELDS)
  theirs = timm.create_model(named['model'], **named['args']).eval()
  theirs.load_pretrained(str(tmp_path / 'old.npz'))
  image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
  ours = interop.from_big_vision(state, params, heads=3)
  # Both forwards are float32: values of order 1 after two blocks, sums in another order.
  np.testing.assert_allclose(
    module.apply({'params': ours}, image).pooled, expected, atol=3e-5, rtol=1e-5
  )
