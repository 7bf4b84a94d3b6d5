"""MFM, masked frequency modelling, on ImageNet-1K: 300 epochs, batch 2048 (arXiv 2206.07706; values of its code).

  python -m folk_jax.main --config=configs/mfm.py --workdir=runs/mfm_vit_b
  python -m folk_jax.main --config=configs/mfm.py:model=vit_s --workdir=runs/mfm_vit_s
  python -m folk_jax.main --config=configs/mfm.py:model=resnet50 --workdir=runs/mfm_resnet50
  python -m folk_jax.main --config=configs/mfm.py:filter=com_rcom --workdir=runs/mfm_com_rcom     # FOLK's ablation
  python -m folk_jax.main --config=configs/mfm.py:cifar10,path=DIR --workdir=runs/mfm_cifar10

What differs from vit_b.py stands here; every other knob is there. docs/fidelity.md has the sources.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_b|vit_s|resnet50, cifar10, filter=NAME, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  models = ('vit_b', 'vit_s', 'resnet50')
  c, given = config_lib.base_recipe(__file__, arg, models=models, filter='radial')

  portions = c.objective.portions
  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'mfm'
  c.objective.filter = (
    given.filter
  )  # Low- or high-pass by a disk; 'com_rcom' and others are ablations.
  c.objective.radius = 16.0  # Of the disk at 224 px; scaled with the image.
  c.objective.com_probability = 0.3 if given.model == 'resnet50' else 0.5  # P(low-pass).
  c.objective.portions = portions  # FOLK's, for filters that select a share; the disk doesn't.
  c.objective.ranking = 'shared'
  c.objective.clamp = True
  c.objective.gamma = 1.0
  c.objective.reduce = 'pooled'  # One mean over the masked coefficients of the batch.

  # No teacher, one view without colour changes, and features for kNN from the patches: no loss trains the class token.
  c.teacher.enabled = False
  del c.projection
  del c.views.view_2
  c.views.view_1.update({'scale': (0.2, 1.0), 'blur_probability': 0.0, 'solarise_probability': 0.0})
  c.views.view_1.update({'jitter_probability': 0.0, 'grayscale_probability': 0.0})
  c.evaluation.update({'which': 'student', 'feature': 'mean_patch'})
  c.optimizer.freeze_last_layer_epochs = 0.0
  if 'drop_path' in c.model:
    c.model.drop_path = 0.0
  if given.smoke or given.cifar10:
    return c  # The optimiser of the small recipe.

  c.epochs, c.batch_size = 300, 2048
  c.optimizer.learning_rate = 1.5e-4  # For 256 images: 3e-4 for 512.
  c.optimizer.final_learning_rate = 1e-5  # 2.5e-6 for 512 images.
  c.optimizer.warmup_epochs = 20.0
  c.optimizer.schedule = 'timm'
  c.optimizer.weight_decay = c.optimizer.final_weight_decay = 0.05
  c.optimizer.decay_exclude = ('cls_token', 'pos_embed')
  c.optimizer.b2 = 0.95
  c.optimizer.clip_by = 'global'
  return c
