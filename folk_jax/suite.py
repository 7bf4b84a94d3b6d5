"""What the evaluations of one checkpoint share: its network, the data to judge it on, and frozen features.

Shape letters: N, M images of a data set, B of a batch, H, W pixels, C channels, D features.
"""

import contextlib
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from etils import epath

from folk_jax import data, models
from folk_jax.errors import UserError
from folk_jax.evals import cache, features, fewshot, logistic
from folk_jax.signal.augment import normalise
from folk_jax.train import initial, sharding
from folk_jax.train.run import data_settings, make_backbone


def adopt_run(config: ml_collections.ConfigDict) -> None:
  """Takes model, image size and, unless `config.data.source` is set, the data from the run in `config.checkpoint`."""
  file = epath.Path(config.checkpoint).expanduser() / 'config.json'
  if not file.exists():
    if not config.data.source:
      raise UserError(
        f'{config.checkpoint} is not a workdir, so nothing says which data to judge it on: give data=SOURCE, or '
        'path=DIR, in the recipe argument.'
      )
    return
  run = json.loads(file.read_text())
  given = config.data.to_dict()
  # Fields that are newer than the run keep the recipe's values.
  own = given if given['source'] else given | run['data'] | {'limit': given['limit']}
  for part in (config, config.linear, config.finetune):
    with part.unlocked():
      part.model = ml_collections.ConfigDict(run['model'])
      part.image_size = run['image_size']
      part.data = ml_collections.ConfigDict(own)
  # The sweep's recipe names features of deeper models too: those that this one can't give are left out.
  blocks = run['model']['depth'] if run['model']['name'] == 'vit' else 0
  probe = config.linear.objective
  probe.features = tuple(
    name for name in probe.features if features.FEATURES[name].last_blocks <= blocks
  )


class Suite:
  """What the evaluations share: the network, the data, and frozen features."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    workdir: str,
    mesh: jax.sharding.Mesh,
  ):
    self.config, self.workdir, self.mesh = config, workdir, mesh
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
    )
    placed = jax.device_put(
      (loaded['backbone'], loaded.get('batch_stats', {})), sharding.replicated(mesh)
    )
    self.network = placed  # (parameters, BatchNorm statistics)

  @functools.cached_property
  def classes(self) -> int:
    """Number of classes of the data."""
    names = data.make_source(self.settings, 'train').class_names
    if len(names) < 2:
      raise UserError(
        'the data have no labels, which every evaluation but restoration needs: give labelled data.'
      )
    return len(names)

  def batches(self, split: str) -> data.Batches:
    """Centre views of a split, once."""
    size = -(-self.config.evaluation.batch_size // self.mesh.size) * self.mesh.size
    return data.eval_batches(
      data.make_source(self.settings, split),
      self.settings,
      batch_size=size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
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
        'data': json.loads(json.dumps(self.config.data.to_dict())),
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

  def _extract(self, split: str, images: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    def apply(params, image_BHWC):
      return {'feature': self.feature(params, image_BHWC.astype(jnp.float32) / 255.0)}

    shown = self.config.logging.progress and not jax.process_index()
    with (
      contextlib.closing(self.batches(split)) as batches,
      tqdm.tqdm(
        desc=f'features, {split}',
        total=images,
        unit='image',
        disable=not shown,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,  # A log needs no hundred lines.
      ) as bar,
    ):
      return features.extract(apply, self.network, batches, put=self.put, progress=bar.update)

  @functools.cached_property
  def linear_classifier(self) -> tuple[logistic.Classifier, float]:
    """Logistic regression on frozen features of unit length, its C by cross-validation in the training set; and C."""
    train_ND, label_N, _, _ = self.frozen
    unit_ND = unit_length(train_ND)
    settings = self.config.linear_cached
    fold_N = fewshot.assign_folds(label_N, settings.folds, (self.config.seed,))
    accuracy, likelihood, _ = logistic.cross_validate(
      unit_ND, label_N, fold_N, settings.regularisers, classes=self.classes
    )
    best = max(range(len(accuracy)), key=lambda i: (accuracy[i], likelihood[i]))
    c = settings.regularisers[best]
    fitted = logistic.fit(unit_ND, label_N, [c], classes=self.classes)
    return fitted, c


def unit_length(feature_ND: np.ndarray) -> np.ndarray:
  """Features of length 1; those of length 0 stay."""
  return feature_ND / np.maximum(np.linalg.norm(feature_ND, axis=1, keepdims=True), 1e-12)
