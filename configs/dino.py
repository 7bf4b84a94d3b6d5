"""DINO on ImageNet-1K (arXiv 2104.14294; values of its official code). Every other knob stands in vit_b.py.

python -m folk_jax.main --config=configs/dino.py --workdir=runs/dino_vit_s
python -m folk_jax.main --config=configs/dino.py:local_crops=10 --workdir=runs/dino_vit_s_multicrop
python -m folk_jax.main --config=configs/dino.py:model=vit_b --workdir=runs/dino_vit_b
python -m folk_jax.main --config=configs/dino.py:cifar10,path=DIR --workdir=runs/dino_cifar10
"""

import ml_collections

from folk_jax import config as config_lib

# What FOLK's recipe and DINO's share: temperatures and the centre.
SHARED = (
  'student_temperature',
  'teacher_temperature',
  'teacher_temperature_start',
  'teacher_temperature_epochs',
  'centre_momentum',
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: model=vit_s|vit_b|resnet50, local_crops=N, cifar10, smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  models = ('vit_s', 'vit_b', 'resnet50')
  c, given = config_lib.base_recipe(__file__, arg, models=models, local_crops=0)
  shared = {name: c.objective[name] for name in SHARED}
  c.objective = ml_collections.ConfigDict({'name': 'dino', **shared})

  # Small crops that the student alone sees; 0: two views, as FOLK has.
  c.local_views = ml_collections.ConfigDict(c.views.view_2.to_dict())
  c.local_views.update(
    {'blur_probability': 0.5, 'solarise_probability': 0.0, 'scale': (0.05, 0.25)}
  )
  c.local_views.count = given.local_crops
  c.local_views.size = 96 if c.image_size > 32 else 16
  if given.local_crops:
    for view in (c.views.view_1, c.views.view_2):
      view.scale = (0.25, 1.0)
  if not (given.smoke or given.cifar10):
    c.projection.outputs = 65536
  return c
