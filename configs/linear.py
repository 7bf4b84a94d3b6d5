"""Linear probe of a frozen backbone: DINO's protocol (arXiv 2104.14294), all learning rates and features in one run.

  python -m folk_jax.main --config=configs/linear.py:init_from=runs/vit_b --workdir=runs/linear_b
  python -m folk_jax.main --config=configs/linear.py:model=vit_s,init_from=FILE.safetensors --workdir=runs/linear_s
  python -m folk_jax.main --config=configs/linear.py:model=resnet50,init_from=runs/resnet50 --workdir=runs/linear_50
  python -m folk_jax.main --config=configs/linear.py:cifar10,path=DIR,init_from=runs/cifar10 --workdir=runs/linear_cifar

What differs from the base recipe stands here; every other knob is in vit_b.py. Fields marked [D] are our decisions;
docs/fidelity.md lists them with reasons.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_b|vit_s|resnet50, init_from=WEIGHTS, cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  models = ('vit_b', 'vit_s', 'resnet50')
  c, given = config_lib.base_recipe(__file__, arg, models=models, init_from='')

  c.init_from = (
    given.init_from
  )  # The weights that are probed; '' probes a fresh network, a baseline.

  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'linear_probe'
  # [D] The sweep: half decades on both sides of DINO's 0.001. For 256 images, scaled by batch_size / 256.
  c.objective.learning_rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
  # DINO: 'last4' for ViT-S, 'concat' for ViT-B; a ResNet has no class tokens.
  c.objective.features = ('pooled', 'concat', 'last4')
  if c.model.name == 'resnet':
    c.objective.features = ('pooled',)
  elif c.model.depth < 4:  # smoke
    c.objective.features = ('pooled', 'concat')

  # SGD alone: a head's rate multiplies its loss, which is that rate's run only if nothing couples the heads.
  c.optimizer.name = 'sgd'
  c.optimizer.momentum = 0.9
  c.optimizer.learning_rate = 1.0  # Times a head's own rate.
  c.optimizer.final_learning_rate = 0.0  # Cosine, per step.
  c.optimizer.warmup_epochs = 0.0
  c.optimizer.weight_decay = c.optimizer.final_weight_decay = 0.0
  c.optimizer.clip = 0.0
  c.optimizer.freeze_last_layer_epochs = 0.0
  c.optimizer.frozen = ('backbone',)
  c.teacher.enabled = False
  del c.projection

  # One view, a random crop and a flip.
  del c.views.view_2
  c.views.view_1.update(
    {'scale': (0.08, 1.0), 'blur_probability': 0.0, 'solarise_probability': 0.0}
  )
  c.views.view_1.update({'jitter_probability': 0.0, 'grayscale_probability': 0.0})

  c.evaluation.update({'which': 'student', 'knn': (), 'held_out_images': 0, 'at_start': False})
  if 'drop_path' in c.model:
    c.model.drop_path = 0.0
  if given.smoke or given.cifar10:
    return c  # The length and the batch of the small recipe.

  c.epochs, c.batch_size = 100, 1024
  return c
