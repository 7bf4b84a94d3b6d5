"""Few labels: which training images keep theirs, drawn class by class and always the same for one seed.

Shape letters: N samples of a source, M of them that were looked at, K classes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from folk_jax.errors import UserError


class MissingLabel(UserError):
  """An image without a label, or with one outside the classes, where each must have one."""


# Labels read at a time: enough for threads to share, and little more than a draw of few images needs.
_CHUNK = 4096


def draw_labelled(
  labels: Callable[[np.ndarray], np.ndarray],
  name: Callable[[int], str],
  class_names: Sequence[str],
  size: int,
  *,
  images_a_class: int,
  share: float,
  seed: int,
) -> np.ndarray:
  """The samples that keep their labels: the first of each class in one random order of all.

  The order is the seed's alone, so that with one seed a draw holds every smaller one, by number or by share. A number
  of images a class reads labels only until each class has them; a share reads all, since it needs the classes' sizes.

  Args:
    labels: `Source.labels`: int64 [n] numbers of samples to integers [n].
    name: `Source.name`.
    class_names: K of them.
    size: N.
    images_a_class: so many of each class, or 0 for `share`.
    share: in (0, 1], of each class's images, rounded to the nearest number and 1 at least.
    seed: 0 or more.

  Returns:
    int64 [images], rising.

  Raises:
    UserError: no classes, a class with fewer images than asked for or with none, or a sample without a label.
  """
  field = 'images_a_class' if images_a_class else 'label_share'
  classes = len(class_names)
  if not classes:
    raise UserError(
      f'data.{field} is set and the data have no labels: give class folders (path/train/<class>/...) or a labelled '
      'data set, or set it to 0'
    )
  order_N = np.random.default_rng(seed).permutation(size)
  read, count_K = [], np.zeros(classes, np.int64)
  for start in range(0, size, _CHUNK):
    chosen = order_N[start : start + _CHUNK]
    read.append(labels(chosen))
    check_labels(read[-1], classes, lambda row, chosen=chosen: name(int(chosen[row])))
    count_K += np.bincount(read[-1], minlength=classes)
    if images_a_class and count_K.min() >= images_a_class:
      break
  short_K = count_K < max(1, images_a_class)
  if short_K.any():
    first, more = int(np.flatnonzero(short_K)[0]), int(short_K.sum()) - 1
    others = f' ({more} more have too few)' if more else ''
    asked = images_a_class or 'at least 1'
    raise UserError(
      f"fewer labels than shots: data.{field} asks for {asked} of every class, and class '{class_names[first]}' has "
      f'{count_K[first]} of the {size} training images{others}; ask for fewer, or give images of every class'
    )
  if images_a_class:
    wanted_K = np.full(classes, images_a_class)
  else:
    wanted_K = np.maximum(1, np.rint(share * count_K).astype(np.int64))
  label_M = np.concatenate(read)
  return np.sort(order_N[: len(label_M)][_place_in_class(label_M) < wanted_K[label_M]])


def _place_in_class(label_M: np.ndarray) -> np.ndarray:
  """How many samples of the same class come before each, int64 [M]."""
  by_class = np.argsort(label_M, kind='stable')
  sorted_M = label_M[by_class]
  place_M = np.empty(len(label_M), np.int64)
  place_M[by_class] = np.arange(len(label_M)) - np.searchsorted(sorted_M, sorted_M)
  return place_M


def check_labels(label_B: np.ndarray, classes: int, name: Callable[[int], str]) -> None:
  """Refuses labels outside [0, classes).

  Args:
    label_B: integers.
    classes: K.
    name: what a message calls the sample of a row.

  Raises:
    MissingLabel: names the first such sample.
  """
  wrong = np.flatnonzero((label_B < 0) | (label_B >= classes))
  if len(wrong):
    label = int(label_B[wrong[0]])
    found = 'no label' if label == -1 else f'the label {label}'
    raise MissingLabel(
      f"image '{name(int(wrong[0]))}' has {found}, expected one of the {classes} classes (0..{classes - 1}); label it, "
      'leave it out of the data, or choose another split'
    )
