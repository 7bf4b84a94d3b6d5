"""UPerNet on ADE20K with ViT-B/16 at 512 pixels: 160,000 steps of 16 images, single scale.

  python -m folk_jax.main --config=configs/ade20k.py:path=DIR --config.init_from=runs/vit_b --workdir=runs/ade20k

Optimiser and augmentation as mmseg's recipe for MAE (its configs/mae), UPerNet's 512 channels as BEiT's code. [D] The
rate falls by a cosine where those let it fall linearly. DIR holds train/ and val/, each with images/*.jpg and
masks/*.png; a mask's pixel is its class, 0 to 149, or 255 for none: ADE20K's own annotation minus 1, in uint8. What
differs from camvid.py and vit_b.py stands here. Not run by us.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: head=linear|upernet, smoke, data=SOURCE, path=DIR."""
  given = config_lib.parse_arg(arg, head='upernet', smoke=False, data='mask_folder', path='')
  c = config_lib.sibling(__file__, 'camvid.py', config_lib.format_arg(given))
  if c.data.source != 'embedded':  # As :smoke without a path is.
    c.objective.classes, c.objective.ignore = 150, 255
    c.data.masks.update({'classes': 150, 'ignore': 255})
  if given.smoke:
    return c

  big = config_lib.sibling(__file__, 'vit_b.py', None)
  c.model = big.model
  c.batch_size = 16
  c.image_size = 512
  c.total_steps = 160_000
  c.objective.channels = 512
  c.objective.layers = (3, 5, 7, 11) if given.head == 'upernet' else ()
  # [D] Judged at this size, on masks resized with the images; mmseg brings scores back to the image's own size.
  c.data.masks.update({'short_side': 512, 'height': 704, 'width': 1024})

  c.optimizer.name = 'adamw'
  c.optimizer.learning_rate = 1.6e-3  # For 256 images: 1e-4 for 16.
  c.optimizer.final_learning_rate = 0.0
  c.optimizer.warmup_epochs = 1.19  # 1,500 steps of 16 of the 20,210 images.
  c.optimizer.weight_decay = c.optimizer.final_weight_decay = 0.05
  c.optimizer.decay_exclude = ('cls_token', 'pos_embed')
  c.optimizer.layer_decay = 0.65
  c.optimizer.clip = 0.0

  c.data.update({'workers': 8, 'threads': 1, 'prefetch': 1})
  c.checkpoint.update({'every': 2000, 'permanent_every': 16_000})
  c.log_every, c.eval_every = 50, 16_000
  return c
