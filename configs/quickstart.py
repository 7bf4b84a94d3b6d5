"""FOLK on photographs that ship inside scikit-image and scikit-learn: minutes on 2 CPU cores, nothing to download.

  python -m folk_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

What differs from vit_b.py, and why, stands here; every other knob is there.
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: smoke, data=SOURCE, name=TFDS_NAME, path=DIR."""
  given = config_lib.parse_arg(arg, smoke=False, data='embedded', name='', path='')
  c = config_lib.sibling(__file__, 'vit_b.py', 'smoke' if given.smoke else '')
  c.data.update({'source': given.data, 'name': given.name, 'path': given.path})
  if given.smoke:
    return c

  # Small enough for 200 images a second on two cores.
  c.batch_size = 64
  c.image_size = 32
  c.epochs, c.total_steps = 0, 800
  c.model.update({'width': 96, 'depth': 3, 'heads': 3, 'patch': 4, 'drop_path': 0.0})
  c.projection.update({'hidden': 256, 'bottleneck': 64, 'outputs': 256})

  # Eight hundred steps instead of 375,000: larger steps, a teacher that follows within a hundred.
  c.optimizer.learning_rate = 6e-3  # For 256 images: 1.5e-3 here.
  c.optimizer.warmup_epochs = 1.0
  c.optimizer.final_weight_decay = 0.04
  c.objective.teacher_temperature_epochs = 10.0
  c.teacher.momentum = 0.98

  # At 32 pixels a blur leaves nothing to rebuild; and photographs differ by their colours first.
  for view in (c.views.view_1, c.views.view_2):
    view.update(
      {'blur_probability': 0.0, 'solarise_probability': 0.0, 'grayscale_probability': 0.0}
    )
    view.update({'brightness': 0.2, 'contrast': 0.2, 'saturation': 0.1, 'hue': 0.02})

  c.data.update({'workers': 0, 'threads': 2, 'prefetch': 4, 'test_resize': 36})
  c.evaluation.update({'batch_size': 256, 'knn': (1, 5, 20)})
  c.checkpoint.update({'every': 200, 'permanent_every': 0})
  c.log_every, c.eval_every = 20, 200
  return c
