"""A FOLK objective small enough to compile in seconds."""

from collections.abc import Callable

import pytest

from folk_jax import models
from folk_jax.objectives import Objective, Parts, make_objective
from folk_jax.signal.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation

IMAGE_SIZE = 16
NO_AUGMENTATION = (Augmentation(), Augmentation())
FOLK_FIELDS = {
  'filter': 'com_rcom',
  'radius': 16.0,
  'portions': (0.05,),
  'com_probability': 0.5,
  'ranking': 'shared',
  'clamp': False,
  'gamma': 1.0,
  'reduce': 'per_image',
  'reconstruction_weight': 1.0,
  'distillation_weight': 1.0,
  'patch_weight': 0.0,
  'student_temperature': 0.1,
  'teacher_temperature': 0.07,
  'teacher_temperature_start': 0.04,
  'teacher_temperature_epochs': 2.0,
  'centre_momentum': 0.9,
}


@pytest.fixture(scope='session')
def folk_fields() -> dict:
  """Every field of `config.objective` but its name."""
  return dict(FOLK_FIELDS)


@pytest.fixture(scope='session')
def make_folk() -> Callable[..., Objective]:
  """`make_folk(augmentations, depth, dtype, has_teacher, **fields)`: two views of 16 pixels, 24 prototypes."""

  def make(augmentations=NO_AUGMENTATION, depth=2, dtype='float32', has_teacher=True, **fields):
    backbone = models.make_backbone(
      'vit', IMAGE_SIZE, width=24, depth=depth, heads=2, patch=8, drop_path=0.3, dtype=dtype
    )
    parts = Parts(
      backbone=backbone,
      model='vit',
      image_size=IMAGE_SIZE,
      patch=8,
      projection={
        'hidden': 32,
        'bottleneck': 16,
        'outputs': 24,
        'layers': 2,
        'norm_last_layer': True,
      },
      augmentations=augmentations,
      mean=IMAGENET_MEAN,
      std=IMAGENET_STD,
      steps_per_epoch=5.0,
      has_teacher=has_teacher,
      dtype=dtype,
    )
    return make_objective('folk', parts, FOLK_FIELDS | fields)

  return make
