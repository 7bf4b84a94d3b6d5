"""What a table of timm's names says, whatever the backbone, and how its entries are read.

A backbone's variables are `{'params': tree, 'batch_stats': tree}`; the second is empty for one
without BatchNorm. timm keeps linear weights as (out, in) and convolutions as (out, in, row,
column); we keep (in, out) and (row, column, in, out).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from folk_jax import errors

# Axes that turn our array into timm's.
SAME = None
LINEAR = (1, 0)
CONVOLUTION = (3, 2, 0, 1)

PARAMS, STATISTICS = 'params', 'batch_stats'
_NAMES_SHOWN = 4


class Entry(NamedTuple):
  """One array of a timm state dict.

  Attributes:
    name: timm's.
    path: keys down our variables.
    layer: position on our leading layer axis, or None where the array has none.
    axes: transposition from ours to timm's, or None.
    counter: whether it is torch's count of batches, which we don't keep: written as 0, never read.
  """

  name: str
  path: tuple[str, ...]
  layer: int | None = None
  axes: tuple[int, ...] | None = SAME
  counter: bool = False

  def to_timm(self, variables: Mapping[str, Any]) -> np.ndarray:
    """timm's array, C-contiguous: float32, or int64 for a counter."""
    if self.counter:
      return np.zeros((), np.int64)
    leaf = at(variables, self.path)
    return transposed(leaf if self.layer is None else leaf[self.layer], self.axes)

  def from_timm(self, array: np.ndarray) -> np.ndarray:
    """Our array, of one layer."""
    return transposed(array, None if self.axes is None else np.argsort(self.axes))

  def shape(self, variables: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of timm's array, from arrays or their shapes alone."""
    if self.counter:
      return ()
    shape = at(variables, self.path).shape[self.layer is not None :]
    return tuple(shape) if self.axes is None else tuple(shape[axis] for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Names:
  """A backbone's timm names.

  Attributes:
    mark: a top-level key of its parameters that no other backbone has.
    classifier: the prefix of timm's classifier, which we leave out.
    fields: of the backbone's module that `timm_model` takes, beside `image_size`.
    shape_fields: those to look at where shapes differ, in words.
    entries: parameters -> an entry for every array of timm's state dict, a block after the other.
    statistics: parameters -> shapes of the tree of statistics; {} for none.
    prepared: (timm arrays by name, grid, grid of the file or None) -> the same, for this grid.
    timm_model: the fields -> `{'model': name, 'args': arguments}`.
    positions: timm's `forward_features` -> [N, h*w, D].
    layouts: what a backbone can be exported to, of 'timm' and 'npz' (big_vision's).
  """

  mark: str
  classifier: str
  fields: tuple[str, ...]
  shape_fields: str
  entries: Callable[[Mapping[str, Any]], Iterator[Entry]]
  statistics: Callable[[Mapping[str, Any]], dict[str, Any]]
  prepared: Callable[..., dict[str, np.ndarray]]
  timm_model: Callable[..., dict[str, Any]]
  positions: Callable[[np.ndarray], np.ndarray]
  layouts: tuple[str, ...]


def at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  """The node at `path`."""
  for key in path:
    tree = tree[key]
  return tree


def transposed(array: Any, axes: Any = SAME) -> np.ndarray:
  """A C-contiguous float32 array with its axes in another order."""
  array = np.asarray(array, np.float32)
  return np.ascontiguousarray(array if axes is None else array.transpose(axes))


def check_fit(
  state: Mapping[str, np.ndarray],
  wanted: Mapping[str, tuple[int, ...]],
  shape_fields: str,
  kind: str = 'timm',
) -> None:
  """Compares a file's arrays with what a model wants.

  Args:
    state: name -> array.
    wanted: name -> shape.
    shape_fields: where to look, in words.
    kind: whose names they are.

  Raises:
    UserError: with every missing, unexpected and misshapen name, four of a kind.
  """
  missing = [name for name in wanted if name not in state]
  unexpected = [name for name in state if name not in wanted]
  misshapen = [
    f'{name} (file {list(state[name].shape)}, model {list(shape)})'
    for name, shape in wanted.items()
    if name in state and state[name].shape != tuple(shape)
  ]
  faults = {
    'missing from the file': missing,
    'unknown to the model': unexpected,
    'of another shape': misshapen,
  }
  if any(faults.values()):
    report = '; '.join(
      f'{len(names)} {fault}: {_some(names)}' for fault, names in faults.items() if names
    )
    raise errors.UserError(
      f'these {kind} weights do not fit the model: {report}; check {shape_fields}'
    )


def _some(names: list[str]) -> str:
  shown = ', '.join(names[:_NAMES_SHOWN])
  return shown if len(names) <= _NAMES_SHOWN else f'{shown} and {len(names) - _NAMES_SHOWN} more'
