"""Per-image functions on the images that each device already holds.

XLA's partitioner gathers the whole batch around `jnp.fft.*` and `lax.top_k`, even where the batch
axis alone is sharded (openxla/xla#24). Inside `jax.shard_map` it sees one device's images and has
nothing to gather.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from folk_jax.errors import UserError


def over_batch(fn: Callable[..., Any], *args: Any, replicated: tuple[Any, ...] = ()) -> Any:
  """Runs `fn(*args, *replicated)` on every device's own share of the batch.

  The batch is spread over all axes of the mesh that `jax.set_mesh` has set. Without a mesh, on a
  mesh of one device, and inside another `shard_map`, `fn` is called as it stands.

  Args:
    fn: maps arrays with a leading batch axis to arrays with a leading batch axis; image i of its
      outputs may depend on image i of its inputs alone.
    *args: pytrees of arrays, each with the same leading batch axis. Typed PRNG keys are welcome;
      None is an empty tree.
    replicated: pytrees of arrays that every device gets whole.

  Returns:
    What `fn` returns, its leaves with the leading batch axis sharded over the mesh.

  Raises:
    UserError: the batch does not divide by the number of devices.
  """
  axes, devices = _batch_axes()
  if devices == 1:
    return fn(*args, *replicated)
  for leaf in jax.tree.leaves(args):
    if leaf.shape[0] % devices:
      raise UserError(
        f'a batch of {leaf.shape[0]} images does not divide over {devices} devices: '
        f'use a multiple of {devices}'
      )
  batch, whole = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(
    fn,
    in_specs=(batch,) * len(args) + (whole,) * len(replicated),
    out_specs=batch,
    axis_names=set(axes),
  )(*args, *replicated)


def is_even(batch: int) -> bool:
  """Whether the devices over which a batch is spread here can share so many images evenly."""
  return batch % _batch_axes()[1] == 0


def in_place(rows: jax.Array) -> jax.Array:
  """The same array, whose images stay on their devices, and those of its gradient.

  Where parameters are spread over devices too (`fsdp`), XLA may move activations to the weights
  instead of weights to the activations; said before and after a product, this stops it. Without a
  mesh, on one device, inside `over_batch` and where the devices don't divide the leading axis,
  nothing happens.
  """
  axes, devices = _batch_axes()
  if devices == 1 or rows.shape[0] % devices:
    return rows
  return jax.lax.with_sharding_constraint(rows, PartitionSpec(axes))


def gathered(weights: jax.Array) -> jax.Array:
  """The same weights, whole on every device where `fsdp` spreads them: for weights that are cut before they are used.

  XLA would pass pieces between devices, as the parts don't end where the shares do. Without `fsdp` nothing happens.

  Args:
    weights: any shape and dtype, outside `over_batch`.
  """
  if jax.sharding.get_abstract_mesh().shape.get('fsdp', 1) == 1:
    return weights
  return jax.lax.with_sharding_constraint(weights, PartitionSpec())


def _axes(manual: bool) -> tuple[str, ...]:
  """The mesh's axes inside whose devices the code here is (`manual`), or those that are left."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in kinds if (kind == AxisType.Manual) == manual)


def _batch_axes() -> tuple[tuple[str, ...], int]:
  """The axes of the mesh over which a batch is spread here, and how many devices that is."""
  axes, shape = _axes(manual=False), jax.sharding.get_abstract_mesh().shape
  return axes, math.prod(shape[name] for name in axes)


def one_a_device(whole: Any) -> Any:
  """Inside `over_batch`: what every device got whole, seen from here on as each device's own.

  The gradients of the devices are summed where this stands: once, instead of in each turn of a loop
  that comes after it. A kernel's custom derivative needs it too. Without `over_batch` nothing happens.

  Args:
    whole: pytree of `replicated` arrays.

  Returns:
    The same values.
  """
  axes = _axes(manual=True)
  return (
    jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to='varying'), whole) if axes else whole
  )
