"""Newton's method for multinomial logistic regression, in float32. `evals.logistic` has the objective and the callers.

Each direction comes from preconditioned conjugate gradients on the exact Hessian, each length from backtracking
(Nocedal and Wright, Numerical Optimization, 2nd edition, algorithm 7.1). Near the minimum float32 can't tell two values
of the objective apart; the line search then judges by the slope, as Hager and Zhang's does (SIAM J. Optim. 16, 2005,
equation 4.1).

Shape letters: N images, D features, K classes.
"""

from typing import NamedTuple

import chex
import jax
from jax import numpy as jnp

TOLERANCE = 1e-7
NEWTON_STEPS, GRADIENT_STEPS, HALVINGS = 100, 200, 25
# The line search's Armijo constant, and the relative rounding of an objective in float32.
_DECREASE, _ROUNDING = 1e-4, 1e-6


class Classifier(NamedTuple):
  """A fitted model and how it was reached; leading axes where there are several.

  Attributes:
    kernel: float32 [D, K].
    bias: float32 [K]; -inf for a class without an image of positive weight, which is never predicted.
    converged: bool, whether `gap` fell to the tolerance.
    steps: int32, Newton steps taken.
    gap: float32, half the squared Newton decrement over the objective before the last step: by how much, relatively,
      the objective still had to fall; that step took it most of the way.
  """

  kernel: jax.Array
  bias: jax.Array
  converged: jax.Array
  steps: jax.Array
  gap: jax.Array


class _State(NamedTuple):
  kernel_DK: jax.Array
  bias_K: jax.Array
  steps: jax.Array
  gap: jax.Array
  stuck: jax.Array


def logits(classifier: Classifier, feature_ND: jax.Array) -> jax.Array:
  """float32 [N, K] of one classifier; -inf for a class that it has never seen."""
  return product(feature_ND, classifier.kernel) + classifier.bias


def fit_one(
  feature_ND: jax.Array,
  label_N: jax.Array,
  weight_N: jax.Array,
  c: jax.Array | float,
  *,
  classes: int,
  tolerance: float = TOLERANCE,
  start: tuple[jax.Array, jax.Array] | None = None,
) -> Classifier:
  """The minimiser for one set of weights and one C. Pure and jittable; see `fit` for many at once.

  Args:
    feature_ND: float32; of a scale near 1, as 'unit' or 'standardise' of `evals.fewshot` make it, and along principal
      axes, as `logistic.principal` turns them, for the fewest steps.
    label_N: int32 in [0, classes).
    weight_N: float32, not negative, not all 0.
    c: inverse strength of the penalty, positive.
    classes: K, static.
    tolerance: of `Classifier.gap`. It means the same at any scale of features, images and C, and where the classes can
      be separated, so that the gradient vanishes with the loss.
    start: kernel [D, K] and bias [K], finite, to descend from; zeros by default.

  Returns:
    The classifier; `converged` is False where `NEWTON_STEPS` did not do or float32 allowed no further descent.
  """
  chex.assert_rank([feature_ND, label_N, weight_N], [2, 1, 1])
  chex.assert_equal_shape_prefix([feature_ND, label_N, weight_N], 1)
  chex.assert_type([feature_ND, weight_N], jnp.float32)
  total = weight_N.sum()
  # The objective is divided by the sum of weights: its terms are then near 1.
  share_N = weight_N / total
  penalty = 1.0 / (c * total)
  target_NK = jax.nn.one_hot(label_N, classes)
  count_K = product(share_N, target_NK)
  # Without an image of its own a class's intercept would run off to minus infinity: it is put there.
  seen_K = (count_K > 0).astype(jnp.float32)
  floor_K = jnp.where(count_K > 0, 0.0, -jnp.inf)

  def residual(logit_NK):
    """d cross-entropy / d logits; an own class's is minus the sum of the others', exact where they are tiny."""
    others_NK = jax.nn.softmax(logit_NK) * (1 - target_NK)
    return share_N[:, None] * (others_NK - target_NK * others_NK.sum(axis=1, keepdims=True))

  def gradient(kernel_DK, logit_NK):
    residual_NK = residual(logit_NK)
    slope_DK = product(feature_ND.T, residual_NK) + penalty * kernel_DK
    return _centred((slope_DK, residual_NK.sum(axis=0)), seen_K)

  zero = jnp.zeros((feature_ND.shape[1], classes)), jnp.zeros(classes)
  scale = jnp.maximum(
    _norm(gradient(zero[0], jnp.zeros_like(target_NK) + floor_K)), jnp.finfo(jnp.float32).tiny
  )

  def going(state: _State):
    return (state.gap > tolerance) & (state.steps < NEWTON_STEPS) & ~state.stuck

  def step(state: _State) -> _State:
    logit_NK = product(feature_ND, state.kernel_DK) + state.bias_K + floor_K
    uphill = gradient(state.kernel_DK, logit_NK)
    direction = _newton_direction(
      feature_ND, share_N, jax.nn.softmax(logit_NK), penalty, seen_K, uphill, scale
    )
    change_NK = product(feature_ND, direction[0]) + direction[1]

    # Along a direction the logits are linear: no trial length costs a product with the features.
    def along(length):
      there_NK = logit_NK + length * change_NK
      kernel_DK = state.kernel_DK + length * direction[0]
      value = _dot(share_N, _cross_entropy(there_NK, target_NK, share_N > 0))
      value += 0.5 * penalty * _dot(kernel_DK, kernel_DK)
      return value, _dot(residual(there_NK), change_NK) + penalty * _dot(kernel_DK, direction[0])

    value, descent = along(0.0)

    def accepted(length):
      there, slope = along(length)
      armijo = there <= value + _DECREASE * length * descent
      flat = (there <= value + _ROUNDING * jnp.abs(value)) & (slope <= -0.8 * descent)
      return armijo | flat

    def too_long(search):
      length, halvings = search
      return ~accepted(length) & (halvings < HALVINGS)

    length, halvings = jax.lax.while_loop(
      too_long, lambda search: (0.5 * search[0], search[1] + 1), (jnp.float32(1), jnp.int32(0))
    )
    # No way down although the gradient isn't zero: rounding has eaten the curvature.
    lost = ~(descent < 0) & (_norm(uphill) > 0)
    stuck = lost | (halvings >= HALVINGS)
    length = jnp.where(stuck, 0.0, length)
    gap = -0.5 * descent / jnp.maximum(value, jnp.finfo(jnp.float32).tiny)
    gap = jnp.where(lost, jnp.inf, gap)
    return _State(
      state.kernel_DK + length * direction[0],
      state.bias_K + length * direction[1],
      state.steps + 1,
      gap,
      stuck,
    )

  kernel_DK, bias_K = zero if start is None else _centred(start, seen_K)
  state = _State(kernel_DK, bias_K, jnp.int32(0), jnp.float32(jnp.inf), jnp.bool_(False))
  state = jax.lax.while_loop(going, step, state)
  return Classifier(
    state.kernel_DK,
    state.bias_K + floor_K,
    state.gap <= tolerance,
    state.steps,
    state.gap,
  )


def _centred(tree, seen_K):
  """Without the mean over classes, in which the loss is blind: at the minimum it is 0, and on the way only rounding."""

  def centre(leaf):
    mean = jnp.sum(leaf * seen_K, axis=-1, keepdims=True) / jnp.sum(seen_K)
    return (leaf - mean) * seen_K

  return jax.tree.map(centre, tree)


def _cross_entropy(logit_NK, target_NK, counts_N):
  """One value an image, exact where it is tiny (logsumexp minus the own logit would cancel); 0 where not counted."""
  own_N1 = jnp.sum(jnp.where(target_NK > 0, logit_NK, 0.0), axis=1, keepdims=True)
  behind_NK = jnp.where(target_NK > 0, -jnp.inf, logit_NK - own_N1)
  return jnp.where(counts_N, jax.nn.softplus(jax.nn.logsumexp(behind_NK, axis=1)), 0.0)


def _newton_direction(feature_ND, share_N, probability_NK, penalty, seen_K, gradient, scale):
  """-H^-1 g by conjugate gradients, with the Hessian's diagonal as preconditioner.

  They stop at min(0.5, sqrt(|g| / |g at 0|)) * |g|: then the whole converges faster than linearly (Nocedal and Wright,
  theorem 7.2) and the first steps are cheap.
  """

  # Where one class has nearly all the probability, its change less the mean change is all rounding. Changes are
  # counted from that class's, which alters nothing else: then the small terms are exact, and the curvature positive.
  first_N1 = jnp.argmax(probability_NK, axis=1)[:, None]
  first_NK = jnp.arange(probability_NK.shape[1]) == first_N1

  def hessian(direction):
    kernel_DK, bias_K = direction
    change_NK = product(feature_ND, kernel_DK) + bias_K
    change_NK -= jnp.take_along_axis(change_NK, first_N1, axis=1)
    mean_N1 = jnp.sum(probability_NK * change_NK, axis=1, keepdims=True)
    curved_NK = share_N[:, None] * probability_NK * (change_NK - mean_N1)
    curved_DK = product(feature_ND.T, curved_NK) + penalty * kernel_DK
    return _centred((curved_DK, curved_NK.sum(axis=0)), seen_K)

  rest_N1 = jnp.sum(jnp.where(first_NK, 0.0, probability_NK), axis=1, keepdims=True)
  others_NK = jnp.where(first_NK, rest_N1, 1 - probability_NK)
  spread_NK = share_N[:, None] * probability_NK * others_NK
  diagonal = (
    product(jnp.square(feature_ND).T, spread_NK) + penalty,
    jnp.maximum(spread_NK.sum(axis=0), 1e-12),
  )
  size = _norm(gradient)
  enough = jnp.minimum(0.5, jnp.sqrt(size / scale)) * size

  def preconditioned(residual):
    return _centred(jax.tree.map(jnp.divide, residual, diagonal), seen_K)

  def going(state):
    _, residual, _, rho, steps = state
    return (_norm(residual) > enough) & (rho > 0) & (steps < GRADIENT_STEPS)

  def step(state):
    found, residual, direction, rho, steps = state
    curved = hessian(direction)
    curvature = _dot(direction, curved)
    # What rounding leaves no curvature for is not followed.
    length = jnp.where(curvature > 0, rho / curvature, 0.0)
    found = _add(found, direction, length)
    residual = _add(residual, curved, -length)
    ahead = preconditioned(residual)
    new_rho = jnp.where(curvature > 0, _dot(residual, ahead), 0.0)
    return found, residual, _add(ahead, direction, new_rho / rho), new_rho, steps + 1

  residual = jax.tree.map(jnp.negative, gradient)
  ahead = preconditioned(residual)
  state = jax.tree.map(jnp.zeros_like, gradient), residual, ahead, _dot(residual, ahead), 0
  return jax.lax.while_loop(going, step, state)[0]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Full precision: TF32 or bfloat16 products would end the descent three digits early."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _dot(a, b):
  """Of two arrays or two trees; sums, because a matrix unit would round the terms."""
  return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _norm(tree):
  return jnp.sqrt(_dot(tree, tree))


def _add(tree, other, factor):
  return jax.tree.map(lambda x, y: x + factor * y, tree, other)
