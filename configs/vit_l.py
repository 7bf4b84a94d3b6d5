"""FOLK with ViT-L/16 on ImageNet-1K. Every knob stands in vit_b.py; here is what differs.

python -m folk_jax.main --config=configs/vit_l.py --workdir=runs/vit_l
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  c = config_lib.sibling(__file__, 'vit_b.py', arg)
  if c.total_steps:  # smoke
    return c
  c.model.update({'width': 1024, 'depth': 24, 'heads': 16})
  c.model.drop_path = 0.2  # [D] The papers train no ViT-L with FOLK; larger models take more.
  c.model.remat = 'block'
  return c
