"""What a run asks of its weights while it trains: kNN and, on periods of their own, logistic regression on frozen
features; and what its objective measures on held-out images.

And what evaluation asks of a backbone with BatchNorm: statistics of clean images.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh

from folk_jax import data, models
from folk_jax.errors import UserError
from folk_jax.evals import features, fewshot, knn, logistic
from folk_jax.objectives.base import mean_over_count
from folk_jax.signal.augment import normalise
from folk_jax.train import sharding
from folk_jax.train import state as state_lib
from folk_jax.train.guard import RunStopped
from folk_jax.train.run import Run
from folk_jax.train.state import TrainState

# C on features of length 1, for `linear_cached`: as configs/evaluate.py.
_LINEAR_REGULARISERS = (10.0, 100.0, 1e3, 1e4)


class Evaluation:
  """Held-out evaluation during the run, on frozen features and by the objective."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    run: Run,
    settings: data.DataSettings,
    mesh: Mesh,
    bank: data.Source | None = None,
  ):
    """Opens the data; `bank` is the training set where it is open already.

    Raises:
      UserError: data that can't be read, or that have no labels where the objective needs them.
    """
    self._config, self._settings, self._mesh = config.evaluation, settings, mesh
    self._bank = data.make_source(settings, 'train') if bank is None else bank
    self._test = _held_out(config, settings)
    self._classes = needed_classes(run, self._bank)
    if (
      self._classes
    ):  # One image of each says whether a split has any; the others are checked as they are read.
      for source in filter(None, (self._bank, self._test)):
        data.check_labels(source.labels(np.arange(1)), self._classes, source.name)
    self._batch_size = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    self._seed, self._rng = config.seed, jax.random.key(config.seed)
    if any(config.evaluation[period] for period in self._periods) and self._test is not None:
      if min(self._bank.label(0), self._test.label(0)) < 0:
        raise UserError(
          'config.evaluation.linear_cached_every and low_shot_every need labels, and the data have none: set them to 0.'
        )
    self._calibration = self._whole_batches(config.evaluation.recalibration_images, config.seed)
    self._evaluate = jax.jit(run.objective.evaluate)
    self._finish = getattr(run.objective, 'finish', mean_over_count)
    parts, feature = run.objective.parts, config.evaluation.feature

    def normalised(image_BHWC):
      return normalise(image_BHWC.astype(jnp.float32) / 255.0, parts.mean, parts.std)

    options = features.encode_options(feature, parts.backbone)

    def extract(network, image_BHWC):
      output, _ = models.encode(parts.backbone, *network, normalised(image_BHWC), **options)
      return features.feature(output, feature)

    def moments(params, statistics, image_BHWC):
      # Without memory, the statistics after a batch are the batch's own.
      backbone = dataclasses.replace(parts.backbone, norm_momentum=0.0)
      return models.encode(backbone, params, statistics, normalised(image_BHWC), train=True)[1]

    self._extract, self._moments, self._pool = extract, jax.jit(moments), jax.jit(_pooled)

  def __call__(self, state: TrainState, due: Sequence[int] = ()) -> dict[str, float]:
    """Scalars by their slash-named keys.

    Args:
      state: of the run.
      due: the steps whose evaluation this is, by default the state's own: one may have been put off.

    Raises:
      RunStopped: the network's features are not finite.
    """
    if self._test is None:
      return {}
    # Before the first step the teacher is the student and its statistics are of no image yet.
    which = self._config.which if int(state.step) else 'student'
    params = state_lib.weights(state, which)
    network = params['backbone'], state_lib.statistics(state, which)
    return self._frozen(network, due or (int(state.step),)) | self._measured(state)

  def due(self, step: int) -> bool:
    """Whether an evaluation with a period of its own falls on this step."""
    return bool(self._test) and any(self._is_due(period, step) for period in self._periods)

  @property
  def _periods(self) -> dict[str, Callable[[list[np.ndarray]], dict[str, float]]]:
    """Evaluations on frozen features besides kNN, by their periods."""
    return {
      'linear_cached_every': self._linear_cached,
      'low_shot_every': self._low_shot,
    }

  def _is_due(self, period: str, step: int) -> bool:
    every = self._config[period]
    return bool(every) and step > 0 and step % every == 0

  def names(self, state: TrainState) -> tuple[str, ...]:
    """The keys that a call reports, without making it: it traces the measurement of one image a device."""
    if self._test is None:
      return ()
    batches = data.eval_batches(
      self._test,
      dataclasses.replace(self._settings, workers=0),
      batch_size=self._mesh.size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    with contextlib.closing(batches):
      batch = sharding.put_batch(next(batches), self._mesh)
    teacher = state_lib.teacher_of(state)
    sums = jax.eval_shape(self._evaluate, state.params, teacher, state.extra, batch, self._rng)
    scalars = self._finish({name: np.ones(total.shape) for name, total in sums.items()})
    return (*self._knn_names(), *(f'eval/{name}' for name in scalars))

  def recalibrated(self, state: TrainState) -> TrainState:
    """`state` with BatchNorm statistics of clean images for the networks that training showed none.

    Statistics of filtered images don't fit unfiltered ones: what is evaluated or saved for others has those of
    `evaluation.recalibration_images` centre views, drawn once from the training set. A state without BatchNorm comes
    back as it is.
    """
    if 'clean_stats' not in state.extra or not state.extra['clean_stats']:
      return state
    networks = {
      which: (state_lib.weights(state, which)['backbone'], statistics)
      for which, statistics in state.extra['clean_stats'].items()
    }
    found = {which: [] for which in networks}
    with contextlib.closing(self._batches(self._calibration)) as batches:
      for batch in batches:
        image_BHWC = sharding.put(batch['views'][:, 0], self._mesh)
        for which, network in networks.items():
          found[which].append(self._moments(*network, image_BHWC))
    return state.replace(extra=state.extra | {'clean_stats': self._pool(found)})

  def _whole_batches(self, images: int, seed: int) -> data.Source:
    """About `images` of the training set in random order (a folder is sorted by class), without padding."""
    count = max(1, images // self._batch_size) * self._batch_size
    order = np.random.default_rng(seed).permutation(len(self._bank))
    return data.Subset(self._bank, np.resize(order, count))

  def _batches(self, source: data.Source, classes: int = 0) -> Iterator[Mapping[str, np.ndarray]]:
    return data.eval_batches(
      source,
      self._settings,
      batch_size=self._batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      classes=classes,
    )

  def _knn_names(self) -> tuple[str, ...]:
    if not self._config.knn or min(self._bank.label(0), self._test.label(0)) < 0:
      return ()  # Not asked for, or no labels to vote with.
    ks = sorted({*self._config.knn, self._config.knn_headline})
    return (*(f'eval/knn_top1_k{k}' for k in ks), 'eval/knn_top1', 'eval/knn_top5')

  def _frozen(self, network: tuple[Any, Any], due: Sequence[int]) -> dict[str, float]:
    """kNN, and what is due of the rest, on features that are extracted once."""
    rest = [
      evaluate
      for period, evaluate in self._periods.items()
      if any(self._is_due(period, step) for step in due)
    ]
    if not self._knn_names() and not rest:
      return {}
    sets = self._features(network)
    scalars = self._knn(sets) if self._knn_names() else {}
    for evaluate in rest:
      scalars |= evaluate(sets)
    return scalars

  def _linear_cached(self, sets: list[np.ndarray]) -> dict[str, float]:
    train_ND, label_N, test_QD, label_Q = sets
    fitted, _ = fewshot.linear_classifier(
      train_ND,
      label_N,
      classes=len(self._bank.class_names),
      regularisers=_LINEAR_REGULARISERS,
      folds=3,
      seed=self._seed,
    )
    found_Q = logistic.predict(fitted, fewshot.unit_length(test_QD))
    return {'eval/linear_cached_top1': float(np.mean(found_Q == label_Q))}

  def _low_shot(self, sets: list[np.ndarray]) -> dict[str, float]:
    scalars = {}
    for shots in self._config.low_shot_images:
      found = fewshot.low_shot(
        *sets,
        classes=len(self._bank.class_names),
        amount=int(shots),
        draws=self._config.low_shot_draws,
        seed=self._seed,
      )
      scalars[f'eval/low_shot_{shots}_images_a_class'] = found.mean
    return scalars

  def _features(self, network: tuple[Any, Any]) -> list[np.ndarray]:
    """Training features and labels, test features and labels."""

    def put(rows: np.ndarray) -> jax.Array:
      return sharding.put(rows, self._mesh)

    sets = []
    for source in (self._bank, self._test):
      with contextlib.closing(self._batches(source, len(source.class_names))) as batches:
        try:
          sets += features.extract(self._extract, network, batches, put=put)
        except data.MissingLabel as error:
          raise UserError(
            f'{error}; or leave out kNN, which asks for it: config.evaluation.knn=().'
          ) from error
        except features.Diverged as error:
          raise RunStopped(f'in the evaluation {error}') from error
    return sets

  def _knn(self, sets: list[np.ndarray]) -> dict[str, float]:
    classes = 1 + max(int(sets[1].max()), int(sets[3].max()))
    ks = sorted({*self._config.knn, self._config.knn_headline})
    accuracy = knn.knn(*sets, ks=ks, temperature=self._config.knn_temperature, classes=classes)
    scalars = {f'eval/knn_top1_k{k}': accuracy[k][0] for k in ks}
    top1, top5 = accuracy[self._config.knn_headline]
    return scalars | {'eval/knn_top1': top1, 'eval/knn_top5': top5}

  def _measured(self, state: TrainState) -> dict[str, float]:
    """What the objective measures on held-out images: averaged over them, or as it says itself."""
    totals: dict[str, Any] = {}
    limit = -(-self._config.held_out_images // self._batch_size) or None
    with contextlib.closing(self._batches(self._test, self._classes)) as batches:
      for batch in itertools.islice(batches, limit):
        batch = sharding.put_batch(batch, self._mesh)
        teacher = state_lib.teacher_of(state)
        sums = self._evaluate(state.params, teacher, state.extra, batch, self._rng)
        for name, value in jax.device_get(sums).items():
          totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    scalars = self._finish(totals)
    return {f'eval/{name}': float(value) for name, value in scalars.items()}


def _pooled(found: Mapping[str, list[Any]]) -> dict[str, Any]:
  """BatchNorm statistics of all batches together, from those of each: by network, then as the backbone has them."""

  def pool(*batches):
    mean = jnp.stack([batch['mean'] for batch in batches])
    var = jnp.stack([batch['var'] for batch in batches])
    return {'mean': mean.mean(0), 'var': var.mean(0) + mean.var(0)}

  def is_norm(node):
    return isinstance(node, Mapping) and set(node) == {'mean', 'var'}

  return {which: jax.tree.map(pool, *trees, is_leaf=is_norm) for which, trees in found.items()}


def needed_classes(run: Run, source: data.Source) -> int:
  """The number of classes of which every image must have one, 0 where the objective needs no labels."""
  return len(source.class_names) if getattr(run.objective, 'needs_labels', False) else 0


def _held_out(config: ml_collections.ConfigDict, settings: data.DataSettings) -> data.Source | None:
  """The split to judge by; None, said in a warning, where the data have none and none was asked for by name."""
  try:
    return data.make_source(settings, config.evaluation.split)
  except data.MissingSplit as error:
    if settings.test_split:
      raise
    logging.warning('no evaluation during this run: %s', error)
    return None
