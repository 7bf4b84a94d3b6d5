"""MAE, masked autoencoder, on ImageNet-1K: 800 epochs, batch 4096 (arXiv 2111.06377; table 8 and official code).

  python -m folk_jax.main --config=configs/mae.py --workdir=runs/mae_vit_b
  python -m folk_jax.main --config=configs/mae.py:model=vit_s --workdir=runs/mae_vit_s
  python -m folk_jax.main --config=configs/mae.py:cifar10,path=DIR --workdir=runs/mae_cifar10

Views, teacher and evaluation are mfm.py's; the rest of what differs from vit_b.py stands here.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_b|vit_s, cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  c = config_lib.sibling(__file__, 'mfm.py', arg)
  small = c.image_size <= 32
  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'mae'
  c.objective.mask_ratio = 0.75
  c.objective.normalise_pixels = True  # Each patch by its own mean and deviation.
  c.objective.decoder_width = 64 if small else 512
  c.objective.decoder_depth = 2 if small else 8
  c.objective.decoder_heads = 4 if small else 16
  if small:
    return c
  c.epochs, c.batch_size = 800, 4096
  c.optimizer.learning_rate = 1.5e-4
  c.optimizer.final_learning_rate = 0.0
  c.optimizer.warmup_epochs = 40.0
  c.optimizer.clip = 0.0
  c.optimizer.decay_exclude = ('pos_embed',)  # Fixed in the reference, learned here.
  return c
