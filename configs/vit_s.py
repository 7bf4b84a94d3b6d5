"""FOLK with ViT-S/16 on ImageNet-1K. Every knob stands in vit_b.py; here is what differs.

python -m folk_jax.main --config=configs/vit_s.py --workdir=runs/vit_s
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  c = config_lib.sibling(__file__, 'vit_b.py', arg)
  c.projection.norm_last_layer = False  # iBOT: the weight-norm gain is trained for ViT-S.
  if c.total_steps:  # smoke
    return c
  c.model.update({'width': 384, 'depth': 12, 'heads': 6})
  return c
