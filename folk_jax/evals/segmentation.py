"""How well a trained network segments whole images: one confusion matrix, and what follows from it.

Sliding windows and counts are `signal.windows`; the network is an objective's `predict`. Pixels of padding and of the
ignore id never count.

Shape letters: B images, H, W pixels, C channels, K classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.objectives.segment import Segment
from folk_jax.signal import windows


@dataclasses.dataclass(frozen=True)
class Report:
  """What an evaluation found.

  Attributes:
    confusion_KK: int64, pixels by (true class, guessed class).
    images: how many were judged.
  """

  confusion_KK: np.ndarray
  images: int

  @property
  def scores(self) -> dict[str, float]:
    """`signal.windows.scores`: mIoU, accuracies, and what the best constant guess gets."""
    return windows.scores(self.confusion_KK)

  def rows(self, class_names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row a class: `name`, `iou` (NaN where it is neither there nor guessed), `recall`, `share` of the pixels.

    Args:
      class_names: in the order of the ids; () numbers them.

    Raises:
      ValueError: names that aren't as many as classes.
    """
    truth_K = self.confusion_KK.sum(1)
    names = class_names or [f'class {number}' for number in range(len(truth_K))]
    if len(names) != len(truth_K):
      raise ValueError(f'{len(names)} names for {len(truth_K)} classes')
    found_K = np.diag(self.confusion_KK)
    total = max(int(truth_K.sum()), 1)
    iou_K = windows.intersection_over_union(self.confusion_KK)
    return [
      {
        'name': name,
        'iou': float(iou),
        'recall': float(found / truth) if truth else float('nan'),
        'share': float(truth / total),
      }
      for name, iou, found, truth in zip(names, iou_K, found_K, truth_K, strict=True)
    ]


def evaluate(
  objective: Segment,
  params: Any,
  extra: Any,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]] | None = None,
  keep: Callable[[Mapping[str, np.ndarray], np.ndarray], None] | None = None,
) -> Report:
  """Segments every image of `batches` by sliding windows of the training crop's size.

  Args:
    objective: a `segment` objective; its `stride` and `classes` are used.
    params: {backbone, head}.
    extra: the objective's state.
    batches: dicts with `views` uint8 [B, 1, H, W, 3], `mask` uint8 [B, 1, H, W] and `valid` bool [B], all of one size.
    put: moves a batch to the devices; `jnp.asarray` by default.
    keep: called with each batch and the guesses, int32 [B, H, W] on the host (of one host).

  Returns:
    The report.

  Raises:
    ValueError: no valid image.
  """

  @jax.jit
  def judge(params, extra, views, mask, valid_B):
    guess_BHW = objective.predict(params, extra, views[:, 0])
    confusion_KK = windows.confusion(guess_BHW, mask[:, 0], valid_B, objective.classes)
    return guess_BHW, confusion_KK, jnp.sum(valid_B)

  total_KK = np.zeros((objective.classes,) * 2, np.int64)
  images = 0
  for batch in batches:
    arrays = {name: batch[name] for name in ('views', 'mask', 'valid')}
    arrays = put(arrays) if put else jax.tree.map(jnp.asarray, arrays)
    guess_BHW, confusion_KK, count = judge(
      params, extra, arrays['views'], arrays['mask'], arrays['valid']
    )
    total_KK += np.asarray(confusion_KK)
    images += int(count)
    if keep:
      keep(batch, np.asarray(guess_BHW))
  if not images:
    raise ValueError('no valid image among the batches to segment')
  return Report(total_KK, images)
