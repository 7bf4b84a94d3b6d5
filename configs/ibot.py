"""iBOT on ImageNet-1K (arXiv 2111.07832; values of its official code). Every other knob stands in vit_b.py.

python -m folk_jax.main --config=configs/ibot.py --workdir=runs/ibot_vit_s
python -m folk_jax.main --config=configs/ibot.py:model=vit_b,local_crops=10 --workdir=runs/ibot_vit_b_multicrop
python -m folk_jax.main --config=configs/ibot.py:cifar10,path=DIR --workdir=runs/ibot_cifar10
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_s|vit_b, local_crops=N, cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  c = config_lib.sibling(__file__, 'dino.py', arg)
  c.objective.name = 'ibot'
  c.objective.mask_probability = 0.5  # Share of the views that are masked at all ...
  c.objective.mask_ratio = 0.3  # ... of those, the share of patches: uniform in 0.3 -+ 0.2.
  c.objective.mask_ratio_spread = 0.2
  c.objective.patch_weight = 1.0
  c.projection.outputs = min(c.projection.outputs, 8192)
  return c
