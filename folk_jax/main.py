"""The command: flags, configuration, checks, one task.

  python -m folk_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

A workdir that holds a run is resumed. Any field is set with --config.a.b=value; recipes take arguments after a colon,
such as --config=configs/vit_b.py:data=folder,path=/images. Exit status: 0 done, 2 a mistake in what was asked (one
line on stderr), 1 anything else.
"""

import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from folk_jax import cli
from folk_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Recipe, such as configs/vit_b.py:smoke; every field can be overridden.',
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where the run lives: config.json, metrics.jsonl, tensorboard/, checkpoints/, export/.',
)
flags.mark_flags_as_required(['config', 'workdir'])


def _pretrain(config, workdir: str) -> None:
  # Imported here, so that --help and mistyped flags needn't wait for jax.
  from folk_jax.train import loop
  from folk_jax.train.guard import RunStopped

  try:
    loop.pretrain(config, workdir)
  except RunStopped as stopped:
    print(f'stopped: {stopped}', file=sys.stderr)
    sys.exit(1)


def _evaluate(config, workdir: str) -> None:
  from folk_jax import evaluate

  evaluate.evaluate(config, workdir)


TASKS: dict[str, Callable] = {'pretrain': _pretrain, 'evaluate': _evaluate}


def main(argv: Sequence[str]) -> None:
  """Runs the configuration's task."""
  del argv
  config = _CONFIG.value
  if config.task not in TASKS:
    raise config_lib.unknown('task', config.task, TASKS)
  config_lib.validate(config)
  TASKS[config.task](config, _WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
