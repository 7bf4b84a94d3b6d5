"""What a classifier still gets right: under attack, on corrupted images, on other folders of its classes.

A perturbation is `(logits_fn, image_BHWC, label_B, keys_B) -> image_BHWC` on images in [0, 1]: an
`Attack`, a `Corrupt`, or any function of that form. `accuracy_under` runs one over a data set.

Shape letters: B images, H, W pixels, C channels, K classes of the model, S classes of a subset.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError
from folk_jax.evals import calibration
from folk_jax.objectives.base import sample_keys
from folk_jax.objectives.views import to_float
from folk_jax.signal import corruptions
from folk_jax.signal.shard import over_batch

# Images [B, H, W, C] in [0, 1] -> logits [B, K]; normalisation is the function's own affair.
LogitsFn = Callable[[jax.Array], jax.Array]
Perturbation = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]

EPSILON = 1 / 255

# AlexNet's top-1 error on ImageNet-C, the mean over five severities: the table that mCE is stated
# against (code of arXiv 1903.12261). It belongs to that data set's files, 224 px JPEGs; against
# `signal.corruptions`, which draws its own, a normalised figure is not ImageNet-C's mCE.
ALEXNET_ERRORS: Mapping[str, float] = types.MappingProxyType({
  'gaussian_noise': 0.886428,
  'shot_noise': 0.894468,
  'impulse_noise': 0.922640,
  'defocus_blur': 0.819880,
  'glass_blur': 0.826268,
  'motion_blur': 0.785948,
  'zoom_blur': 0.798360,
  'snow': 0.866816,
  'frost': 0.826572,
  'fog': 0.819324,
  'brightness': 0.564592,
  'contrast': 0.853204,
  'elastic_transform': 0.646056,
  'pixelate': 0.717840,
  'jpeg_compression': 0.606500,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Attack:
  """Steps along the sign of the loss's gradient, within a cube around each image (L-infinity).

  FGSM (arXiv 1412.6572, equation in section 4) is one step of the cube's size without a random
  start; PGD (arXiv 1706.06083, section 2.1) several smaller ones from a random point, of which the
  last is returned, not the worst. The loss is the cross-entropy with the true label. Its gradient's
  sign is that of the other classes' log-sum-exp less the true logit, of which the loss is the
  softplus: taken so, it is right where the classifier is so sure that float32 has a probability of
  1 and a gradient of 0, and an attack would seem to fail. It is taken at the image in [0, 1],
  through whatever `logits_fn` does to it.

  Attributes:
    epsilon: half the cube's side, in units of the image, above 0.
    steps: 1 or more.
    step_size: in units of the image, above 0.
    random_start: uniform in the cube, drawn from the image's own key; else the image itself.

  Raises:
    UserError: on construction, for a field outside these ranges.
  """

  epsilon: float
  steps: int
  step_size: float
  random_start: bool

  def __post_init__(self):
    for name in ('epsilon', 'step_size'):
      if not 0 < getattr(self, name) <= 1:
        raise UserError(
          f'{name} of the attack is {getattr(self, name)}: images lie in [0, 1], choose it above 0 '
          f'and at most 1, for instance 1 / 255'
        )
    if self.steps < 1:
      raise UserError(f'the attack has {self.steps} steps: choose 1 or more')

  def __call__(
    self, logits_fn: LogitsFn, image_BHWC: jax.Array, label_B: jax.Array, keys_B: jax.Array
  ) -> jax.Array:
    """The attacked images. Images don't affect each other: a batch stays sharded as it is.

    Args:
      logits_fn: see `LogitsFn`; row i of its result may depend on image i alone.
      image_BHWC: float32 in [0, 1].
      label_B: int; outside [0, K) (padding) the nearest class is attacked.
      keys_B: typed PRNG keys, one an image.

    Returns:
      float32 [B, H, W, C] in [0, 1], no value further than epsilon from where it was.
    """
    chex.assert_rank(image_BHWC, 4)
    chex.assert_type(image_BHWC, jnp.float32)
    chex.assert_shape([label_B, keys_B], image_BHWC.shape[:1])
    low_BHWC = jnp.maximum(image_BHWC - self.epsilon, 0)
    high_BHWC = jnp.minimum(image_BHWC + self.epsilon, 1)

    def lead_B(attacked_BHWC: jax.Array) -> jax.Array:
      logits_BK = logits_fn(attacked_BHWC).astype(jnp.float32)
      classes = logits_BK.shape[1]
      true_BK = jnp.arange(classes) == jnp.clip(label_B, 0, classes - 1)[:, None]
      others_B = jax.nn.logsumexp(logits_BK, axis=1, where=~true_BK)
      return others_B - jnp.sum(jnp.where(true_BK, logits_BK, 0), axis=1)

    def climb(_: jax.Array, attacked_BHWC: jax.Array) -> jax.Array:
      # One cotangent an image: a mean over the batch would have the devices talk.
      lead, pull_back = jax.vjp(lead_B, attacked_BHWC)
      (gradient_BHWC,) = pull_back(jnp.ones_like(lead))
      moved_BHWC = attacked_BHWC + self.step_size * jnp.sign(gradient_BHWC)
      return jnp.clip(moved_BHWC, low_BHWC, high_BHWC)

    start_BHWC = image_BHWC
    if self.random_start:
      noise_BHWC = over_batch(functools.partial(_uniform, image_BHWC.shape[1:]), keys_B)
      start_BHWC = jnp.clip(image_BHWC + self.epsilon * noise_BHWC, low_BHWC, high_BHWC)
    return jax.lax.fori_loop(0, self.steps, climb, start_BHWC)


def fgsm(epsilon: float = EPSILON) -> Attack:
  """The fast gradient sign method: one step to the cube's corner, then back into [0, 1]."""
  return Attack(epsilon, steps=1, step_size=epsilon, random_start=False)


def pgd(epsilon: float = EPSILON, steps: int = 10, step_size: float | None = None) -> Attack:
  """Projected gradient descent; by default steps of 2.5 epsilon / steps, so that it reaches any corner."""
  if steps < 1:
    raise UserError(f'the attack has {steps} steps: choose 1 or more')
  return Attack(epsilon, steps, step_size or min(1.0, 2.5 * epsilon / steps), random_start=True)


@dataclasses.dataclass(frozen=True)
class Corrupt:
  """A corruption of `signal.corruptions` as a perturbation; it doesn't look at the classifier.

  Attributes:
    name: a key of `CORRUPTIONS`.
    severity: 1 to 5.
  """

  name: str
  severity: int

  def __call__(
    self, logits_fn: LogitsFn, image_BHWC: jax.Array, label_B: jax.Array, keys_B: jax.Array
  ) -> jax.Array:
    del logits_fn, label_B
    fn = functools.partial(corruptions.corrupt, self.name, severity=self.severity)
    return over_batch(fn, image_BHWC, keys_B)


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Of the valid images: shares in [0, 1], and how the confidence fits them."""

  top1: float
  top5: float  # Of fewer than five classes: 1.
  calibration: calibration.Calibration

  @property
  def count(self) -> int:
    return self.calibration.count


def accuracy_under(
  perturb: Perturbation | None,
  logits_fn: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  rng: jax.Array,
  subset_S: np.ndarray | None = None,
  put: Callable[[np.ndarray], jax.Array] | None = None,
  progress: Callable[[int], None] | None = None,
) -> Accuracy:
  """Accuracy on perturbed images, all of it on the devices.

  Args:
    perturb: see `Perturbation`; None leaves the images clean. Hashable: the same one again (equal
      fields, for the classes here) is not compiled again.
    logits_fn: `(params, image float32 [B, H, W, 3] in [0, 1]) -> logits [B, K]`; the same function
      object again is not compiled again.
    params: its parameters, on the devices.
    batches: dicts with `views` uint8 [B, V, H, W, 3], of which the first view is taken, `label`
      int32 [B], `index` int [B] and `valid` bool [B]. Rows that are not valid count nothing.
    rng: typed key; an image's draws depend on it and on its `index` alone.
    subset_S: `class_subset` of the folder's classes, whose labels are then places in it.
    put: moves a host array with a leading batch axis to the devices; by default `jnp.asarray`.
    progress: called with the number of valid rows each time a batch is done.

  Returns:
    `Accuracy`.

  Raises:
    UserError: no image is valid, or a label lies outside the classes.
  """
  put = put or jnp.asarray
  # Totals stay on the devices, and one batch is in flight while the next is made ready.
  totals, pending = None, 0
  for batch in batches:
    view_BVHWC, label_B, index_B, valid_B = (
      put(batch[name]) for name in ('views', 'label', 'index', 'valid')
    )
    image_BHWC = _perturbed(perturb, logits_fn, params, view_BVHWC, label_B, index_B, rng, subset_S)
    sums = _batch_sums(logits_fn, params, image_BHWC, label_B, valid_B, subset_S)
    before, totals = totals, sums if totals is None else _added(totals, sums)
    jax.block_until_ready(before)
    if progress and pending:
      progress(pending)
    pending = int(np.sum(batch['valid']))
  if progress:
    jax.block_until_ready(totals)
    progress(pending)
  if totals is None:
    raise UserError('no batch to measure accuracy on: the data set is empty')
  top5, strays, calibration_sums = jax.device_get(totals)
  if strays:
    raise UserError(
      f'{int(strays)} labels lie outside the classes of the classifier: evaluate on the data set '
      f'it was trained for, or give the subset of its classes that the folder holds'
    )
  found = calibration.summarise(calibration_sums)
  return Accuracy(found.accuracy, float(top5) / found.count, found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _perturbed(perturb, logits_fn, params, view_BVHWC, label_B, index_B, rng, subset_S):
  """The perturbed images. A program of its own, so that a corruption doesn't compile the model anew."""
  image_BHWC = to_float(view_BVHWC[:, 0])
  if perturb is None:
    return image_BHWC
  keys_B = sample_keys(rng, index_B, 0)
  return perturb(_bound(logits_fn, params, subset_S), image_BHWC, label_B, keys_B)


def _bound(logits_fn, params, subset_S) -> LogitsFn:
  def logits(image_BHWC: jax.Array) -> jax.Array:
    logits_BK = logits_fn(params, image_BHWC).astype(jnp.float32)
    return logits_BK if subset_S is None else subset_logits(logits_BK, subset_S)

  return logits


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(logits_fn, params, image_BHWC, label_B, valid_B, subset_S):
  """(top-5 hits, labels outside the classes, calibration sums) of the valid rows."""
  logits_BK = _bound(logits_fn, params, subset_S)(image_BHWC)
  classes = logits_BK.shape[1]
  inside_B = (label_B >= 0) & (label_B < classes)
  label_B = jnp.clip(label_B, 0, classes - 1)
  own_B1 = jnp.take_along_axis(logits_BK, label_B[:, None], axis=1)
  # Equal logits rank by class number, as in argmax.
  ahead_BK = (logits_BK > own_B1) | (
    (logits_BK == own_B1) & (jnp.arange(classes) < label_B[:, None])
  )
  top5_B = jnp.sum(ahead_BK, axis=1) < 5
  return (
    jnp.sum(valid_B & top5_B, dtype=jnp.float32),
    jnp.sum(valid_B & ~inside_B, dtype=jnp.float32),
    calibration.sums(logits_BK, label_B, valid_B),
  )


@jax.jit
def _added(totals: Any, sums: Any) -> Any:
  return jax.tree.map(jnp.add, totals, sums)


def class_subset(
  model_classes: Sequence[str], folder_classes: Sequence[str], folder: str
) -> np.ndarray:
  """Where a folder's classes stand among the model's: ImageNet-A, -R hold 200 of the 1000.

  Args:
    model_classes: names (WordNet numbers) in the order of the model's logits.
    folder_classes: names in the order of the folder's labels.
    folder: what to call it in an error.

  Returns:
    int32 [S], for `subset_logits`.

  Raises:
    UserError: a class of the folder that the model doesn't have, or one listed twice.
  """
  for whose, names in (('the model', model_classes), (folder, folder_classes)):
    if len(set(names)) < len(names):
      twice = sorted({name for name in names if list(names).count(name) > 1})
      raise UserError(f'classes of {whose} are listed twice: {_few(twice)}; give each once')
  place = {name: k for k, name in enumerate(model_classes)}
  unknown = [name for name in folder_classes if name not in place]
  if unknown or not folder_classes:
    raise UserError(
      f'{folder} has {len(unknown)} of {len(folder_classes)} classes that are not among the '
      f'{len(place)} of the model: {_few(unknown)}; its class folders must bear names from the '
      f'training set (for instance {_few(list(model_classes)[:2])})'
    )
  return np.asarray([place[name] for name in folder_classes], np.int32)


def subset_logits(logits_BK: jax.Array, subset_S: jax.Array | np.ndarray) -> jax.Array:
  """The logits of some classes alone, [B, S]: other classes can neither win nor take probability."""
  chex.assert_rank([logits_BK, subset_S], [2, 1])
  return jnp.take(logits_BK, subset_S, axis=1)


@dataclasses.dataclass(frozen=True)
class CorruptionError:
  """See `corruption_error`; shares, not percent.

  Attributes:
    errors: mean top-1 error over the severities, by corruption.
    mean: of `errors` over the corruptions.
    normalised: CE by corruption, or None without a baseline; 1 is as good as the baseline.
    mce: mean of `normalised`, or None.
  """

  errors: Mapping[str, float]
  mean: float
  normalised: Mapping[str, float] | None
  mce: float | None


def corruption_error(
  errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float] | None = None
) -> CorruptionError:
  """Corruption errors and their mean (arXiv 1903.12261, section 4.2: CE, mCE).

  CE of a corruption is the sum of the classifier's errors over the severities divided by the
  baseline's sum; mCE is the mean of CE. They are means of ratios, so the corruptions they are
  taken over have to be stated with them: the paper's are fifteen.

  Args:
    errors: by corruption, top-1 errors in [0, 1] for severities 1, 2, ...; as many for each.
    baseline: by corruption, the baseline's mean error over the same severities; others in it are
      ignored.

  Returns:
    `CorruptionError`.

  Raises:
    UserError: no error, one outside [0, 1], unequal numbers of severities, or a corruption for
      which the baseline has none.
  """
  counts = {len(by_severity) for by_severity in errors.values()}
  if len(counts) != 1 or counts == {0}:
    raise UserError(
      f'corruption errors come with {sorted(counts)} severities: give as many for each corruption'
    )
  for name, by_severity in errors.items():
    if not all(0 <= error <= 1 for error in by_severity):
      raise UserError(
        f'errors under {name} are {tuple(by_severity)}: give shares from 0 to 1, not percent'
      )
  means = {name: float(np.mean(by_severity)) for name, by_severity in errors.items()}
  mean = float(np.mean(list(means.values())))
  if baseline is None:
    return CorruptionError(means, mean, None, None)
  missing = [name for name in means if not baseline.get(name, 0) > 0]
  if missing:
    raise UserError(
      f'the baseline has no error above 0 for {_few(missing)}: leave them out of the mean, or '
      f'measure the baseline on them'
    )
  normalised = {name: error / baseline[name] for name, error in means.items()}
  return CorruptionError(means, mean, normalised, float(np.mean(list(normalised.values()))))


def _uniform(shape: tuple[int, ...], keys_B: jax.Array) -> jax.Array:
  """Uniform in [-1, 1), float32 [B, *shape]."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0))(keys_B)


def _few(names: Sequence[str], most: int = 5) -> str:
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
