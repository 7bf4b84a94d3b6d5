"""The study: every method and ablation, row by row, as far as the time goes, resumable; tables are made from its JSON.

  python benchmarks/study.py --study=cpu --path=data/cifar10 --minutes=60           # or as long as it takes, without
  python benchmarks/study.py --study=imagenet10 --path=data/imagenet10 --minutes=25 # a GPU
  python benchmarks/study.py --study=cpu --list                                     # what is there, and what is not
  python benchmarks/study_page.py                                                   # docs/study.md and its figures

A row is a method, a budget and a seed; its parts are training and the evaluations of what was trained. Started again
with the same command it goes on: finished parts stand in the JSON, an unfinished run resumes from its checkpoint.
Started several times side by side, the commands share the rows among them: a small network uses two cores better as
two runs (`taskset -c 0 python benchmarks/study.py ... & taskset -c 1 python benchmarks/study.py ...`), and several GPUs
as one run each (CUDA_VISIBLE_DEVICES).
Equal epochs: every method sees the images equally often. Equal compute: every method trains for as many products of
matrices as the study's first one (counted by tracing its step, no figure of which is typed).
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import report
from studies import STUDIES, UNTRAINED_STEPS, Method, Study

from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.evals import results as results_lib
from folk_jax.train import metrics


class OutOfTime(Exception):
  """The minutes are over; what ran keeps its checkpoint."""


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--study', required=True, help=f'one of {", ".join(STUDIES)}')
  add('--path', help='its images, as train/<class>/ and test/<class>/ (or val/)')
  add(
    '--minutes',
    type=float,
    default=0.0,
    help='start and run nothing after so many (default no limit)',
  )
  add('--only', default='', help='names of methods, separated by semicolons (default all)')
  add('--seeds', default='', help='separated by commas (default those of the study)')
  add(
    '--parts', default='', help="train, frozen, finetune, corruptions (default all of the study's)"
  )
  add('--budgets', default='', help='epochs, compute (default both)')
  add('--out', type=pathlib.Path, help='JSON (default benchmarks/results/study_<study>.json)')
  add('--workdir', type=pathlib.Path, help='holds the runs (default runs/study_<study>)')
  add('--list', action='store_true', help='say what has been run, and run nothing')
  flags = parser.parse_args()
  if flags.study not in STUDIES:
    raise config_lib.unknown('study', flags.study, STUDIES)
  study = STUDIES[flags.study]
  flags.out = flags.out or report.ROOT / 'benchmarks' / 'results' / f'study_{study.name}.json'
  flags.workdir = flags.workdir or pathlib.Path('runs') / f'study_{study.name}'
  if not flags.list and not flags.path:
    raise UserError(f'--path is missing: the folder of {study.data}')
  try:
    flags.seeds = [int(seed) for seed in flags.seeds.split(',')] if flags.seeds else study.seeds
  except ValueError:
    raise UserError(f'--seeds={flags.seeds}: give whole numbers separated by commas') from None
  names = [method.name for method in study.methods]
  flags.only = flags.only.split(';') if flags.only else names
  flags.parts = flags.parts.split(',') if flags.parts else ['train', *study.parts]
  flags.budgets = flags.budgets.split(',') if flags.budgets else ['epochs', 'compute']
  for what, given, known in (
    ('method', flags.only, names),
    ('part', flags.parts, ['train', *study.parts]),
    ('budget', flags.budgets, ['epochs', 'compute']),
  ):
    for one in given:
      if one not in known:
        raise config_lib.unknown(what, one, known)
  return flags


def recipe(study: Study, method: Method, path: str) -> str:
  """The --config of a method's training run."""
  own = '' if method.recipe == 'cifar10.py' and study.arg == 'cifar10' else study.arg
  items = ','.join(filter(None, (own, method.arg, config_lib.format_arg({'path': path}))))
  return f'configs/{method.recipe}:{items}'


def override(key: str, value: Any) -> str:
  """A field of the configuration as a flag: tuples and numbers as literals, text as it is."""
  if isinstance(value, tuple):
    inner = ','.join(f'"{one}"' if isinstance(one, str) else str(one) for one in value)
    value = f'({inner}{"," if len(value) == 1 else ""})'
  return f'--config.{key}={value}'


def is_untrained(method: Method) -> bool:
  return method.changes.get('optimizer.learning_rate') == 0.0


def configuration(study: Study, method: Method, path: str) -> Any:
  """The training run's configuration, to count its work."""
  text = recipe(study, method, path)
  file, _, arg = text.partition(':')
  spec = importlib.util.spec_from_file_location('recipe', report.ROOT / file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg)
  config.update_from_flattened_dict(dict(study.changes) | dict(method.changes))
  config.batch_size = study.batch_size
  return config


def flops_an_image(study: Study, method: Method, path: str) -> float:
  """Products of the networks in a training step, an image (a sample; two views where a method has two)."""
  import jax

  from folk_jax.compiled import step as step_lib

  target = step_lib.Target('', 1, jax.devices()[:1], None, None)
  config = step_lib.for_target(configuration(study, method, path), target)
  step, _ = step_lib.Compiler(method.recipe, target, 50_000, 10).expected(config)
  return step.model_flops / config.batch_size


class Rows:
  """The JSON of a study: rows by (method, budget, seed), written anew after each part.

  Other commands may write it, too: what they found out is read before anything is written or begun.
  """

  def __init__(self, study: Study, out: pathlib.Path):
    self._study, self._out = study, out
    self._asked = {'study': study.name, 'steps': study.steps, 'batch_size': study.batch_size}
    self._rows: dict[tuple, dict[str, Any]] = {}
    self.refresh()

  def refresh(self) -> None:
    """Takes in the parts that stand in the file.

    Raises:
      UserError: they are another study's.
    """
    if not self._out.exists():
      return
    found = report.read_json(self._out)
    asked = found.get('asked')
    if asked != self._asked:
      raise UserError(f'{self._out} holds {asked}, not {self._asked}: name another --out')
    for row in found['rows']:
      own = self._rows.setdefault((row['method'], row['budget'], row['seed']), row)
      own |= row | {'parts': own['parts'] | row['parts']}

  def row(self, method: Method, budget: str, seed: int) -> dict[str, Any]:
    key = (method.name, budget, seed)
    return self._rows.setdefault(
      key, {'method': method.name, 'budget': budget, 'seed': seed, 'parts': {}}
    )

  def seconds(self, part: str, method: Method) -> float:
    """What a part is expected to take: the longest that this method's took, or any method's."""
    took = {
      key[0]: row['parts'][part]['seconds']
      for key, row in self._rows.items()
      if part in row['parts']
    }
    return took.get(method.name, max(took.values(), default=0.0))

  def keep(self, row: dict[str, Any], part: str, values: dict[str, Any]) -> None:
    now = report.context()
    row['parts'][part] = values | {
      'date': now['date'],
      'load_average': now['machine']['load_average'],
    }
    order = [method.name for method in self._study.methods]
    with alone(self._out):
      self.refresh()
      rows = [row for row in self._rows.values() if row['parts']]
      rows.sort(
        key=lambda row: (row['budget'] == 'compute', row['seed'], order.index(row['method']))
      )
      what = {'what': f'Study: {self._study.title}', 'asked': self._asked}
      report.write_json(self._out, what | report.context(_device()) | {'rows': rows})


@contextlib.contextmanager
def alone(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Holds `path`'s lock, which ends with the process; False where another has it and `wait` is False."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path.with_name(f'{path.name}.lock'), 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
    else:
      yield True


def _device() -> str:
  import jax

  device = jax.devices()[0]
  return 'cpu' if device.platform == 'cpu' else device.device_kind


def plan(study: Study, flags: argparse.Namespace) -> Iterator[tuple[str, str, int, Method]]:
  """(budget, part, seed, method) in the order of running: whole tables of the cheapest parts first."""
  for budget, part in study.stages:
    if budget not in flags.budgets or part not in flags.parts:
      continue
    for seed in flags.seeds:
      for method in study.methods:
        # The first method's equal compute is its equal epochs, and an untrained network has no length.
        idle = budget == 'compute' and (method is study.methods[0] or is_untrained(method))
        if method.name in flags.only and not idle:
          yield budget, part, seed, method


def run(command: list[str], deadline: float) -> float:
  """Runs a command of folk_jax's until it ends or the time is over; returns its seconds.

  Raises:
    OutOfTime: it was told to save and leave.
    UserError: it failed.
  """
  paths = [str(report.ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join(paths),
    'GLIBC_TUNABLES': report.KEEP_MEMORY,
  }
  began = time.monotonic()
  process = subprocess.Popen([sys.executable, '-m', 'folk_jax.main', *command], env=environment)
  try:
    status = process.wait(max(1.0, deadline - began) if deadline else None)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)
    process.wait()
    raise OutOfTime from None
  if status:
    raise UserError(
      f'a run ended with status {status}: its message stands above; start this again to go on'
    )
  return time.monotonic() - began


def train(
  study: Study,
  method: Method,
  row: dict[str, Any],
  workdir: pathlib.Path,
  path: str,
  deadline: float,
) -> dict[str, Any]:
  """Trains a row; returns what the run says of itself."""
  config = recipe(study, method, path)
  changes = {**study.changes, **method.changes, 'batch_size': study.batch_size}
  changes |= {'total_steps': row['steps'], 'seed': row['seed']}
  if study.changes.get('evaluation.linear_cached_every'):
    changes['evaluation.linear_cached_every'] = row['steps']
  command = [f'--config={config}', f'--workdir={workdir}', *(override(*x) for x in changes.items())]
  command += [f'--config.compilation_cache={workdir.parent / "compiled"}']
  seconds = run(command, deadline)
  lines = metrics.read_metrics(str(workdir))
  training = [line for line in lines if 'train/loss' in line]
  timed = [line for line in training if 'train/images_per_second' in line]
  last, evaluated = (
    training[-1],
    [line for line in lines if any(k.startswith('eval/') for k in line)],
  )
  kept = ('loss', 'loss_reconstruction', 'loss_distillation', 'teacher_entropy', 'effective_rank')
  return {
    'seconds': round(seconds, 1),
    'config': config,
    'images_per_second': sorted(x['train/images_per_second'] for x in timed)[len(timed) // 2]
    if timed
    else None,
    'last': {name: last[f'train/{name}'] for name in kept if f'train/{name}' in last},
    'scores': {
      key.removeprefix('eval/'): value
      for key, value in (evaluated[-1] if evaluated else {}).items()
      if key.startswith('eval/')
    },
  }


def evaluate(
  study: Study, part: str, workdir: pathlib.Path, seed: int, deadline: float
) -> dict[str, Any]:
  """One evaluation part of a trained row; returns its scores."""
  arg = ','.join(filter(None, (study.evaluate, study.arg if study.arg == 'cifar10' else '')))
  target = workdir / part
  # Features that another part extracted; whether they are these is the cache's to say.
  for features in [*workdir.glob('*/features')]:
    if not (target / 'features').exists():
      shutil.copytree(features, target / 'features')
  command = [f'--config=configs/evaluate.py:{arg}', f'--config.checkpoint={workdir}']
  command += [f'--workdir={target}', f'--config.seed={seed}', *study.parts[part]]
  command += [f'--config.compilation_cache={workdir.parent / "compiled"}']
  seconds = run(command, deadline)
  found = results_lib.read(target / 'results.json')
  scores = {
    f'{name}/{key}': value for name, own in found['scores'].items() for key, value in own.items()
  }
  return {'seconds': round(seconds, 1), 'feature': found['feature'], 'scores': scores}


def check_settings(study: Study, method: Method, row: dict[str, Any], path: str) -> None:
  """Refuses to go on with a row that was begun with other settings: its parts would not belong together.

  Raises:
    UserError: they differ from the row's.
  """
  config = configuration(study, method, path).to_dict()
  config['data'].pop('path')
  settings = json.dumps([config, row['steps'], study.parts], sort_keys=True, default=str)
  digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
  if row.setdefault('settings', digest) != digest:
    raise UserError(
      f'{method.name}, equal {row["budget"]}, seed {row["seed"]} was begun with other settings: name another --out '
      'and --workdir, or remove the row from the JSON and its folder'
    )


def show(study: Study, rows: Rows, flags: argparse.Namespace) -> None:
  """What stands, and what was not run, with its command."""
  missing: dict[tuple[str, str], int] = {}
  wanted: dict[tuple[str, str], int] = {}
  for budget, part, seed, method in plan(study, flags):
    wanted[budget, part] = wanted.get((budget, part), 0) + 1
    if part not in rows.row(method, budget, seed)['parts']:
      missing[budget, part] = missing.get((budget, part), 0) + 1
  cells = [
    (budget, part, f'{count - missing.get((budget, part), 0)} of {count}')
    for (budget, part), count in wanted.items()
  ]
  print(report.table(('budget', 'part', 'run'), cells))
  if missing:
    print(f'the rest: python benchmarks/study.py --study={study.name} --path=DIR')


def main() -> None:
  flags = parse()
  study = STUDIES[flags.study]
  rows = Rows(study, flags.out)
  if flags.list:
    return show(study, rows, flags)
  deadline = time.monotonic() + 60 * flags.minutes if flags.minutes else 0.0
  work: dict[str, float] = {}
  try:
    for budget, part, seed, method in plan(study, flags):
      name = ''.join(c if c.isalnum() else '_' for c in method.name.lower())
      workdir = flags.workdir / f'{name}_{budget}_{seed}'
      with alone(workdir, wait=False) as mine:
        rows.refresh()
        row = rows.row(method, budget, seed)
        untrained = part != 'train' and 'train' not in row['parts']
        if not mine or part in row['parts'] or untrained:
          continue
        if deadline and time.monotonic() + rows.seconds(part, method) > deadline:
          raise OutOfTime
        for one in (study.methods[0], method):
          if one.name not in work:
            work[one.name] = flops_an_image(study, one, flags.path)
        own, first = work[method.name], work[study.methods[0].name]
        steps = study.steps if budget == 'epochs' else round(study.steps * first / own)
        steps = UNTRAINED_STEPS if is_untrained(method) else steps
        row |= {'steps': steps, 'gflop_an_image': own / 1e9}
        check_settings(study, method, row, flags.path)
        print(f'== {method.name}, equal {budget}, seed {seed}: {part} ({steps} steps)', flush=True)
        if part == 'train':
          values = train(study, method, row, workdir, flags.path, deadline)
        else:
          if not (workdir / 'checkpoints').exists():
            print(f'{workdir} is not here: trained once more with the same seed', flush=True)
            rows.keep(row, 'train', train(study, method, row, workdir, flags.path, deadline))
          values = evaluate(study, part, workdir, seed, deadline)
        rows.keep(row, part, values)
  except OutOfTime:
    print('the time is over; the same command goes on')
  show(study, rows, flags)


if __name__ == '__main__':
  report.main(main)
