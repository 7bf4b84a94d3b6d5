"""FOLK with ResNet-50 on ImageNet-1K (arXiv 2409.10362 trains one). Every knob stands in vit_b.py; here: what differs.

python -m folk_jax.main --config=configs/resnet50.py --workdir=runs/resnet50
python -m folk_jax.main --config=configs/resnet50.py --config.model.depth=101 --workdir=runs/resnet101
python -m folk_jax.main --config=configs/resnet50.py:cifar10,path=DIR --workdir=runs/resnet_cifar10   # a ResNet-18
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  c, given = config_lib.base_recipe(__file__, arg, models=('vit_b',))

  c.model = ml_collections.ConfigDict()
  c.model.name = 'resnet'
  c.model.depth = 50  # Or 18, 34, 101, 152.
  c.model.width = 64  # Channels of the first stage's blocks.
  c.model.norm_momentum = 0.9  # Of BatchNorm's running statistics; torch calls this 0.1.
  c.model.zero_init_last = True
  c.model.remat = 'none'  # Or 'block'.
  c.model.dtype = 'auto'

  # [D] The paper's optimiser for it isn't known: vit_b.py's stays. MFM trains its ResNet-50 with AdamW, too.
  # [D] The pooled feature takes the class token's place in the projection head.
  if given.smoke:
    c.model.update({'depth': 10, 'width': 8, 'dtype': 'float32'})
  elif given.cifar10:
    c.model.update({'depth': 18, 'width': 32})
  return c
