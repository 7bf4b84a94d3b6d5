"""Fine-tuning with all labels on ImageNet-1K: MFM's recipe for ViTs (arXiv 2206.07706 and its code), 100 or 200 epochs.

  python -m folk_jax.main --config=configs/finetune.py --config.init_from=runs/vit_b --workdir=runs/vit_b_finetuned
  python -m folk_jax.main --config=configs/finetune.py:model=vit_s --config.init_from=runs/vit_s --workdir=runs/s_tuned
  python -m folk_jax.main --config=configs/finetune.py:model=resnet50 --config.init_from=runs/resnet50 --workdir=runs/r
  python -m folk_jax.main --config=configs/finetune.py:cifar10,path=DIR --config.init_from=runs/cifar10 --workdir=runs/c

init_from is the workdir of a pre-training run (its teacher's backbone, where it has one), or weights in timm's names
(.safetensors, .npz) or big_vision's (.npz); the head starts fresh. Without it this trains from scratch. What differs
from vit_b.py stands here; every other knob is there.

Few labels: --config.data.images_a_class=5 (or --config.data.label_share=0.01) with --config.data.label_seed=0, and
--config.total_steps, since an epoch is of those images alone.

The best checkpoint beside the last, chosen by images held out of the training split, never by test images:
  --config.checkpoint.best=eval/top1 --config.data.validation=0.02 --config.evaluation.split=validation
It is kept in WORKDIR/best. init_from=WORKDIR/best starts from it; export takes it with --checkpoint=best.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_b|vit_s|resnet50, cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  models = ('vit_b', 'vit_s', 'resnet50')
  c, given = config_lib.base_recipe(__file__, arg, models=models)
  resnet = c.model.name == 'resnet'

  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'supervised'
  c.objective.pooling = 'mean_patch'  # Or 'pooled': the class token, or a ResNet's average.
  c.objective.head_norm = True  # A LayerNorm before the classifier.
  c.objective.head_scale = 1e-3  # Of the fresh classifier, times 0.02.
  c.objective.label_smoothing = 0.1
  c.objective.mixup = 0.8  # a of the Beta(a, a) of what an image keeps; 0: none.
  c.objective.cutmix = 1.0
  c.objective.mix_probability = 1.0  # That a batch is mixed ...
  c.objective.switch_probability = 0.5  # ... and by cutmix, where both are on.
  c.objective.erasing = 0.25

  # One view, and a moving average of the weights only if asked for: it is then what is judged.
  c.teacher.enabled = False
  c.teacher.momentum = c.teacher.momentum_final = 0.9999
  del c.projection
  del c.views.view_2
  c.views.view_1.update({'scale': (0.08, 1.0), 'flip': 0.5, 'randaugment': 'rand-m9-mstd0.5-inc1'})
  c.views.view_1.update({'jitter_probability': 0.0, 'grayscale_probability': 0.0})
  c.views.view_1.update({'blur_probability': 0.0, 'solarise_probability': 0.0})
  c.evaluation.update({'which': 'student', 'knn': (), 'held_out_images': 0, 'at_start': False})

  c.optimizer.freeze_last_layer_epochs = 0.0
  c.optimizer.schedule = 'timm'
  c.optimizer.weight_decay = c.optimizer.final_weight_decay = 0.05
  c.optimizer.decay_exclude = ('cls_token', 'pos_embed')
  c.optimizer.clip = 0.0
  if resnet:
    c.objective.update({'pooling': 'pooled', 'head_norm': False, 'head_scale': 0.5})
  else:
    c.optimizer.layer_decay = 0.8
    c.evaluation.feature = 'mean_patch'
  if given.smoke:
    return c
  if given.cifar10:
    # A thousand steps of a small model underfit: less to overcome, and no epochs to warm up for.
    c.objective.update({'mixup': 0.0, 'cutmix': 0.0, 'erasing': 0.0})
    c.views.view_1.update({'scale': (0.35, 1.0), 'randaugment': ''})
    c.optimizer.learning_rate = 2e-3  # For 256 images.
    c.teacher.momentum = c.teacher.momentum_final = 0.99
    return c

  c.batch_size = 2048
  c.epochs = 200 if given.model == 'vit_s' else 100
  c.eval_every = 6255  # 10 epochs.
  c.optimizer.learning_rate = 1e-3  # For 256 images: 2e-3 for 512.
  c.optimizer.final_learning_rate = 1e-6  # 2.5e-7 for 512 images.
  c.optimizer.warmup_epochs = 5.0
  if resnet:
    # A3 of "ResNet strikes back" (arXiv 2110.00476), which MFM takes. [D] It has LAMB at 8e-3, a binary cross-entropy
    # and tests at 224 pixels; here AdamW, a softmax, and 160 pixels throughout.
    c.image_size, c.data.test_resize = 160, 168
    c.objective.update({'mixup': 0.1, 'label_smoothing': 0.0, 'erasing': 0.0})
    c.views.view_1.randaugment = 'rand-m6-mstd0.5-inc1'
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.weight_decay = c.optimizer.final_weight_decay = 0.02
  return c
