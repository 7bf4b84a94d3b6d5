"""What a run asks of its weights while it trains: kNN accuracy on frozen features, and held-out reconstruction."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from folk_jax import data
from folk_jax.evals import features, knn
from folk_jax.signal.augment import normalise
from folk_jax.train import sharding
from folk_jax.train import state as state_lib
from folk_jax.train.run import Run
from folk_jax.train.state import TrainState


class Evaluation:
  """Held-out evaluation during the run: weighted kNN on frozen features, and reconstruction."""

  def __init__(
    self, config: ml_collections.ConfigDict, run: Run, settings: data.DataSettings, mesh: Mesh
  ):
    self._config, self._settings, self._mesh = config.evaluation, settings, mesh
    self._bank, self._test = data.make_source(settings, 'train'), _held_out(settings)
    self._batch_size = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    self._rng = jax.random.key(config.seed)
    self._reconstruct = jax.jit(run.objective.evaluate)
    backbone = run.objective.parts.backbone
    mean, std = run.objective.parts.mean, run.objective.parts.std

    def pooled(params, image_BHWC):
      image_BHWC = normalise(image_BHWC.astype(jnp.float32) / 255.0, mean, std)
      return features.feature(backbone.apply({'params': params}, image_BHWC), 'pooled')

    self._pooled = pooled

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Scalars by their slash-named keys."""
    if self._test is None:
      return {}
    params = state_lib.weights(state, self._config.which)
    return self._knn(params) | self._reconstruction(state)

  def _batches(self, source: data.Source) -> Iterator[Mapping[str, np.ndarray]]:
    return data.eval_batches(
      source,
      self._settings,
      batch_size=self._batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _knn(self, params: Mapping[str, Any]) -> dict[str, float]:
    if not self._config.knn or min(self._bank.label(0), self._test.label(0)) < 0:
      return {}  # Not asked for, or no labels to vote with.

    def put(rows: np.ndarray) -> jax.Array:
      return sharding.put(rows, self._mesh)

    sets = []
    for source in (self._bank, self._test):
      with contextlib.closing(self._batches(source)) as batches:
        sets += features.extract(self._pooled, params['backbone'], batches, put=put)
    classes = 1 + max(int(sets[1].max()), int(sets[3].max()))
    ks = sorted({*self._config.knn, self._config.knn_headline})
    accuracy = knn.knn(*sets, ks=ks, temperature=self._config.knn_temperature, classes=classes)
    scalars = {f'eval/knn_top1_k{k}': accuracy[k][0] for k in ks}
    top1, top5 = accuracy[self._config.knn_headline]
    return scalars | {'eval/knn_top1': top1, 'eval/knn_top5': top5}

  def _reconstruction(self, state: TrainState) -> dict[str, float]:
    totals: dict[str, float] = {}
    limit = -(-self._config.reconstruction_images // self._batch_size)
    with contextlib.closing(self._batches(self._test)) as batches:
      for batch in itertools.islice(batches, limit):
        sums = self._reconstruct(state.params, sharding.put_batch(batch, self._mesh), self._rng)
        for name, value in jax.device_get(sums).items():
          totals[name] = totals.get(name, 0.0) + float(value)
    count = max(totals.pop('count', 0.0), 1.0)
    return {f'eval/{name}': total / count for name, total in totals.items()}


def _held_out(settings: data.DataSettings) -> data.Source | None:
  """The test split; None, said in a warning, where the data have none and none was asked for by name."""
  try:
    return data.make_source(settings, 'test')
  except data.MissingSplit as error:
    if settings.test_split:
      raise
    logging.warning('no evaluation during this run: %s', error)
    return None
