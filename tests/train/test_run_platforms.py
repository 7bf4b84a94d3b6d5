"""What 'auto' stands for, by platform."""

import pytest

from folk_jax.config import load_recipe
from folk_jax.train import run


@pytest.mark.parametrize(
  'recipe, platform, chosen',
  [
    ('vit_b', 'tpu', ('bfloat16', 'matmul', 'pallas')),
    ('vit_b', 'gpu', ('bfloat16', 'fft', 'xla')),
    ('vit_b', 'cpu', ('float32', 'fft', 'xla')),
    ('quickstart', 'tpu', ('bfloat16', 'matmul', 'xla')),  # Heads of 32 channels: no kernel.
  ],
)
def test_auto_by_platform(recipe, platform, chosen):
  config = load_recipe(f'configs/{recipe}.py', None)
  found = run.for_platform(config, platform)
  assert (found.model.dtype, found.spectral_backend, found.model.attention) == chosen
  assert config.model.attention == 'auto'  # The argument is left as it was.


def test_what_is_asked_for_stays():
  config = load_recipe('configs/vit_b.py', None)
  config.spectral_backend, config.model.attention, config.model.dtype = 'fft', 'cudnn', 'float32'
  found = run.for_platform(config, 'tpu')
  assert (found.model.dtype, found.spectral_backend, found.model.attention) == (
    'float32',
    'fft',
    'cudnn',
  )


def test_a_resnet_has_no_attention():
  found = run.for_platform(load_recipe('configs/resnet50.py', None), 'tpu')
  assert 'attention' not in found.model and found.model.dtype == 'bfloat16'
