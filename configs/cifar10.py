"""FOLK on CIFAR-10 (as JPEG class folders), sized for 2 CPU cores: ViT of depth 4, width 192, patch 4 at 32 px.

  python -m folk_jax.main --config=configs/cifar10.py:path=DIR --workdir=runs/cifar10

DIR holds train/<class>/*.jpg and test/<class>/*.jpg. What differs from vit_b.py, and why, stands here; every other
knob is there.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  given = config_lib.parse_arg(arg, smoke=False, data='folder', name='', path='')
  c = config_lib.sibling(__file__, 'vit_b.py', 'smoke' if given.smoke else '')
  c.data.test_split = 'test'
  if given.smoke and not given.path:
    return c  # vit_b.py's smoke: embedded photographs.
  c.data.update({'source': given.data, 'name': given.name, 'path': given.path})
  if given.smoke:
    return c

  c.batch_size = 128
  c.image_size = 32
  c.epochs, c.total_steps = 0, 2400
  c.model.update({'width': 192, 'depth': 4, 'heads': 3, 'patch': 4, 'drop_path': 0.0, 'dtype': 'float32'})
  c.projection.update({'hidden': 512, 'bottleneck': 128, 'outputs': 1024})
  return c
