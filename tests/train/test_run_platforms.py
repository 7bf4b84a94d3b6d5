"""What 'auto' stands for, by platform."""

import pytest

from folk_jax.config import load_recipe
from folk_jax.train import run


@pytest.mark.parametrize(
  'recipe, platform, chosen',
  [
    ('vit_b', 'tpu', ('bfloat16', 'matmul', 'pallas', 12)),
    ('vit_b', 'gpu', ('bfloat16', 'fft', 'cudnn', 12)),
    ('quickstart', 'gpu', ('bfloat16', 'fft', 'cudnn', 3)),
    ('vit_b', 'cpu', ('float32', 'fft', 'xla', 1)),
    ('quickstart', 'tpu', ('bfloat16', 'matmul', 'xla', 3)),  # Heads of 32 channels: no kernel.
  ],
)
def test_auto_by_platform(recipe, platform, chosen):
  config = load_recipe(f'configs/{recipe}.py', None)
  found = run.for_platform(config, platform)
  model = found.model
  assert (model.dtype, found.spectral_backend, model.attention, model.scan_unroll) == chosen
  assert config.model.attention == 'auto'  # The argument is left as it was.


def test_what_is_asked_for_stays():
  config = load_recipe('configs/vit_b.py', None)
  config.spectral_backend, config.model.attention, config.model.dtype = 'fft', 'cudnn', 'float32'
  config.model.scan_unroll = 3
  found = run.for_platform(config, 'tpu')
  assert found.model.scan_unroll == 3
  assert (found.model.dtype, found.spectral_backend, found.model.attention) == (
    'float32',
    'fft',
    'cudnn',
  )


def test_what_cudnn_does_not_take_is_xlas_on_a_gpu():
  config = load_recipe('configs/vit_b.py', None)
  config.model.dtype = 'float32'
  assert run.for_platform(config, 'gpu').model.attention == 'xla'
  config.model.dtype, config.model.heads = 'auto', 3  # heads of 256 channels
  assert run.for_platform(config, 'gpu').model.attention == 'xla'


def test_a_resnet_has_no_attention():
  found = run.for_platform(load_recipe('configs/resnet50.py', None), 'tpu')
  assert 'attention' not in found.model and found.model.dtype == 'bfloat16'
