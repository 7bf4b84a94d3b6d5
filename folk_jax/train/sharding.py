"""The device mesh and what lies where. Nothing else in the package builds a mesh.

Two axes: `data` (each replica its own images) and `fsdp` (its own images too, and parameters sharded over it). Images
are sharded over both, so that every device has its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from folk_jax.errors import UserError

AXES = ('data', 'fsdp')
_TYPES = (AxisType.Auto, AxisType.Auto)
# Below this many elements a parameter is cheaper to replicate than to gather: biases, norms, position embeddings of
# small models. 64 Ki floats are 256 KiB a device.
_SHARD_FROM = 2**16


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh, [devices / fsdp, fsdp], axes `data` and `fsdp`, over all devices of all hosts or over `devices`.

  Devices that parameters are sharded over gather them twice a step, so they lie within a slice: a TPU slice, whose
  chips have links of their own, or what jax calls one on GPUs, a host. Between slices go gradients alone.

  Raises:
    UserError: `fsdp` does not divide a slice, or slices differ in size.
  """
  slices: dict[int, list[jax.Device]] = {}
  for device in jax.devices() if devices is None else devices:
    slices.setdefault(getattr(device, 'slice_index', None) or 0, []).append(device)
  sizes = {len(members) for members in slices.values()}
  if len(sizes) > 1:
    raise UserError(f'slices of {sorted(sizes)} devices: a mesh takes slices of one size.')
  (size,) = sizes
  if fsdp < 1 or size % fsdp:
    divisors = ', '.join(str(n) for n in range(1, size + 1) if size % n == 0)
    raise UserError(
      f'config.mesh.fsdp {fsdp} does not divide the {size} devices of a slice: use one of {divisors}.'
    )
  # jax orders a slice's devices after its links, and refuses several slices at once.
  blocks = [
    jax.make_mesh((size // fsdp, fsdp), AXES, axis_types=_TYPES, devices=slices[index]).devices
    for index in sorted(slices)
  ]
  return Mesh(np.concatenate(blocks), AXES, axis_types=_TYPES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over every device."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Shardings for a (possibly abstract) state: large leaves over `fsdp` along their largest axis that divides."""
  fsdp = mesh.shape['fsdp']

  def shard(leaf):
    if fsdp == 1 or leaf.size < _SHARD_FROM:
      return replicated(mesh)
    axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % fsdp == 0]
    if not axes:
      return replicated(mesh)
    largest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, 'fsdp'))

  return jax.tree.map(shard, state)


def put(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """This host's rows of a global array, to the devices."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows of a global batch, to the devices; the sample's number goes as int32."""
  return {
    name: put(rows.astype(np.int32) if rows.dtype == np.int64 else rows, mesh)
    for name, rows in batch.items()
  }
