"""What the evaluations of one checkpoint share: its network, the data to judge it on, and frozen features.

Shape letters: N, M images of a data set, B of a batch, H, W pixels, C channels, D features.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from etils import epath

from folk_jax import checkpoint, data, models
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.evals import cache, features, fewshot, logistic
from folk_jax.signal.augment import normalise
from folk_jax.train import initial, loop, sharding
from folk_jax.train.run import data_settings, make_backbone, make_run
from folk_jax.train.watchdog import Watchdog


class Classifier(NamedTuple):
  """A network that names classes, and the settings of the images that it takes."""

  logits: Callable[[Any, jax.Array], jax.Array]  # (params, images [B, H, W, 3] in [0, 1]) -> [B, K]
  params: Any
  settings: data.DataSettings


def adopt_run(config: ml_collections.ConfigDict) -> None:
  """Takes model and image size from the run in `config.checkpoint`, and what the recipe leaves open: feature and data.

  Of the data all images, though the run may have trained on a few labels. The feature matters: no loss of MFM or of
  another method without a teacher trains the class token, so that their recipes judge the mean of the patches.

  Raises:
    UserError: a checkpoint that says nothing of the data, or of another kind of model than the recipe.
  """
  path = epath.Path(config.checkpoint).expanduser()
  if not path.is_dir():
    if not config.data.source:
      raise UserError(
        f'{config.checkpoint} is not a workdir, so nothing says which data to judge it on: give data=SOURCE, or '
        'path=DIR, in the recipe argument.'
      )
    config.evaluation.feature = config.evaluation.feature or _FEATURE
    return
  workdir, _ = initial.find_run(path)
  run = checkpoint.read_json(workdir / 'config.json')
  if run['model']['name'] != config.model.name:
    arg = 'model=resnet50' if run['model']['name'] == 'resnet' else 'model=vit_b'
    raise UserError(
      f'{workdir} is of a {run["model"]["name"]} and the recipe trains a {config.model.name}: give {arg} in the recipe '
      'argument (its size comes from the run).'
    )
  # A run from before the field was judged by the class token.
  own_feature = run.get('evaluation', {}).get('feature', _FEATURE)
  config.evaluation.feature = config.evaluation.feature or own_feature
  given = config.data.to_dict()
  # Fields that are newer than the run keep the recipe's values.
  kept = {name: given[name] for name in ('limit', *_OF_LABELS)}
  own = given if given['source'] else given | run['data'] | kept
  for part in (config, config.linear, config.finetune):
    with part.unlocked():
      part.model = ml_collections.ConfigDict(run['model'])
      part.image_size = run['image_size']
      # What a training run holds out to choose by is its own affair.
      part.data = ml_collections.ConfigDict(own | {'validation': part.data.validation})
  # The sweep's recipe names features of deeper models too: those that this one can't give are left out.
  blocks = run['model']['depth'] if run['model']['name'] == 'vit' else 0
  probe = config.linear.objective
  probe.features = tuple(
    name for name in probe.features if features.FEATURES[name].last_blocks <= blocks
  )


_FEATURE = 'pooled'
# What takes minutes in health (a listing, a compilation) may take this many times `watchdog.seconds` and its limit.
_PATIENCE = 10.0
# Fields that say how a machine reads the data, and nothing of a result.
OF_A_MACHINE = ('workers', 'threads', 'prefetch', 'max_bad_share', 'compilation_cache')
# Which images a run trained on for want of labels says nothing of the data that it is judged on.
_OF_LABELS = ('images_a_class', 'label_share', 'label_seed')


class Suite:
  """What the evaluations share: the network, the data, and frozen features."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: str,
    mesh: jax.sharding.Mesh,
    waits: Watchdog,
  ):
    self.config, self.workdir, self.mesh, self._waits = config, workdir, mesh, waits
    waits('the checkpoint to be read', patience=_PATIENCE)
    self.settings = data_settings(config)
    self.mean, self.std = tuple(config.data.mean), tuple(config.data.std)
    self.backbone = make_backbone(config)
    shapes = jax.eval_shape(
      lambda key: self.backbone.init(key, jnp.zeros((1, config.image_size, config.image_size, 3))),
      jax.random.key(0),
    )
    loaded = initial.load(
      config.checkpoint,
      {'backbone': shapes['params']},
      image_size=config.image_size,
      patch=self.backbone.stride,
      which=config.evaluation.which,
      heads=getattr(self.backbone, 'heads', None),
    )
    placed = jax.device_put(
      (loaded['backbone'], loaded.get('batch_stats', {})), sharding.replicated(mesh)
    )
    self.network = placed  # (parameters, BatchNorm statistics)
    waits.idle()

  @functools.cached_property
  def classes(self) -> int:
    """Number of classes of the data."""
    names = data.make_source(self.settings, 'train').class_names
    if len(names) < 2:
      raise UserError(
        'the data have no labels, which every evaluation but restoration needs: give labelled data.'
      )
    return len(names)

  def batches(
    self, source: data.Source | str, settings: data.DataSettings | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    """Centre views of a source, or of a split's, once; close it. The watchdog watches each batch, and its use."""
    settings = settings or self.settings
    size = -(-self.config.evaluation.batch_size // self.mesh.size) * self.mesh.size
    self._waits('the images to be listed', patience=_PATIENCE)
    try:
      with data.eval_batches(
        data.make_source(settings, source) if isinstance(source, str) else source,
        settings,
        batch_size=size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ) as batches:
        for number in itertools.count(1):
          self._waits(f'batch {number} of the images to judge by', data.waiting_for)
          batch = next(batches, None)
          if batch is None:
            return
          self._waits(f'what is made of batch {number} on the device', patience=_PATIENCE)
          yield batch
    finally:
      self._waits.idle()

  def bar(self, what: str, images: int, done: int = 0) -> tqdm.tqdm:
    """A progress bar over images; on the first process, where progress is wanted."""
    return tqdm.tqdm(
      desc=what,
      total=images,
      initial=done,
      unit='image',
      disable=not self.config.logging.progress or bool(jax.process_index()),
      mininterval=0.2 if sys.stderr.isatty() else 10.0,  # A log needs no hundred lines.
    )

  def put(self, rows: np.ndarray) -> jax.Array:
    """This host's rows, to the devices."""
    return sharding.put(rows.astype(np.int32) if rows.dtype == np.int64 else rows, self.mesh)

  def feature(self, params: Any, image_BHWC: jax.Array) -> jax.Array:
    """Images in [0, 1] to the feature that is judged, [B, D]."""
    name = self.config.evaluation.feature
    options = features.encode_options(name, self.backbone)
    image_BHWC = normalise(image_BHWC, self.mean, self.std)
    output, _ = models.encode(self.backbone, *params, image_BHWC, **options)
    return features.feature(output, name)

  @functools.cached_property
  def frozen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and labels, test features and labels; kept on disk."""
    found = []
    for split in ('train', 'test'):
      source = data.make_source(self.settings, split)
      about = {
        'split': split,
        'images': len(source),
        'classes': list(source.class_names),
        'data': self._data_key(),
        'image_size': self.config.image_size,
        'model': self.config.model.to_dict(),
        'feature': self.config.evaluation.feature,
      }
      key = cache.cache_key(self.network, about)
      path = str(epath.Path(self.workdir).expanduser() / 'features' / f'{split}.npz')
      by_name, label_N = cache.load_or_extract(
        path, key, functools.partial(self._extract, split, len(source))
      )
      found += [by_name['feature'], label_N]
    return tuple(found)

  def _data_key(self) -> dict[str, Any]:
    """What says which images features are of. Where hosts may each have them elsewhere, not their path."""
    left_out = {*OF_A_MACHINE, *(('path',) if jax.process_count() > 1 else ())}
    kept = {k: v for k, v in self.config.data.to_dict().items() if k not in left_out}
    return json.loads(json.dumps(kept))

  def _extract(self, split: str, images: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    def apply(params, image_BHWC):
      return {'feature': self.feature(params, image_BHWC.astype(jnp.float32) / 255.0)}

    with (
      contextlib.closing(self.batches(split)) as batches,
      self.bar(f'features, {split}', images) as bar,
    ):
      return features.extract(apply, self.network, batches, put=self.put, progress=bar.update)

  def train(
    self, recipe: str, changes: Mapping[str, Any], place: str = ''
  ) -> tuple[ml_collections.ConfigDict, str]:
    """Trains `config.<recipe>` with `changes` from the checkpoint, in a workdir below ours; resumed where it stands.

    `place` is that workdir's name, the recipe's by default. Returns the configuration that ran, and the workdir.
    """
    config = self.config[recipe].copy_and_resolve_references()
    own = {'init_from': self.config.checkpoint, 'init_which': self.config.evaluation.which}
    own |= {'report': False}  # The page is of the run that is judged.
    config.update_from_flattened_dict(own | dict(changes))
    config_lib.validate(config)
    workdir = str(epath.Path(self.workdir).expanduser() / (place or recipe))
    loop.pretrain(config, workdir)
    return config, workdir

  @functools.cached_property
  def linear_classifier(self) -> tuple[logistic.Classifier, float]:
    """Logistic regression on frozen features of unit length, its C by cross-validation in the training set; and C."""
    train_ND, label_N, _, _ = self.frozen
    settings = self.config.linear_cached
    return fewshot.linear_classifier(
      train_ND,
      label_N,
      classes=self.classes,
      regularisers=settings.regularisers,
      folds=settings.folds,
      seed=self.config.seed,
    )


def stratified(source: data.Source, limit: int) -> data.Source:
  """`limit` of the images at most, each class in proportion and evenly spread over its images; 0 takes all."""
  size = len(source)
  if not limit or limit >= size:
    return source
  by_class_N = np.argsort(source.labels(np.arange(size)), kind='stable')
  place = np.int64((np.arange(limit) + 0.5) * size / limit)
  return data.Subset(source, np.sort(by_class_N[place]))


def class_folder(settings: data.DataSettings, path: str, what: str) -> data.Source:
  """The images of DIR/<class>/..., labelled by their places among its classes in sorted order.

  Args:
    settings: image size and decoding.
    path: DIR.
    what: what to call it in an error.

  Raises:
    UserError: no such folder, or one without class folders.
  """
  folder = epath.Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(f"{what}: there is no folder '{path}'; give one of class folders.")
  plain = {'source': 'folder', 'name': '', 'path': str(folder), 'train_split': '.', 'limit': 0}
  none = {'validation': 0.0, 'images_a_class': 0, 'label_share': 0.0}
  source = data.make_source(dataclasses.replace(settings, **plain, **none), 'train')
  if not source.class_names:
    raise UserError(
      f"{what}: '{path}' has images and no class folders; expected {path}/<class>/<image>."
    )
  return source


def _linear_classifier(suite: Suite) -> Classifier:
  """That of `linear_cached`: logistic regression on frozen features of length 1."""
  fitted, _ = suite.linear_classifier
  only = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], fitted)

  def logits(params, image_BHWC):
    network, classifier = params
    feature_BD = suite.feature(network, image_BHWC)
    norm_B1 = jnp.linalg.norm(feature_BD, axis=1, keepdims=True)
    return logistic.logits(classifier, feature_BD / jnp.maximum(norm_B1, 1e-12))

  return Classifier(logits, (suite.network, only), suite.settings)


def _finetuned(suite: Suite) -> Classifier:
  """The network of the evaluation `finetune`, which is run first unless it has been."""
  config, workdir = suite.train('finetune', {})
  settings = data_settings(config)
  source = data.make_source(settings, 'train')
  objective = make_run(config, len(source), len(source.class_names)).objective
  shapes, _ = jax.eval_shape(lambda key: objective.init(key, None), jax.random.key(0))
  loaded = initial.load(
    str(epath.Path(workdir) / initial.BEST) if config.checkpoint.best else workdir,
    {name: shapes[name] for name in ('backbone', 'head')},
    image_size=config.image_size,
    patch=objective.parts.patch,
  )
  statistics = loaded.pop('batch_stats', {})

  def logits(params, image_BHWC):
    image_BHWC = normalise(image_BHWC, objective.parts.mean, objective.parts.std)
    return objective.logits(*params, image_BHWC)

  params = jax.device_put((loaded, statistics), sharding.replicated(suite.mesh))
  return Classifier(logits, params, settings)


CLASSIFIERS: dict[str, Callable[[Suite], Classifier]] = {
  'linear_cached': _linear_classifier,
  'finetune': _finetuned,
}
