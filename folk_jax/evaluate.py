"""Judges one checkpoint by a chosen set of evaluations: main's task 'evaluate', of configs/evaluate.py.

Frozen features are extracted once and shared; every result is written as soon as it is there, and a second start with
the same configuration goes on after the last one. This file joins rooms, as the loop does.

Shape letters: Q test images, D features, S classes of a folder.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from folk_jax import checkpoint, data, models
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.evals import battery, fewshot, knn, logistic, restoration, robustness
from folk_jax.evals.results import Results, Scores, read, table
from folk_jax.objectives import linear_probe
from folk_jax.suite import (
  CLASSIFIERS,
  OF_A_MACHINE,
  Suite,
  adopt_run,
  class_folder,
  stratified,
)
from folk_jax.train import initial, loop, sharding
from folk_jax.train.watchdog import Watchdog


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs `config.evaluations` on `config.checkpoint`; prints one table and writes `results.json` into `workdir`.

  Raises:
    UserError: for what the user can mend.
  """
  unknown = [name for name in config.evaluations if name not in EVALUATIONS]
  if unknown:
    raise config_lib.unknown('evaluation', unknown[0], EVALUATIONS)
  if not config.checkpoint:
    raise UserError(
      'config.checkpoint is empty: give a workdir, or a timm .safetensors file with model=NAME in the recipe argument.'
    )
  # Mistakes of an evaluation that comes last are said first.
  for name in config.evaluations:
    CHECKS.get(name, lambda config: None)(config)
  adopt_run(config)
  if {'finetune', 'low_shot_finetune'}.intersection(config.evaluations):
    config_lib.validate(config.finetune)
  loop.set_compilation_cache(config.compilation_cache)
  results = Results(epath.Path(workdir).expanduser() / 'results.json', _about(config))
  mesh = sharding.make_mesh(config.mesh.fsdp)
  waits = Watchdog(**config.watchdog, workdir=workdir, process=jax.process_index())
  with waits, jax.set_mesh(mesh):
    suite = Suite(config, workdir, mesh, waits)
    for name in config.evaluations:
      if name in results.scores:
        print(f'{name} stands in {results.file}: skipped')
        continue
      print(f'{name} ...', flush=True)
      results.add(name, EVALUATIONS[name](suite, results))
  if jax.process_index() == 0:
    print(table(results.scores))
    print(f'written to {results.file}')


def _about(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What results are of: in words, and as a digest of every setting but those of what is chosen and shown."""
  kept = _without(
    json.loads(config_lib.to_json(config)), ('evaluations', 'logging', 'watchdog', *OF_A_MACHINE)
  )
  return {
    'checkpoint': config.checkpoint,
    'which': config.evaluation.which,
    'feature': config.evaluation.feature,
    'model': kept['model'],
    'data': {key: kept['data'][key] for key in ('source', 'name', 'path', 'limit')},
    'settings': hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
  }


def _without(tree: Any, names: Sequence[str]) -> Any:
  """A tree of dicts without these keys, at any depth."""
  if not isinstance(tree, dict):
    return tree
  return {name: _without(value, names) for name, value in tree.items() if name not in names}


def _knn(suite: Suite, results: Results) -> Scores:
  """Weighted kNN for every k (DINO's protocol)."""
  del results
  settings = suite.config.evaluation
  found = knn.knn(
    *suite.frozen, ks=settings.knn, temperature=settings.knn_temperature, classes=suite.classes
  )
  return {f'top1_k{k}': found[k][0] for k in settings.knn}


def _amounts(settings: ml_collections.ConfigDict) -> dict[str, int | float]:
  """Amounts of labels by name: images a class, then shares."""
  found: dict[str, int | float] = {f'{n}_images_a_class': int(n) for n in settings.images_a_class}
  return found | {f'{100 * share:g}_percent': float(share) for share in settings.shares}


def _over_draws(name: str, top1: list[float] | tuple[float, ...]) -> Scores:
  """The mean over draws, and half the width of its 95 % interval where there are several."""
  mean, interval = fewshot.confidence(top1)
  return {name: mean} | ({f'{name}_interval': interval} if len(top1) > 1 else {})


def _low_shot(suite: Suite, results: Results) -> Scores:
  """Few labels: mean accuracy and half the width of its 95 % interval over draws."""
  settings, scores = suite.config.low_shot, {}

  def of_one(amount: int | float) -> Scores:
    found = fewshot.low_shot(
      *suite.frozen,
      classes=suite.classes,
      amount=amount,
      draws=settings.draws,
      regularisers=settings.regularisers,
      seed=suite.config.seed,
    )
    return {f'draw_{draw}': top1 for draw, top1 in enumerate(found.accuracies)}

  for name, amount in _amounts(settings).items():
    top1 = results.part('low_shot', name, lambda amount=amount: of_one(amount))
    scores |= _over_draws(name, [*top1.values()])
  return scores


def _linear_cached(suite: Suite, results: Results) -> Scores:
  """Logistic regression on features extracted once, without augmentation."""
  del results
  fitted, c = suite.linear_classifier
  _, _, test_QD, label_Q = suite.frozen
  return {
    'top1': np.mean(logistic.predict(fitted, fewshot.unit_length(test_QD)) == label_Q),
    'C': c,
  }


def _linear(suite: Suite, results: Results) -> Scores:
  """The augmented linear probe; the head is chosen on a held-out part of the training set, never by test images."""
  del results
  share = suite.config.linear_validation
  config, workdir = suite.train(
    'linear', {'data.validation': share, 'evaluation.split': 'validation'}
  )
  validation = loop.judged(config, workdir)
  best = linear_probe.choose(validation)
  config.evaluation.split = 'test'
  test = loop.judged(config, workdir)
  chosen = best.removeprefix('eval/top1_')
  return {'top1': test[best], 'validation_top1': validation[best], 'chosen_head': chosen}


def _finetune(suite: Suite, results: Results) -> Scores:
  """Fine-tuning end to end; the last step is judged, or the best where the recipe keeps it (`checkpoint.best`)."""
  del results
  config, workdir = suite.train('finetune', {})
  config.evaluation.split = 'test'
  found = loop.judged(config, workdir, best=bool(config.checkpoint.best))
  return {key.removeprefix('eval/'): value for key, value in found.items()}


def _low_shot_finetune(suite: Suite, results: Results) -> Scores:
  """Fine-tuning end to end with few labels, a run for each amount and draw: mean and 95 % interval over draws."""
  settings, scores = suite.config.low_shot_finetune, {}

  def of_one(place: str, amount: int | float, draw: int) -> Scores:
    field = 'images_a_class' if isinstance(amount, int) else 'label_share'
    seed = suite.config.seed + draw
    changes = {'data.images_a_class': 0, 'data.label_share': 0.0, f'data.{field}': amount}
    changes |= {'data.label_seed': seed, 'seed': seed, 'eval_every': 0}
    changes |= {'epochs': 0, 'total_steps': settings.total_steps}
    changes |= {'batch_size': settings.batch_size, 'checkpoint.keep': 1, 'checkpoint.best': ''}
    changes |= {'evaluation.split': 'test'}  # The recipe's may be what the best was chosen on.
    config, workdir = suite.train('finetune', changes, place)
    return {'top1': loop.judged(config, workdir)['eval/top1']}

  for name, amount in _amounts(settings).items():
    top1 = []
    for draw in range(settings.draws):
      key = f'{name}/draw_{draw}'
      place = f'low_shot_finetune/{key}'
      found = results.part(
        'low_shot_finetune',
        key,
        lambda place=place, amount=amount, draw=draw: of_one(place, amount, draw),
      )
      top1.append(found['top1'])
    scores |= _over_draws(name, top1)
  return scores


def _check_low_shot_finetune(config: ml_collections.ConfigDict) -> None:
  settings = config.low_shot_finetune
  if settings.draws < 1 or settings.total_steps < 1 or settings.batch_size < 1:
    raise UserError(
      f'config.low_shot_finetune has draws {settings.draws}, total_steps {settings.total_steps} and batch_size '
      f'{settings.batch_size}: give 1 or more of each.'
    )
  if not all(n >= 1 for n in settings.images_a_class) or not all(
    0 < x < 1 for x in settings.shares
  ):
    raise UserError(
      f'config.low_shot_finetune has images_a_class {settings.images_a_class} and shares {settings.shares}: give whole '
      'numbers of 1 or more, and shares between 0 and 1.'
    )


def _battery(config: ml_collections.ConfigDict) -> battery.Battery:
  names = ('attacks', 'epsilon', 'pgd_steps', 'pgd_step_size', 'corruptions', 'severities')
  return battery.Battery(**{name: config.robustness[name] for name in names})


def _folders(config: ml_collections.ConfigDict) -> dict[str, str]:
  """DIR by name, of `config.robustness.folders`."""
  pairs = [text.partition('=') for text in config.robustness.folders]
  wrong = [name for name, _, path in pairs if not name or not path or '/' in name]
  found = {name: path for name, _, path in pairs}
  if wrong or len(found) < len(pairs):
    raise UserError(
      f'config.robustness.folders is {tuple(config.robustness.folders)}: give each as name=DIR, with names of their '
      'own and without slashes, such as "sketch=/data/imagenet-sketch".'
    )
  return found


def _check_robustness(config: ml_collections.ConfigDict) -> None:
  settings = config.robustness
  _battery(config)
  for name, path in _folders(config).items():
    if not epath.Path(path).expanduser().is_dir():
      raise UserError(f"config.robustness.folders: {name} has no folder '{path}'.")
  for name in settings.classifiers:
    if name not in CLASSIFIERS:
      raise config_lib.unknown('config.robustness.classifiers', name, CLASSIFIERS)
  if settings.limit < 0 or not settings.classifiers:
    raise UserError(
      f'config.robustness has limit {settings.limit} and classifiers {settings.classifiers}: give a limit of 0 (all '
      'images) or more, and a classifier at least.'
    )
  if settings.baseline:
    read(settings.baseline)


def _robustness(suite: Suite, results: Results) -> Scores:
  """Attacks, corruptions, calibration and folders of other images, for each classifier."""
  settings = suite.config.robustness
  tests, scores = _battery(suite.config), {}
  for kind in settings.classifiers:
    found = _measured(suite, results, kind, tests)
    baseline = None
    if settings.baseline:
      details = read(settings.baseline).get('details', {})
      images = int(found[battery.CLEAN]['images'])
      baseline = battery.read_baseline(details, tests, kind, images)
    of_kind = battery.summarise(tests, found, baseline)
    of_kind |= {f'top1_{name}': found[f'folder:{name}']['top1'] for name in _folders(suite.config)}
    scores |= {f'{kind}/{key}': value for key, value in of_kind.items()}
  if settings.baseline:
    scores['baseline'] = settings.baseline
  return scores


def _measured(
  suite: Suite, results: Results, kind: str, tests: battery.Battery
) -> dict[str, Scores]:
  """Every measure of a classifier, those that stand in the results taken from there."""
  limit, folders = suite.config.robustness.limit, _folders(suite.config)
  names = [*tests.measures, *(f'folder:{name}' for name in folders)]
  if all(results.stands('robustness', f'{kind}/{name}') for name in names):
    return {name: results.details['robustness'][f'{kind}/{name}'] for name in names}
  classifier = CLASSIFIERS[kind](suite)
  own = stratified(data.make_source(classifier.settings, 'test'), limit)
  work = {name: (perturb, own, None) for name, perturb in tests.measures.items()}
  for name, path in folders.items():
    source = class_folder(classifier.settings, path, f'config.robustness.folders: {name}')
    known = data.make_source(classifier.settings, 'train').class_names
    subset_S = robustness.class_subset(known, source.class_names, name)
    work[f'folder:{name}'] = (None, stratified(source, limit), subset_S)

  def measure(perturb, source: data.Source, subset_S: np.ndarray | None) -> Scores:
    with contextlib.closing(suite.batches(source, classifier.settings)) as batches:
      accuracy = robustness.accuracy_under(
        perturb,
        classifier.logits,
        classifier.params,
        batches,
        rng=jax.random.key(suite.config.seed),
        subset_S=subset_S,
        put=suite.put,
        progress=lambda rows: bar.update(rows * jax.process_count()),
      )
    return battery.result(accuracy)

  sizes = {name: len(source) for name, (_, source, _) in work.items()}
  done = sum(size for name, size in sizes.items() if results.stands('robustness', f'{kind}/{name}'))
  with suite.bar(f'robustness of {kind}', sum(sizes.values()), done) as bar:
    found = {}
    for name, arguments in work.items():
      bar.set_postfix_str(name)
      found[name] = results.part(
        'robustness', f'{kind}/{name}', lambda arguments=arguments: measure(*arguments)
      )
  return found


def _restoration(suite: Suite, results: Results) -> Scores:
  """PSNR and SSIM of the student's reconstruction head, beside those of its input."""
  del results
  _, directory = initial.find_run(suite.config.checkpoint)
  student, _, step = checkpoint.read_subtree(directory, ('params',))
  if 'reconstruction' not in student:
    raise UserError(
      f'{suite.config.checkpoint} has no reconstruction head (it has {", ".join(sorted(student))}): '
      'leave restoration out of config.evaluations.'
    )
  extra, _, _ = checkpoint.read_subtree(directory, ('extra',), step)
  statistics = extra.get('batch_stats', {}).get('student', {})
  head = models.ReconstructionHead(suite.backbone.stride)

  def predict(params, image_BHWC):
    backbone, statistics, reconstruction = params
    output, _ = models.encode(suite.backbone, backbone, statistics, image_BHWC)
    return head.apply({'params': reconstruction}, output.patches)

  params = jax.device_put(
    (student['backbone'], statistics, student['reconstruction']), sharding.replicated(suite.mesh)
  )
  scores = {}
  for name, corrupt in restoration.tasks(suite.config.image_size).items():
    with contextlib.closing(suite.batches('test')) as batches:
      found = restoration.restoration(
        predict,
        params,
        batches,
        corrupt,
        mean=suite.mean,
        std=suite.std,
        rng=jax.random.key(suite.config.seed),
        put=suite.put,
      )
    scores |= {f'{name}_psnr': found.psnr, f'{name}_psnr_gain': found.psnr_gain}
    scores |= {f'{name}_ssim': found.ssim, f'{name}_ssim_gain': found.ssim_gain}
  return scores


EVALUATIONS: dict[str, Callable[[Suite, Results], Scores]] = {
  'knn': _knn,
  'low_shot': _low_shot,
  'linear_cached': _linear_cached,
  'linear': _linear,
  'finetune': _finetune,
  'low_shot_finetune': _low_shot_finetune,
  'robustness': _robustness,
  'restoration': _restoration,
}
# What can be said before anything runs.
CHECKS: dict[str, Callable[[ml_collections.ConfigDict], Any]] = {
  'robustness': _check_robustness,
  'low_shot_finetune': _check_low_shot_finetune,
}
