"""Dense prediction over images larger than a network's window, and what it got right: sliding windows, confusion.

Shape letters: B images, H, W pixels, S side of a window, C channels, K classes.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.errors import UserError
from folk_jax.signal.shard import over_batch


def starts(size: int, window: int, stride: int) -> tuple[int, ...]:
  """Where windows begin along a side, as mmseg lays them: every `stride`, the last one moved back to the end.

  Args:
    size: of the side, at least `window`.
    window: in pixels.
    stride: in [1, window].

  Raises:
    UserError: a window larger than the side, or a stride that would leave gaps.
  """
  if not 1 <= stride <= window <= size:
    raise UserError(
      f'windows of {window} pixels every {stride} do not cover a side of {size}: 1 <= stride <= window <= side'
    )
  count = max(size - window + stride - 1, 0) // stride + 1
  return tuple(min(number * stride, size - window) for number in range(count))


def slide(
  predict: Callable[[jax.Array], jax.Array], image_BHWC: jax.Array, window: int, stride: int
) -> jax.Array:
  """Averages what `predict` says of every window a pixel lies in.

  Args:
    predict: float [B, S, S, C] to float32 scores [B, S, S, K].
    image_BHWC: float.
    window: S.
    stride: pixels from window to window, in [1, S].

  Returns:
    float32 [B, H, W, K].

  Raises:
    UserError: see `starts`.
  """
  chex.assert_rank(image_BHWC, 4)
  batch, height, width, channels = image_BHWC.shape
  places = [
    (top, left) for top in starts(height, window, stride) for left in starts(width, window, stride)
  ]
  covered_HW = np.zeros((height, width), np.float32)
  for top, left in places:
    covered_HW[top : top + window, left : left + window] += 1

  def look(image_BHWC, top, left):
    return predict(
      jax.lax.dynamic_slice(image_BHWC, (0, top, left, 0), (batch, window, window, channels))
    )

  seen = jax.eval_shape(look, image_BHWC, 0, 0)
  chex.assert_shape(seen, (batch, window, window, None))

  def add(total_BHWK, place):
    top, left = place
    here = (0, top, left, 0)
    old = jax.lax.dynamic_slice(total_BHWK, here, seen.shape)
    new = old + look(image_BHWC, top, left)
    return jax.lax.dynamic_update_slice(total_BHWK, new, here), None

  total_BHWK = jnp.zeros((batch, height, width, seen.shape[-1]))
  total_BHWK, _ = jax.lax.scan(add, total_BHWK, jnp.asarray(places))
  return total_BHWK / covered_HW[..., None]


def confusion(
  guess_BHW: jax.Array, truth_BHW: jax.Array, valid_B: jax.Array, classes: int
) -> jax.Array:
  """Counts pixels by (true class, guessed class). A truth outside [0, K), such as an ignore id, doesn't count.

  Args:
    guess_BHW: integers in [0, K).
    truth_BHW: integers.
    valid_B: bool, the images that count.
    classes: K.

  Returns:
    int32 [K, K]: exact up to 2^31 pixels a class pair, where float32 would round from 2^24 on.
  """
  chex.assert_equal_shape((guess_BHW, truth_BHW))

  def count(guess_BHW, truth_BHW, valid_B):
    def of_one(guess_HW, truth_HW, valid):
      truth_HW = truth_HW.astype(jnp.int32)
      counts = valid & (truth_HW >= 0) & (truth_HW < classes)
      pair_HW = jnp.where(counts, truth_HW * classes + guess_HW.astype(jnp.int32), classes**2)
      return jnp.zeros(classes**2 + 1, jnp.int32).at[pair_HW.reshape(-1)].add(1)[:-1]

    return jax.vmap(of_one)(guess_BHW, truth_BHW, valid_B)

  pairs_BK = over_batch(count, guess_BHW, truth_BHW, valid_B)
  return jnp.sum(pairs_BK, axis=0).reshape(classes, classes)


def intersection_over_union(confusion_KK: np.ndarray) -> np.ndarray:
  """IoU a class, float64 [K]: pixels of both over pixels of either; NaN for a class neither there nor guessed.

  Args:
    confusion_KK: counts by (true, guessed).
  """
  confusion_KK = np.asarray(confusion_KK, np.float64)
  both_K = np.diag(confusion_KK)
  either_K = confusion_KK.sum(0) + confusion_KK.sum(1) - both_K
  return np.divide(both_K, either_K, out=np.full_like(both_K, np.nan), where=either_K > 0)


def scores(confusion_KK: np.ndarray) -> dict[str, float]:
  """Sums up a confusion matrix.

  Args:
    confusion_KK: counts by (true, guessed).

  Returns:
    Shares in [0, 1]: `miou`, the mean IoU over the classes that are there or were guessed; `pixel_accuracy`;
    `mean_accuracy`, the mean over the classes that are there of the share of their pixels found; and
    `constant_miou`, `constant_pixel_accuracy`: the best that one class for every pixel gives, which is what a network
    has to beat. All 0 where no pixel counts.
  """
  confusion_KK = np.asarray(confusion_KK, np.float64)
  truth_K = confusion_KK.sum(1)
  total, there_K = truth_K.sum(), truth_K > 0
  names = ('miou', 'pixel_accuracy', 'mean_accuracy', 'constant_miou', 'constant_pixel_accuracy')
  if not total:
    return dict.fromkeys(names, 0.0)
  share = truth_K.max() / total
  found_K = np.diag(confusion_KK)
  values = (
    np.nanmean(intersection_over_union(confusion_KK)),
    found_K.sum() / total,
    np.mean(found_K[there_K] / truth_K[there_K]),
    share / np.count_nonzero(there_K),
    share,
  )
  return dict(zip(names, map(float, values), strict=True))
