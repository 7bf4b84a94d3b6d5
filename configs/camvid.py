"""Semantic segmentation of CamVid (480 x 360, 11 classes), sized for 2 CPU cores: a small ViT, some hundred steps.

  python -m folk_jax.main --config=configs/camvid.py:path=DIR --workdir=runs/camvid
  python -m folk_jax.main --config=configs/camvid.py:path=DIR --config.init_from=runs/mine --workdir=runs/camvid_mine

DIR holds <split>/images/*.jpg and <split>/masks/*.png, splits train, val and test; a mask's pixel is its class, 0 to
10, or 11 for void. What differs from vit_b.py, and why, stands here; every other knob is there.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: head=linear|upernet, smoke, data=SOURCE, path=DIR."""
  given = config_lib.parse_arg(arg, head='linear', smoke=False, data='mask_folder', path='')
  c = config_lib.sibling(__file__, 'vit_b.py', 'smoke' if given.smoke else '')
  if given.smoke and given.data == 'mask_folder' and not given.path:
    # On vit_b.py's embedded photographs: the class of a pixel is its photograph.
    segmentation(c, head=given.head, classes=10, ignore=11, height=72, width=72)
  else:
    segmentation(c, head=given.head, classes=11, ignore=11, height=360, width=480)
    c.data.update({'source': given.data, 'name': '', 'path': given.path})
  c.objective.channels = 32  # 512 would be nearly all of the work.
  c.evaluation.batch_size = 8
  if given.smoke:
    c.data.limit = 20
    return c

  c.batch_size = 16
  c.image_size = 192
  c.epochs, c.total_steps = 0, 400  # 17 passes over the 367 images.
  c.model.update({'width': 192, 'depth': 6, 'heads': 3, 'patch': 16, 'drop_path': 0.0})

  c.optimizer.learning_rate = 8e-3  # For 256 images: 5e-4 here.
  c.optimizer.warmup_epochs = 1.0
  c.optimizer.final_weight_decay = 0.04
  c.optimizer.clip = 1.0
  c.optimizer.clip_by = 'global'

  c.data.update({'workers': 0, 'threads': 2, 'prefetch': 4})
  c.checkpoint.update({'every': 200, 'permanent_every': 0})
  c.log_every, c.eval_every = 20, 0
  return c


def segmentation(
  c: ml_collections.ConfigDict, *, head: str, classes: int, ignore: int, height: int, width: int
) -> None:
  """Makes a FOLK recipe one of segmentation; ade20k.py shares it."""
  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'segment'
  c.objective.head = head  # Or 'linear'.
  c.objective.layers = ()  # Blocks that the head sees; (): the last, or four evenly spaced (upernet).
  c.objective.channels = 512  # Of UPerNet's levels, as the next two are its own.
  c.objective.dropout = 0.1
  c.objective.auxiliary_weight = 0.4
  c.objective.classes = classes
  c.objective.ignore = ignore
  c.objective.stride = 2 / 3  # From window to window in evaluation, as a share of image_size.

  c.data.masks = ml_collections.ConfigDict()
  c.data.masks.classes = classes
  c.data.masks.ignore = ignore
  c.data.masks.height = height  # The canvas on which whole images are evaluated.
  c.data.masks.width = width
  c.data.masks.short_side = 0  # Brings images to this size first; 0: as they are.
  c.data.masks.scale = (0.5, 2.0)  # The random factor before the crop of image_size.
  c.data.masks.category_max_ratio = 0.75
  c.data.interpolation = 'bilinear'
  c.data.test_resize = 0

  # One view and no teacher; masks fix how it is cut, so that of the view's geometry only the flip is used.
  c.teacher.enabled = False
  del c.projection
  del c.views.view_2
  c.views.view_1.update({'grayscale_probability': 0.0, 'blur_probability': 0.0})
  c.views.view_1.update({'jitter_probability': 0.5, 'hue': 0.05, 'solarise_probability': 0.0})
  c.evaluation.update({'which': 'student', 'knn': (), 'held_out_images': 0, 'at_start': False})
  c.evaluation.recalibration_images = 1  # Nothing to recalibrate: training shows clean images.
  c.optimizer.freeze_last_layer_epochs = 0.0
