"""Judges one checkpoint: kNN, low-shot, linear, fine-tuning, robustness and restoration, with one table at the end.

  python -m folk_jax.main --config=configs/evaluate.py --config.checkpoint=runs/vit_b --workdir=runs/vit_b/evaluation
  python -m folk_jax.main --config=configs/evaluate.py:model=vit_s,data=folder,path=DIR \\
    --config.checkpoint=weights.safetensors --workdir=runs/weights
  python -m folk_jax.main --config=configs/evaluate.py --config.evaluations='("knn","low_shot")' \\
    --config.checkpoint=runs/mfm --workdir=runs/mfm/frozen
  python -m folk_jax.main --config=configs/evaluate.py --config.evaluations='("finetune","robustness")' \\
    --config.robustness.classifiers='("finetune",)' --config.robustness.folders='("sketch=DIR",)' \\
    --config.checkpoint=runs/vit_b --workdir=runs/vit_b/robust

A workdir brings its own model, image size and data (a ResNet's needs model=resnet50 all the same, which chooses the
recipes of its training runs); a timm file needs `model=` and the data. Started again, it goes on after the last part
that stands in results.json. Test images never choose anything. docs/evaluation.md has every field with an example.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_b|vit_s|vit_l|resnet50, cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  models = ('vit_b', 'vit_s', 'vit_l', 'resnet50')
  c, given = config_lib.base_recipe(__file__, arg, models=models)
  c.task = 'evaluate'
  del c.checkpoint  # A training run's periods; here:
  c.checkpoint = ''  # A workdir, or a timm .safetensors.
  c.evaluations = (
    'knn',
    'low_shot',
    'linear_cached',
    'linear',
    'finetune',
    'robustness',
  )  # And 'low_shot_finetune'; and 'restoration', of checkpoints with a reconstruction head.

  c.evaluation.feature = ''  # '': the run's own; 'pooled' where the checkpoint is none.

  # '': those of the run in the checkpoint.
  c.data.source = given.data or ('folder' if given.path else '')
  c.data.name, c.data.path = given.name, given.path

  c.low_shot = ml_collections.ConfigDict()
  c.low_shot.images_a_class = (1, 2, 5, 10)
  c.low_shot.shares = (0.01, 0.1)  # Of the labels.
  c.low_shot.draws = 5
  # C on unit vectors, by cross-validation inside the labelled images; from the smallest on, until two are worse.
  c.low_shot.regularisers = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)

  c.linear_cached = ml_collections.ConfigDict()
  c.linear_cached.regularisers = (10.0, 100.0, 1e3, 1e4)  # C on unit vectors, by cross-validation.
  c.linear_cached.folds = 3

  c.robustness = ml_collections.ConfigDict()
  c.robustness.classifiers = (
    'linear_cached',
  )  # And 'finetune', which the papers attack: it trains.
  c.robustness.limit = 0  # Test images, an even share of each class; 0: all.
  # [D] PGD (arXiv 1706.06083) in five steps of half of epsilon, from a random start. On CIFAR-10 attacks of 8/255 are
  # usual.
  c.robustness.attacks = ('fgsm', 'pgd')
  c.robustness.epsilon = 1 / 255
  c.robustness.pgd_steps = 5
  c.robustness.pgd_step_size = 0.5 / 255  # 0: 2.5 epsilon / steps, as Madry et al. have it.
  c.robustness.severities = (1, 2, 3, 4, 5)
  c.robustness.corruptions = (
    'gaussian_noise',
    'shot_noise',
    'impulse_noise',
    'defocus_blur',
    'motion_blur',
    'zoom_blur',
    'brightness',
    'contrast',
    'pixelate',
  )
  # mCE (arXiv 1903.12261) is relative to this results.json of another checkpoint; '': none.
  c.robustness.baseline = ''
  # Other images of the training set's classes, each 'name=DIR' of DIR/<class>/: ImageNet-A, -R, -Sketch.
  c.robustness.folders = ()

  # Training runs from the checkpoint, each a whole recipe: --config.linear.total_steps=200 and the like.
  names = {'model': given.model if given.model != 'vit_l' else 'vit_b'}
  names |= {name: given[name] for name in ('cifar10', 'smoke', 'data', 'name', 'path')}
  trained = config_lib.format_arg(names)
  c.linear_validation = 0.1  # Share of the training images that chooses the head.
  c.linear = config_lib.sibling(__file__, 'linear.py', trained)
  c.finetune = config_lib.sibling(__file__, 'finetune.py', trained)

  # Runs of `finetune` with few labels, one for each amount and draw: not in `evaluations` by default.
  c.low_shot_finetune = ml_collections.ConfigDict()
  c.low_shot_finetune.images_a_class = (1, 10)
  c.low_shot_finetune.shares = (0.01, 0.1)
  c.low_shot_finetune.draws = 3
  c.low_shot_finetune.total_steps = (
    c.finetune.total_steps or 1000
  )  # An epoch of ten images is no measure.
  c.low_shot_finetune.batch_size = min(c.finetune.batch_size, 256)
  return c
