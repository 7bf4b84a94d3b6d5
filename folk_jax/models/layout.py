"""How activations lie in a device's memory, where XLA's own choice is a slow one."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from folk_jax.signal.shard import is_even


def row_major(x: jax.Array) -> jax.Array:
  """The same array and gradient, which on GPUs lie in memory as their axes are written: the last one innermost.

  Left to itself XLA lays the residual stream as the sums over images want it that its gradient ends in (positions,
  class token), images innermost; every norm and product then begins with a transpose.
  """
  if jax.__version_info__ < (0, 12) and not is_even(1):
    return x  # Compiled for several GPUs, jax 0.10 gathered all images for it.
  as_written = Layout(major_to_minor=tuple(range(x.ndim)))
  return jax.lax.platform_dependent(
    x, cuda=lambda x: with_layout_constraint(x, as_written), default=lambda x: x
  )
