"""Training faults, tried in real runs of the loop: numbers that are not finite, losses that stand out, collapse.

  python benchmarks/faults/training.py

Most trials train the linear method of tests/support/brittle.py, in which chosen images divide by zero; divergence and
collapse are FOLK's own, of settings that bring them about. Writes benchmarks/results/faults_training.json.
"""

import contextlib
import importlib.util
import json
import pathlib
import random
import shutil
import sys
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common
import jax
import numpy as np
from absl import flags, logging

from folk_jax import checkpoint, distributed, objectives, replay
from folk_jax import config as config_lib
from folk_jax.train import faults, loop, metrics
from folk_jax.train.guard import RunStopped

ROOT = pathlib.Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location('brittle', ROOT / 'tests/support/brittle.py')
brittle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(brittle)
objectives.OBJECTIVES['brittle'] = brittle.Brittle

_IMAGES, _STEPS = 40, 12


def recipe() -> Any:
  return config_lib.load_recipe(str(ROOT / 'configs/vit_b.py'), 'smoke')


def train(config: Any, workdir: pathlib.Path, until: int = 0) -> tuple[str, list[str]]:
  """Runs the loop; what stopped it, and what was warned of. `until`: told to end after that step."""
  config_lib.validate(config)
  said: list[str] = []
  with _hearing(said), _ending(until):
    try:
      loop.pretrain(config, str(workdir))
    except (RunStopped, distributed.Preempted) as stopped:
      return str(stopped), said
  return '', said


@contextlib.contextmanager
def _hearing(said: list[str]) -> Iterator[None]:
  warning = logging.warning

  def hear(text: str, *values: Any) -> None:
    said.append(text % values if values else text)

  logging.warning = hear
  try:
    yield
  finally:
    logging.warning = warning


@contextlib.contextmanager
def _ending(step: int) -> Iterator[None]:
  told = distributed.preempted
  if step:
    distributed.preempted = lambda now: now == step
  try:
    yield
  finally:
    distributed.preempted = told


def state_of(workdir: pathlib.Path, step: int) -> tuple[Any, dict[str, Any]]:
  return checkpoint.read_subtree(str(workdir / 'checkpoints'), (), step)[:2]


def differing(one: Any, other: Any) -> list[str]:
  pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for (path, a), b in pairs
    if not np.array_equal(a, b)
  ]


class Faults:
  """The trials; each in a folder of its own."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def fresh(self, name: str, number: int) -> pathlib.Path:
    workdir = self._folder / f'{name}_{number}'
    shutil.rmtree(workdir, ignore_errors=True)
    return workdir

  def skipped(self, number: int) -> str:
    bad = random.Random(number).randrange(_IMAGES)
    changes = {'seed': number, 'accumulate': 1 + number % 2, 'checkpoint.every': 1}
    changes |= {'checkpoint.keep': _STEPS}
    whole, told = self.fresh('whole', number), self.fresh('told', number)
    stopped, said = train(brittle.make_config(recipe(), (bad,), **changes), whole)
    lines = [line for line in metrics.read_metrics(str(whole)) if 'train/loss' in line]
    skipped = [line['step'] for line in lines if line['train/nonfinite']]
    if stopped or len(lines) != _STEPS or not skipped:
      return f'the run did not go on past image {bad} ({stopped or "no step met it"})'
    if not said or lines[-1]['train/skipped_steps'] != len(skipped):
      return 'skipped steps were not said or counted'
    for step in skipped:
      if bad not in faults.read(str(whole), step)[0]['indices']:
        return f'the images of step {step} were not kept'
    at = next((step for step in skipped if 1 < step < _STEPS and step - 1 not in skipped), 0)
    if not at:
      return ''
    train(brittle.make_config(recipe(), (bad,), **changes), told, until=at)
    (before, _), (after, _) = state_of(told, at - 1), state_of(told, at)
    moved = [name for name in differing(after, before) if not name.endswith(('count', 'step'))]
    if moved or any('/0/count' in name for name in differing(after, before)):
      return f'step {at} was skipped and moved {", ".join(moved)}'
    train(brittle.make_config(recipe(), (bad,), **changes), told)
    if others := differing(state_of(told, _STEPS)[0], state_of(whole, _STEPS)[0]):
      return f'resumed after step {at}, the run ends with another {others[0]}'
    return ''

  def replayed(self, number: int) -> str:
    bad = random.Random(100 + number).randrange(_IMAGES)
    workdir = self.fresh('replayed', number)
    train(brittle.make_config(recipe(), (bad,), seed=number), workdir)
    files = sorted((workdir / faults.FOLDER).glob('*.json'))
    for step in [json.loads(file.read_text())['step'] for file in files][:2]:
      lines, is_finite = replay.replay(str(workdir), step, catch_up=bool(number % 2))
      if is_finite or f'in image {bad}: weighing: div gave nan' not in lines[-1]:
        return f'replaying step {step} did not name image {bad}: {lines[-1]}'
    return '' if files else f'no file of image {bad}'

  def diverging(self, number: int) -> str:
    """A learning rate at which weights of 1e30 overflow in the next step."""
    config = small_folk(seed=number, total_steps=40)
    config.update_from_flattened_dict(
      {
        'optimizer.learning_rate': 1e30,
        'optimizer.warmup_epochs': 0.0,
        'guard.max_skipped': 4,
        'checkpoint.every': 1,
        'checkpoint.keep': 40,
      }
    )
    workdir = self.fresh('diverging', number)
    stopped, _ = train(config, workdir)
    if 'steps in a row were skipped' not in stopped or 'learning_rate' not in stopped:
      return f'the run was not stopped in words: {stopped!r}'
    lines = [line for line in metrics.read_metrics(str(workdir)) if 'train/loss' in line]
    if not 5 <= lines[-1]['step'] <= 12:
      return f'the run was stopped at step {lines[-1]["step"]} only'
    saved = [int(path.name) for path in (workdir / 'checkpoints').glob('[0-9]*')]
    if not saved:
      return 'no checkpoint was kept'
    for step in saved:
      tree, _ = state_of(workdir, step)
      if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
        return f'the checkpoint of step {step} holds numbers that are not finite'
    return ''

  def debugged(self, number: int) -> str:
    bad = random.Random(200 + number).randrange(_IMAGES)
    changes = {'seed': number, 'debug': True, 'accumulate': 1 + number % 2}
    workdir = self.fresh('debugged', number)
    stopped, _ = train(brittle.make_config(recipe(), (bad,), **changes), workdir)
    wanted = f'First in image {bad}: weighing: div gave nan'
    return '' if wanted in stopped else f'the checks did not name image {bad}: {stopped}'

  def spiking(self, number: int) -> str:
    loud = random.Random(300 + number).randrange(_IMAGES)
    changes = {'seed': number, 'total_steps': 80, 'optimizer.learning_rate': 1e-4}
    config = brittle.make_config(recipe(), (), (loud,), **changes)
    workdir = self.fresh('spiking', number)
    _, said = train(config, workdir, until=60)
    train(config, workdir)
    lines = [json.loads(line) for line in (workdir / 'spikes.jsonl').read_text().splitlines()]
    losses = {
      line['step']: line['train/loss']
      for line in metrics.read_metrics(str(workdir))
      if 'train/loss' in line
    }
    usual = np.median(list(losses.values()))
    expected = [step for step, loss in losses.items() if step > 32 and loss > 10 * usual]
    found = [line['step'] for line in lines]
    if found != expected or not all(loud in line['indices'] for line in lines):
      return f'image {loud} made steps {expected} stand out, and spikes.jsonl has {found}'
    warned = sum('median absolute deviations' in one for one in said)
    return '' if warned == 1 else f'{warned} warnings where one was due'

  def collapsing(self, number: int) -> str:
    name, words, changes = _COLLAPSES[number % len(_COLLAPSES)]
    config = small_folk(seed=number, total_steps=60)
    config.update_from_flattened_dict(changes)
    stopped, said = train(config, self.fresh('collapsing', number))
    found = [one for one in said if 'collapse at step' in one]
    if stopped or not any(words in one for one in found):
      return f'{name} was not warned of: {stopped or found}'
    return ''


def small_folk(**changes: Any) -> Any:
  """FOLK with a ViT of two blocks on synthetic images."""
  config = recipe()
  config.update_from_flattened_dict(
    {
      'image_size': 16,
      'model.width': 24,
      'model.heads': 2,
      'projection.outputs': 24,
      'data.source': 'synthetic',
      'data.limit': 64,
      'data.test_resize': 0,
      'evaluation.knn': (),
      'evaluation.held_out_images': 1,
      'evaluation.at_start': False,
      'checkpoint.every': 0,
      'logging.tensorboard': False,
      'logging.progress': False,
    }
    | changes
  )
  for view in (config.views.view_1, config.views.view_2):
    view.update({'jitter_probability': 0.0, 'blur_probability': 0.0})
  return config


# Name, words of the warning, what brings it about.
_COLLAPSES = (
  (
    'a uniform teacher',
    'the teacher is uniform',
    # Centred and not sharpened (DINO, section 5.3).
    {'objective.teacher_temperature': 2.0, 'objective.teacher_temperature_start': 2.0},
  ),
  (
    'a teacher with one output',
    'one output',
    # Sharpened and not centred (DINO, section 5.3), by a teacher that is the student.
    {
      'objective.centre_momentum': 1.0,
      'objective.teacher_temperature': 0.002,
      'objective.teacher_temperature_start': 0.002,
      'objective.reconstruction_weight': 0.0,
      'teacher.momentum': 0.0,
      'teacher.momentum_final': 0.0,
      'optimizer.learning_rate': 0.1,
      'optimizer.freeze_last_layer_epochs': 0.0,
    },
  ),
  (
    'constant features of a reconstruction',
    'share one feature',
    # A weight decay that leaves a tenth of the weights each step.
    {
      'objective.distillation_weight': 0.0,
      'teacher.momentum': 0.0,
      'teacher.momentum_final': 0.0,
      'optimizer.learning_rate': 0.016,
      'optimizer.weight_decay': 900.0,
      'optimizer.final_weight_decay': 900.0,
    },
  ),
)


def main(argv: list[str]) -> None:
  given = common.parser(__doc__, __file__).parse_args(argv[1:])
  flags.FLAGS.mark_as_parsed()
  given.workdir.mkdir(parents=True, exist_ok=True)
  tries = Faults(given.workdir.resolve())
  rows = [
    common.Fault(
      'a loss and a gradient that are not finite',
      "The step is skipped: weights, optimiser, teacher and the method's own state stay as they were, bit for bit; it "
      'is counted and said, its images are kept, and the run goes on.',
      'Trains on 40 images, one of which divides by zero, with and without microbatches; stops the run at a skipped '
      "step, compares the states, resumes, and compares the end with the uninterrupted run's.",
      tries.skipped,
      8,
    ),
    common.Fault(
      'a run that diverges',
      'It is stopped past as many skipped steps in a row as the settings allow, in words, and no checkpoint holds a '
      'number that is not finite.',
      'Trains FOLK at a learning rate of 1e30.',
      tries.diverging,
      3,
    ),
    common.Fault(
      'a step that is looked into afterwards',
      'folk_jax.replay makes the step again from a checkpoint and names the image and the operation.',
      'Trains with one image of 40 that divides by zero, and replays two of the skipped steps.',
      tries.replayed,
      6,
    ),
    common.Fault(
      'a mistake in the arithmetic, with config.debug',
      'The first check that fails stops the run and names image and operation.',
      'Trains with checks and one image of 40 that divides by zero, with and without microbatches.',
      tries.debugged,
      6,
    ),
    common.Fault(
      'a loss that stands out',
      'Each is written to spikes.jsonl with its images, once, also when the run is resumed between; one is said.',
      'Trains 80 steps with one image of 40 whose loss counts a thousandfold, interrupted at step 60.',
      tries.spiking,
      4,
    ),
    common.Fault(
      'collapse',
      'A uniform teacher, a teacher with one output and constant features are warned of by name, with what to try.',
      'Trains FOLK without sharpening, without centring, and (reconstruction alone) with a weight decay that shrinks '
      'the weights tenfold a step; in turn.',
      tries.collapsing,
      6,
    ),
  ]
  common.main(rows, given, 'training faults')


if __name__ == '__main__':
  main(sys.argv)
