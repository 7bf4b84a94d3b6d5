"""MFM's three restoration tasks (arXiv 2206.07706, section 3.1): super-resolution, deblurring, denoising.

  python -m folk_jax.main --config=configs/restoration.py:task=super_resolution --workdir=runs/super_resolution
  python -m folk_jax.main --config=configs/restoration.py:task=deblur,model=resnet50 --workdir=runs/deblur_resnet50
  python -m folk_jax.main --config=configs/restoration.py:task=denoise,cifar10,path=DIR --workdir=runs/denoise_cifar10

The recipe is mfm.py's; only the corruption differs, and the loss runs over the whole spectrum.
"""

import ml_collections

from folk_jax import config as config_lib

# By task: the values of MFM's code at 224 px, and [D] what they become at 32 px, where an image has a seventh of the
# pixels a side and an 8-fold reduction would leave 4 of them.
TASKS = {
  'super_resolution': ({'factor': 8}, {'factor': 4}),
  'deblur': (
    {'sigma': 5.0, 'kernel_sizes': (7, 9, 11, 13, 15, 17, 19, 21)},
    {'sigma': 1.0, 'kernel_sizes': (3, 5)},
  ),
  'denoise': ({'sigma': 75 / 255}, {'sigma': 75 / 255}),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: task=super_resolution|deblur|denoise, and what mfm.py takes but filter."""
  given = config_lib.parse_arg(
    arg,
    task='super_resolution',
    model='',
    cifar10=False,
    smoke=False,
    data='',
    name='',
    path='',
  )
  task = given.task
  if task not in TASKS:
    raise config_lib.unknown('recipe argument task', task, TASKS)
  rest = {name: value for name, value in given.items() if name != 'task'}
  c = config_lib.sibling(__file__, 'mfm.py', config_lib.format_arg(rest))
  paper, small = TASKS[task]
  values = small if c.image_size <= 32 else paper
  c.objective = ml_collections.ConfigDict({'name': task, 'gamma': 1.0, **values})
  return c
