"""Judges one checkpoint by a chosen set of evaluations: main's task 'evaluate', of configs/evaluate.py.

Frozen features are extracted once and shared; every result is written as soon as it is there, and a second start with
the same configuration goes on after the last one. This file joins rooms, as the loop does.

Shape letters: B images, D features, K classes.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from folk_jax import checkpoint, models
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.evals import fewshot, knn, logistic, restoration, robustness
from folk_jax.objectives import linear_probe
from folk_jax.signal import corruptions, degrade
from folk_jax.signal.filters import Filter
from folk_jax.suite import Suite, adopt_run, unit_length
from folk_jax.train import loop, sharding

# What an evaluation returns: numbers by name. Shares are in [0, 1].
Scores = dict[str, float]


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
  adopt_run(config)
  results = _Results(config, epath.Path(workdir).expanduser())
  mesh = sharding.make_mesh(config.mesh.fsdp)
  with jax.set_mesh(mesh):
    suite = Suite(config, workdir, mesh)
    for name in config.evaluations:
      if name in results.scores:
        print(f'{name} stands in {results.file}: skipped')
        continue
      print(f'{name} ...', flush=True)
      results.add(name, EVALUATIONS[name](suite))
  if jax.process_index() == 0:
    print(table(results.scores))
    print(f'written to {results.file}')


class _Results:
  """`results.json`: scores by evaluation, beside what they are of."""

  def __init__(self, config: ml_collections.ConfigDict, workdir: epath.Path):
    self.file = workdir / 'results.json'
    text = config_lib.to_json(config)
    kept = {k: v for k, v in json.loads(text).items() if k not in ('evaluations', 'logging')}
    self._about = {
      'checkpoint': config.checkpoint,
      'which': config.evaluation.which,
      'model': kept['model'],
      'data': {key: kept['data'][key] for key in ('source', 'name', 'path', 'limit')},
      'settings': hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16],
    }
    self.scores: dict[str, Scores] = {}
    if self.file.exists():
      found = json.loads(self.file.read_text())
      if found['settings'] != self._about['settings']:
        raise UserError(
          f'{self.file} is of {found["checkpoint"]} with other settings: give another --workdir, or remove it.'
        )
      self.scores = found['scores']

  def add(self, name: str, scores: Scores) -> None:
    self.scores[name] = {key: float(value) for key, value in scores.items()}
    if jax.process_index():
      return
    try:
      self.file.parent.mkdir(parents=True, exist_ok=True)
      fresh = self.file.parent / f'{self.file.name}.tmp'
      fresh.write_text(json.dumps(self._about | {'scores': self.scores}, indent=2) + '\n')
      fresh.replace(self.file)
    except OSError as error:
      raise UserError(f'cannot write {self.file}: {error}; give another --workdir.') from error


def table(scores: Mapping[str, Scores]) -> str:
  """One line a number, evaluations in the order they ran."""
  lines = [('evaluation', 'what', '')]
  lines += [
    (name, key, f'{value:.4f}') for name, row in scores.items() for key, value in row.items()
  ]
  widths = [max(len(line[column]) for line in lines) for column in range(3)]
  return '\n'.join(
    f'{name.ljust(widths[0])}  {key.ljust(widths[1])}  {value.rjust(widths[2])}'
    for name, key, value in lines
  )


def _knn(suite: Suite) -> Scores:
  """Weighted kNN for every k (DINO's protocol)."""
  settings = suite.config.evaluation
  found = knn.knn(
    *suite.frozen, ks=settings.knn, temperature=settings.knn_temperature, classes=suite.classes
  )
  return {f'top1_k{k}': found[k][0] for k in settings.knn}


def _low_shot(suite: Suite) -> Scores:
  """Few labels: mean accuracy and half the width of its 95 % interval over draws."""
  settings, scores = suite.config.low_shot, {}
  amounts = [*map(int, settings.images_a_class), *settings.shares]
  for amount in amounts:
    found = fewshot.low_shot(
      *suite.frozen,
      classes=suite.classes,
      amount=amount,
      draws=settings.draws,
      regularisers=settings.regularisers,
      seed=suite.config.seed,
    )
    name = f'{amount}_images_a_class' if isinstance(amount, int) else f'{100 * amount:g}_percent'
    scores |= {f'{name}': found.mean, f'{name}_interval': found.interval}
  return scores


def _linear_cached(suite: Suite) -> Scores:
  """Logistic regression on features extracted once, without augmentation."""
  fitted, c = suite.linear_classifier
  _, _, test_QD, label_Q = suite.frozen
  return {'top1': np.mean(logistic.predict(fitted, unit_length(test_QD)) == label_Q), 'C': c}


def _train(suite: Suite, name: str, changes: Mapping[str, Any]) -> tuple[Any, str]:
  """Trains the recipe `config.<name>` from the checkpoint, in a workdir below; resumed where it stands."""
  config = suite.config[name].copy_and_resolve_references()
  weights = {'init_from': suite.config.checkpoint, 'init_which': suite.config.evaluation.which}
  config.update_from_flattened_dict(weights | dict(changes))
  config_lib.validate(config)
  workdir = str(epath.Path(suite.workdir).expanduser() / name)
  loop.pretrain(config, workdir)
  return config, workdir


def _linear(suite: Suite) -> Scores:
  """The augmented linear probe; the head is chosen on a held-out part of the training set, never by test images."""
  share = suite.config.linear_validation
  config, workdir = _train(
    suite, 'linear', {'data.validation': share, 'evaluation.split': 'validation'}
  )
  validation = loop.judged(config, workdir)
  best = linear_probe.choose(validation)
  config.evaluation.split = 'test'
  test = loop.judged(config, workdir)
  return {'top1': test[best], 'validation_top1': validation[best], f'chosen: {best}': 1.0}


def _finetune(suite: Suite) -> Scores:
  """Fine-tuning end to end; the last step is judged."""
  config, workdir = _train(suite, 'finetune', {})
  found = loop.judged(config, workdir)
  return {key.removeprefix('eval/'): value for key, value in found.items()}


def _robustness(suite: Suite) -> Scores:
  """Attacks, corruptions and calibration of the linear classifier on frozen features."""
  fitted, _ = suite.linear_classifier
  only = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], fitted)

  def logits(params, image_BHWC):
    network, classifier = params
    feature_BD = suite.feature(network, image_BHWC)
    norm_B1 = jnp.linalg.norm(feature_BD, axis=1, keepdims=True)
    return logistic.logits(classifier, feature_BD / jnp.maximum(norm_B1, 1e-12))

  settings = suite.config.robustness
  params = (suite.network, only)

  def accuracy(perturb) -> robustness.Accuracy:
    with contextlib.closing(suite.batches('test')) as batches:
      return robustness.accuracy_under(
        perturb, logits, params, batches, rng=jax.random.key(suite.config.seed), put=suite.put
      )

  clean = accuracy(None)
  scores = {'top1': clean.top1, 'calibration_error': clean.calibration.ece}
  for name in settings.attacks:
    if name not in robustness.ATTACKS:
      raise config_lib.unknown('config.robustness.attacks', name, robustness.ATTACKS)
    scores[f'top1_{name}'] = accuracy(robustness.ATTACKS[name](settings.epsilon)).top1
  errors = {}
  for name in settings.corruptions:
    if name not in corruptions.CORRUPTIONS:
      raise config_lib.unknown('config.robustness.corruptions', name, corruptions.CORRUPTIONS)
    errors[name] = [1 - accuracy(robustness.Corrupt(name, s)).top1 for s in settings.severities]
  if errors:
    found = robustness.corruption_error(errors)
    scores |= {f'error_{name}': value for name, value in found.errors.items()}
    scores['error_corruptions_mean'] = found.mean
  return scores


def _restorations(side: int) -> dict[str, restoration.Corruption]:
  """What a reconstruction head is asked to undo; at 32 pixels milder, as configs/restoration.py."""
  small = side <= 32
  sizes, sigma = ((3, 5), 1.0) if small else (degrade.BLUR_SIZES, degrade.BLUR_SIGMA)
  factor = 4 if small else degrade.FACTOR
  portions = (0.1,) if small else (0.01,)

  def of_filter(name):
    chosen = Filter(name, portions, 0.5, 'shared', 16.0, clamp=False)

    def corrupt(image_BHWC, keys_B):
      filtered_BHWC, kept_BHFC = chosen(image_BHWC, keys_B)
      return filtered_BHWC, ~kept_BHFC

    return corrupt

  return {name: of_filter(name) for name in ('com', 'rcom', 'low_pass', 'high_pass')} | {
    'super_resolution': restoration.of_images(
      lambda image_BHWC, keys_B: degrade.super_resolve_input(image_BHWC, factor)
    ),
    'deblur': restoration.of_images(
      lambda image_BHWC, keys_B: degrade.blur(image_BHWC, keys_B, sizes, sigma)
    ),
    'denoise': restoration.of_images(degrade.add_noise),
  }


def _restoration(suite: Suite) -> Scores:
  """PSNR and SSIM of the student's reconstruction head, beside those of its input."""
  directory = str(epath.Path(suite.config.checkpoint).expanduser() / 'checkpoints')
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
  for name, corrupt in _restorations(suite.config.image_size).items():
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


EVALUATIONS: dict[str, Callable[[Suite], Scores]] = {
  'knn': _knn,
  'low_shot': _low_shot,
  'linear_cached': _linear_cached,
  'linear': _linear,
  'finetune': _finetune,
  'robustness': _robustness,
  'restoration': _restoration,
}
