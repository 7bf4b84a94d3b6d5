"""A ResNet in timm's names: weights and statistics by hand, exact round trips, timm's own forward."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import errors, models
from folk_jax.interop import timm as interop
from folk_jax.models import resnet

# The agreement that we promise of float32 features; what is found on these is 1e-5.
FEATURE_TOLERANCE = 1e-4


def _template(depth, width=64):
  """A ResNet and the shapes of its parameters and statistics."""
  model = models.make_backbone('resnet', 32, depth=depth, width=width)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  return model, shapes['params'], shapes['batch_stats']


def _random(*trees):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trees)


@pytest.fixture(scope='module')
def small():
  """Random parameters and statistics of ResNet-26 at a quarter of the width."""
  return _random(*_template(26, 16)[1:])


def test_names_and_layouts_by_hand(small):
  params, statistics = small
  state = interop.to_timm(params, statistics)
  # Convolutions with norms of five entries: the stem, three a block, and the shortcuts of three
  # stages, since the first puts out 4 * 16 channels, as many as it gets.
  assert len(state) == 6 * (1 + 3 * 8 + 3)
  for name, value in state.items():
    counter = name.endswith('num_batches_tracked')
    assert value.dtype == (np.int64 if counter else np.float32) and value.flags.c_contiguous
    assert not counter or (value.shape == () and value == 0)
  kernel = params['layer3_1']['conv2']['kernel']
  assert state['layer3.1.conv2.weight'][5, 2, 1, 0] == kernel[1, 0, 2, 5]
  shortcut = params['layer2_0']['downsample_conv']['kernel']
  assert state['layer2.0.downsample.0.weight'][7, 3, 0, 0] == shortcut[0, 0, 3, 7]
  norm = params['layer2_0']['downsample_bn'], statistics['layer2_0']['downsample_bn']
  assert state['layer2.0.downsample.1.weight'][4] == norm[0]['scale'][4]
  assert state['layer2.0.downsample.1.bias'][4] == norm[0]['bias'][4]
  assert state['layer2.0.downsample.1.running_mean'][4] == norm[1]['mean'][4]
  assert state['layer2.0.downsample.1.running_var'][4] == norm[1]['var'][4]
  assert list(state)[:7] == [
    'conv1.weight',
    'bn1.weight',
    'bn1.bias',
    'bn1.running_mean',
    'bn1.running_var',
    'bn1.num_batches_tracked',
    'layer1.0.conv1.weight',
  ]


def test_round_trip_is_exact(small):
  params, statistics = small
  state = interop.to_timm(params, statistics)
  assert interop.timm_shapes(params) == {name: value.shape for name, value in state.items()}
  classifier = {'fc.weight': np.zeros((10, 512)), 'fc.bias': np.zeros(10)}
  back = interop.variables_from_timm(state | classifier, jax.eval_shape(lambda: params))
  assert jax.tree.structure(back) == jax.tree.structure(interop.Variables(params, statistics))
  jax.tree.map(np.testing.assert_array_equal, back, interop.Variables(params, statistics))
  counters = [name for name in state if name.endswith('.num_batches_tracked')]
  assert interop.ignored_names(state | classifier) == sorted([*counters, *classifier])
  # Older files of torchvision have no counters.
  older = {name: value for name, value in state.items() if name not in counters}
  again = interop.variables_from_timm(older, params)
  jax.tree.map(np.testing.assert_array_equal, again, back)


def test_weights_alone_where_there_are_no_statistics(small):
  state = interop.to_timm(small[0])
  assert {name.split('.')[-1] for name in state} == {'weight', 'bias'}


def test_report_names_both_sides(small):
  params, statistics = small
  state = interop.to_timm(params, statistics)
  del state['layer1.0.bn3.running_var']
  state['layer1.2.conv1.weight'] = np.zeros((16, 64, 1, 1))
  state['layer4.0.conv2.weight'] = np.zeros((128, 128, 1, 1))
  with pytest.raises(errors.UserError) as caught:
    interop.variables_from_timm(state, params)
  message = str(caught.value)
  assert '1 missing from the file: layer1.0.bn3.running_var' in message
  assert '1 unknown to the model: layer1.2.conv1.weight' in message
  assert 'layer4.0.conv2.weight (file [128, 128, 1, 1], model [128, 128, 3, 3])' in message
  assert 'check model.depth and width' in message and '\n' not in message


def test_another_kind_of_backbone_is_reported(small):
  with pytest.raises(errors.UserError, match='missing from the file: conv1.weight'):
    interop.variables_from_timm({'cls_token': np.zeros((1, 1, 8))}, small[0])
  with pytest.raises(ValueError, match='no backbone'):
    interop.to_timm({'proj': {'kernel': np.zeros((2, 2))}})


@pytest.mark.parametrize(
  'depth, width, expected',
  [
    (50, 64, ('resnet50', {'num_classes': 0})),
    (18, 16, ('resnet18', {'num_classes': 0, 'channels': [16, 32, 64, 128]})),
    (10, 64, ('resnet18', {'num_classes': 0, 'layers': [1, 1, 1, 1]})),
    (
      14,
      8,
      ('resnet50', {'num_classes': 0, 'layers': [1, 1, 1, 1], 'channels': [8, 16, 32, 64]}),
    ),
  ],
)
def test_timm_model_names(depth, width, expected):
  found = interop.timm_model('resnet', depth=depth, width=width, image_size=96)
  assert (found['model'], found['args']) == expected
  assert json.loads(json.dumps(found)) == found


@pytest.mark.parity
@pytest.mark.parametrize('width', [64, 8])
def test_timm_names_exist_and_fit(width):
  """Every name that `timm_model` can give is registered, and its state dict is ours."""
  import timm
  import torch

  for depth in resnet.DEPTHS:
    named = interop.timm_model('resnet', depth=depth, width=width, image_size=224)
    with torch.device('meta'):
      theirs = timm.create_model(named['model'], **named['args'])
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert interop.timm_shapes(_template(depth, width)[1]) == expected


def _random_timm(named):
  """timm's model with random weights and statistics, no two channels alike.

  Statistics near those of its features and weak residual branches keep features of order 1, as
  training does: they are sums that no norm follows.
  """
  import timm
  import torch

  torch.manual_seed(0)
  model = timm.create_model(named['model'], **named['args'])
  norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
  for norm in norms:
    norm.momentum = 1.0
    last = not norm.weight.any()  # timm starts the last of a block at zero.
    torch.nn.init.uniform_(norm.weight, *((0.1, 0.4) if last else (0.5, 1.5)))
    torch.nn.init.normal_(norm.bias, 0, 0.2)
  with torch.no_grad():
    model.train()(torch.randn(4, 3, 96, 96))
    for norm in norms:
      norm.running_mean += 0.2 * torch.randn(norm.running_mean.shape)
      norm.running_var *= torch.empty(norm.running_var.shape).uniform_(0.7, 1.4)
  return model.eval()


@pytest.mark.parity
@pytest.mark.parametrize('depth, width', [(50, 64), (18, 64), (14, 8)])
def test_features_equal_timm_and_export_restores_every_array(depth, width):
  import timm
  import torch

  named = interop.timm_model('resnet', depth=depth, width=width, image_size=64)
  theirs = _random_timm(named)
  state = {name: value.numpy() for name, value in theirs.state_dict().items()}
  model, params, _ = _template(depth, width)
  loaded = interop.variables_from_timm(state, params)

  image = np.random.default_rng(1).normal(size=(2, 64, 96, 3)).astype(np.float32)
  stages = (0, 1, 2, 3)
  encode = jax.jit(lambda *variables: models.encode(model, *variables, image, layers=stages)[0])
  with jax.default_matmul_precision('highest'):
    ours = encode(*loaded)
  with torch.no_grad():
    image_NCHW = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    pooled = theirs(image_NCHW).numpy()
    maps = theirs.forward_intermediates(image_NCHW, intermediates_only=True)
  assert 0.5 < np.sqrt(np.mean(np.square(maps[-1].numpy()))) < 3
  np.testing.assert_allclose(ours.pooled, pooled, atol=FEATURE_TOLERANCE, rtol=0)
  # timm counts the stem as the first.
  for stage, expected in enumerate(maps[1:]):
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.layers[stage][1], expected, atol=FEATURE_TOLERANCE, rtol=0)

  exported = interop.to_timm(*loaded)
  again = timm.create_model(named['model'], **named['args']).eval()
  tensors = {name: torch.from_numpy(value) for name, value in exported.items()}
  again.load_state_dict(tensors, strict=True)
  with torch.no_grad():
    np.testing.assert_array_equal(again(image_NCHW).numpy(), pooled)
  assert exported.keys() == state.keys()
  for name, value in state.items():
    if not name.endswith('num_batches_tracked'):
      np.testing.assert_array_equal(exported[name], value)
