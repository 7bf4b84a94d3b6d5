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
  c.data.update({'source': given.data, 'name': given.name, 'path': given.path, 'test_split': 'test'})
  if given.smoke:
    return c

  c.batch_size = 64
  c.image_size = 32
  c.epochs, c.total_steps = 0, 1000
  c.model.update({'width': 96, 'depth': 3, 'heads': 3, 'patch': 4, 'drop_path': 0.0, 'dtype': 'float32'})
  c.projection.update({'hidden': 256, 'bottleneck': 64, 'outputs': 512})
  c.optimizer.warmup_epochs = 2.0
  c.objective.teacher_temperature_epochs = 10.0
  c.data.update({'workers': 0, 'threads': 2, 'prefetch': 4, 'test_resize': 36})
  c.evaluation.update({'batch_size': 256, 'knn': (1, 5, 20)})
  c.checkpoint.update({'every': 250, 'permanent_every': 0})
  c.log_every, c.eval_every = 20, 250
  return c
