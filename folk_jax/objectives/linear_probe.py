"""The linear probe: classifiers on a frozen backbone, which runs each step on augmented images (DINO's protocol).

After DINO (arXiv 2104.14294, appendix; its eval_linear.py): random crop and flip, SGD with momentum 0.9 and no weight
decay, a cosine to 0, no gradient to the backbone. The protocol sweeps the learning rate; here every rate and every
feature has a head of its own, and all train at once on one forward pass of the backbone, which is where the time goes.

SGD, with momentum or without, is linear in the gradient: a head whose loss is multiplied by r under a learning rate of
1 moves as it would alone under the rate r. Only the optimiser must be linear: no clipping, no Adam. configs/linear.py
sets a base rate of 1 and neither.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, C channels, D width of a feature, R learning
rates, K classes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.models.features import FEATURES, encode_options, feature
from folk_jax.objectives.base import Batch, LossOutput, Params, Parts, statistics_of
from folk_jax.objectives.views import augmented_normalised, to_float, view_keys
from folk_jax.signal.augment import normalise
from folk_jax.signal.shard import over_batch

_INIT_DEVIATION = 0.01  # Of the kernels, as DINO's eval_linear.py; biases start at 0.
_NAME = re.compile(r'(?:.*/)?top1_lr(?P<rate>[^_]+)_(?P<feature>\w+)')


@dataclasses.dataclass(frozen=True)
class LinearProbe:
  """Heads for all learning rates and features. Fields are those of `config.objective`.

  Attributes:
    parts: backbone (whose parameters come from `config.init_from`), views, number of classes.
    learning_rates: each head's, relative to `config.optimizer.learning_rate`, which is 1 for 256 images.
    features: what the heads see, names of `models.features`; several share a forward pass.
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit', 'resnet')
  needs_labels: ClassVar[bool] = True  # Of every image, in [0, K): others are refused by name.
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone',)

  parts: Parts
  learning_rates: tuple[float, ...]
  features: tuple[str, ...]

  def __post_init__(self):
    for name in ('learning_rates', 'features'):
      values = getattr(self, name)
      if not values:
        raise UserError(f'config.objective.{name} is empty: give one or more.')
    if not all(0 < rate < math.inf for rate in self.learning_rates):
      raise UserError(f'config.objective.learning_rates {self.learning_rates} must be positive.')
    if len(set(self.head_names)) != len(self.head_names):
      raise UserError(
        'config.objective.learning_rates and features must differ from one another, rates in their first six digits; '
        f'found {self.learning_rates} and {self.features}.'
      )
    if self.parts.classes < 2:
      raise UserError(
        f'a linear probe needs labels of at least two classes and config.data has {self.parts.classes}: '
        'use a labelled data set.'
      )
    encode_options(self.features, self.parts.backbone)  # Checks them.

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh parameters {backbone, heads}; heads of a feature start alike whatever their rate. See `Objective.init`."""
    del batch  # Sizes are the parts'.
    backbone_rng, heads_rng = jax.random.split(rng)
    _, backbone, moments = self.parts.init_backbone(backbone_rng)
    # Statistics of clean images, which nothing here moves: none is left to recalibrate.
    extra = {'batch_stats': {'student': moments}, 'clean_stats': {}} if moments else {}
    image_1HWC = jnp.zeros((1, self.parts.image_size, self.parts.image_size, 3))
    widths = jax.eval_shape(lambda: self._features(backbone, moments, image_1HWC))
    rates, classes = len(self.learning_rates), self.parts.classes
    heads = {}
    for name, shape in widths.items():
      # Keyed on the feature, so that a head starts alike whichever others train beside it.
      key = jax.random.fold_in(heads_rng, list(FEATURES).index(name))
      kernel_DK = _INIT_DEVIATION * jax.random.normal(key, (shape.shape[-1], classes))
      heads[name] = {
        'kernel': jnp.repeat(kernel_DK[None], rates, axis=0),
        'bias': jnp.zeros((rates, classes)),
      }
    return {'backbone': backbone, 'heads': heads}, extra

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """The sum over heads of rate * cross-entropy. See `Objective.loss`.

    Metrics: `loss`, that sum, means little by itself; `loss_best` is the lowest cross-entropy of a head on this batch.
    """
    del teacher, step
    views = batch['views'].shape[1]
    # 1. Crops and flips were cut on the host; no other augmentation in the recipe.
    image_NHWC = over_batch(
      functools.partial(augmented_normalised, self.parts),
      batch['views'],
      view_keys(rng, batch['index'], views),
    )
    # 2. One forward pass of the frozen backbone, without drop path, by the statistics that it has.
    backbone = jax.lax.stop_gradient(params['backbone'])
    found = self._features(backbone, statistics_of(extra, 'student'), image_NHWC)
    found = jax.lax.stop_gradient(found)
    # 3. Every head's cross-entropy, each with its own rate.
    label_N = jnp.repeat(batch['label'], views)
    rate_R = jnp.array(self.learning_rates)
    entropies = []
    for name, feature_ND in found.items():
      log_RNK = jax.nn.log_softmax(_logits(params['heads'][name], feature_ND))
      own_RN = jnp.take_along_axis(log_RNK, label_N[None, :, None], axis=-1)[..., 0]
      entropies.append(-own_RN.mean(axis=1))
    loss = sum(jnp.sum(rate_R * entropy_R) for entropy_R in entropies)
    metrics = {'loss': loss, 'loss_best': jnp.min(jnp.stack(entropies))}
    return LossOutput(loss=loss, metrics=metrics, extra=extra)

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Right answers of every head on centre views, under its name from `head_names`. See `Objective.evaluate`."""
    del teacher, rng
    image_BHWC = normalise(to_float(batch['views'][:, 0]), self.parts.mean, self.parts.std)
    found = self._features(params['backbone'], statistics_of(extra, 'student'), image_BHWC)
    valid_B = batch['valid'].astype(jnp.float32)
    sums = {'count': jnp.sum(valid_B)}
    for name, feature_BD in found.items():
      guess_RB = jnp.argmax(_logits(params['heads'][name], feature_BD), axis=-1)
      right_R = jnp.sum(valid_B * (guess_RB == batch['label']), axis=1)
      sums |= {head_name(rate, name): right_R[i] for i, rate in enumerate(self.learning_rates)}
    return sums

  @property
  def head_names(self) -> tuple[str, ...]:
    """The heads as `evaluate` reports them."""
    return tuple(head_name(rate, name) for name in self.features for rate in self.learning_rates)

  def _features(
    self, backbone: Any, statistics: Any, image_NHWC: jax.Array
  ) -> dict[str, jax.Array]:
    options = encode_options(self.features, self.parts.backbone)
    output, _ = self.parts.encode(backbone, statistics, image_NHWC, **options)
    return {name: feature(output, name) for name in self.features}


def head_name(rate: float, feature_name: str) -> str:
  """'top1_lr0.01_pooled' for a rate of 0.01 on the feature 'pooled'."""
  return f'top1_lr{rate:g}_{feature_name}'


def choose(validation_scores: Mapping[str, float]) -> str:
  """The best head by its score on validation images, which must be neither trained nor tested on.

  Args:
    validation_scores: accuracies by name: heads as `head_name` calls them, with or without a prefix such as 'eval/'.
      Other names are passed over, and so are scores that are not finite.

  Returns:
    The name with the highest score; between equals the one of the lowest rate, then the first by name.

  Raises:
    UserError: if no head has a finite score.
  """
  heads = {name: match for name in validation_scores if (match := _NAME.fullmatch(name))}
  finite = [name for name in heads if math.isfinite(validation_scores[name])]
  if not finite:
    raise UserError(
      f'no head of a linear probe has a finite score among {", ".join(sorted(validation_scores)) or "no scores"}: '
      'evaluate a run of configs/linear.py.'
    )
  return min(finite, key=lambda name: (-validation_scores[name], float(heads[name]['rate']), name))


def _logits(head: Params, feature_ND: jax.Array) -> jax.Array:
  """float32 [R, N, K] of all heads of one feature, in one product."""
  return jnp.einsum('nd,rdk->rnk', feature_ND, head['kernel']) + head['bias'][:, None]
