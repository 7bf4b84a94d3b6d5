"""Finds the largest batch that fits, with few compilations."""

from collections.abc import Callable


def largest_that_fits(fits: Callable[[int], bool], start: int, unit: int, limit: int) -> int:
  """The largest multiple of `unit` in [unit, limit] for which `fits` holds, to an eighth.

  Doubles or halves from `start` until one fits and its double does not; then halves the interval until it is less than
  an eighth of the answer (or one unit). Whatever fits must fit when smaller.

  Args:
    fits: compiles, and is called once for each number.
    start: where to begin; rounded down to a multiple of `unit`.
    unit: what the answer is a multiple of, at least 1.
    limit: no larger number is tried.

  Returns:
    The answer, or 0 where not even `unit` fits.
  """
  top = limit // unit
  low, high = 0, top + 1  # In units: low fits (0 does, trivially), high doesn't or isn't allowed.
  trial = min(max(1, start // unit), top)
  while low < trial < high:
    if fits(trial * unit):
      low = trial
    else:
      high = trial
    if low == 0:
      trial = high // 2
    elif high > top:
      trial = min(2 * low, top)
    elif high - low > max(1, low // 8):
      trial = (low + high) // 2
    else:
      break
  return low * unit
