"""A recipe's real train step, compiled for given devices without data or parameters, and reported on.

This file joins rooms: it makes the run as the training loop does, and hands the program to the rest of this one.
"""

import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from folk_jax import config as config_lib
from folk_jax.compiled import analytic, cost, hlo, topology
from folk_jax.compiled import report as report_lib
from folk_jax.compiled.chips import GIB, Chip
from folk_jax.compiled.settings import changed, has
from folk_jax.compiled.table import say
from folk_jax.errors import UserError
from folk_jax.train import loop, run, sharding

# A model's own work is counted on its plain form: nothing recomputed, no kernel whose inside can't be seen.
_PLAIN = {
  'model.remat': 'none',
  'model.attention': 'xla',
  'model.scan_unroll': 1,
  'spectral_backend': 'fft',
}
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40, '': 1}


@dataclasses.dataclass(frozen=True)
class Target:
  """What a step is compiled for: devices (on paper for a topology), the chip's rates, and a limit on its memory."""

  topology: str
  slices: int
  devices: Sequence[Any]
  chip: Chip | None
  memory_limit: float | None

  @property
  def islands(self) -> int:
    """How many parts a network joins: slices of TPUs, hosts of GPUs."""
    if self.topology and self.chip.platform == 'gpu':
      return topology.parse(self.topology)[1][0]
    return self.slices


class OutOfMemory(Exception):
  """The step does not fit: bytes `needed` (of what the compiler counts) against bytes `granted`."""

  def __init__(self, needed: float, granted: float):
    super().__init__(
      f'{needed / GIB:.2f} GiB needed, {granted / GIB:.2f} GiB granted, '
      f'{(needed - granted) / GIB:.2f} GiB short'
    )
    self.needed, self.granted = needed, granted


class Compiler:
  """Compiles the recipe's step under varied settings, with a line of progress for each."""

  def __init__(self, recipe: str, target: Target, images: int, classes: int):
    self.recipe, self.target = recipe, target
    self.images, self.classes = images, classes

  def compile(self, config: ml_collections.ConfigDict) -> tuple[Any, dict[str, float]]:
    """The compiled step and the seconds it took to trace, lower and compile.

    Raises:
      OutOfMemory: it does not fit.
      UserError: the settings contradict each other.
    """
    devices = self.target.devices
    config_lib.check_layout(config.batch_size, config.accumulate, len(devices), config.mesh.fsdp)
    if (island := len(devices) // self.target.islands) % config.mesh.fsdp:
      raise UserError(
        f'mesh.fsdp is {config.mesh.fsdp} and a slice, or a host of GPUs, has {island} devices: parameters are spread '
        'inside one, so it must divide them'
      )
    say(f'compiling {_settings(config, len(devices))} ...')
    made = run.make_run(config, self.images, self.classes)
    state = _abstract_state(made)
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    with jax.set_mesh(mesh):
      placed = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        sharding.state_shardings(state, mesh),
      )
      batch = abstract_batch(config, sharding.batch_sharding(mesh))
      clock = [time.perf_counter()]
      traced = loop.compile_step(made, state, mesh).trace(placed, batch)
      clock.append(time.perf_counter())
      lowered = traced.lower()
      clock.append(time.perf_counter())
      try:
        compiled = lowered.compile()
      except jax.errors.JaxRuntimeError as error:
        short = shortfall(str(error))
        if short is None:
          raise
        say(f'  does not fit: {OutOfMemory(*short)}')
        raise OutOfMemory(*short) from error
      clock.append(time.perf_counter())
    needed, limit = report_lib.total_memory(compiled.memory_analysis()), self.target.memory_limit
    if limit is not None and needed > limit:
      say(f'  does not fit: {OutOfMemory(needed, limit)}')
      raise OutOfMemory(needed, limit)
    say(f'  fits in {needed / GIB:.2f} GiB a chip ({clock[-1] - clock[0]:.0f} s)')
    names = ('trace', 'lower', 'compile')
    return compiled, {n: b - a for n, a, b in zip(names, clock[:-1], clock[1:], strict=True)}

  def fits(self, config: ml_collections.ConfigDict) -> int | None:
    """Bytes a chip that the step takes, or None where it does not fit."""
    try:
      return report_lib.total_memory(self.compile(config)[0].memory_analysis())
    except OutOfMemory:
      return None

  def report(self, config: ml_collections.ConfigDict) -> tuple[dict[str, Any], str]:
    """The report, ready for JSON, and the compiled program's text. Raises as `compile`."""
    compiled, seconds = self.compile(config)
    text = compiled.as_text()
    step, parameters = self.expected(config)
    devices = self.target.devices
    found = report_lib.report(
      hlo.parse(text), compiled.memory_analysis(), step, len(devices), self.target.chip
    )
    setting = self.setting(config) | {'parameters': parameters}
    if self.target.islands > 1:
      between = 'slices' if self.target.slices > 1 else 'hosts'
      found['notes'].append(
        f"collectives between {between} run over the network, which the bound doesn't know"
      )
    return {'fits': True, 'setting': setting, 'seconds': seconds} | found, text

  def setting(self, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What is compiled, ready for JSON."""
    devices = self.target.devices
    return {
      'recipe': self.recipe,
      'topology': self.target.topology,
      'slices': self.target.slices,
      'device_kind': devices[0].device_kind,
      'devices': len(devices),
      'batch_size': config.batch_size,
      'images_a_chip': config.batch_size / len(devices),
      'accumulate': config.accumulate,
      'fsdp': config.mesh.fsdp,
      'image_size': config.image_size,
      'objective': config.objective.name,
      'model': config.model.to_dict(),
      'dtype': config.model.dtype,
      'remat': config.model.remat if 'remat' in config.model else 'none',
      'versions': _versions(self.target.topology),
    }

  def expected(self, config: ml_collections.ConfigDict) -> tuple[Any, int]:
    """What the step has to compute, from its plain form traced on the whole batch, and the student's parameters."""
    plain = changed(config, {key: value for key, value in _PLAIN.items() if has(config, key)})
    made = run.make_run(plain, self.images, self.classes)
    state = _abstract_state(made)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    products = analytic.products(made.step, state, abstract_batch(plain, None))
    model = sum(
      product.flops
      for product in products
      if cost.scope_of(product.name, report_lib.SCOPES) not in report_lib.SIGNAL
    )
    step = report_lib.Step(
      images=config.batch_size,
      model_flops=model,
      parameter_sizes=frozenset(sizes),
      layers=_scanned(config),
      features=made.objective.parts.backbone.features,
      fsdp=config.mesh.fsdp,
      view_elements=3 * config.image_size**2,
      at_once=config.batch_size // len(self.target.devices) // config.accumulate,
    )
    return step, sum(sizes)


def _scanned(config: ml_collections.ConfigDict) -> frozenset[int]:
  """How many layers scans go over, of the backbone and of a decoder: a layer's share of stacked parameters."""
  depths = ((config.model, 'depth'), (config.objective, 'decoder_depth'))
  return frozenset(part[name] for part, name in depths if name in part)


def _abstract_state(made: run.Run) -> Any:
  # Outside the mesh: a key is an array, and nothing can be put on devices that are on paper.
  return jax.eval_shape(made.new_state, jax.random.key(0), {})


def for_target(config: ml_collections.ConfigDict, target: Target) -> ml_collections.ConfigDict:
  """`config` with what 'auto' stands for on the target, and not on the machine that compiles."""
  return run.for_platform(config, target.chip.platform if target.topology else '')


def abstract_batch(config: ml_collections.ConfigDict, where: Any) -> dict[str, Any]:
  """Shapes and types of a training batch (docs/architecture.md), sharded by `where`."""
  size, side = config.batch_size, config.image_size
  shapes = {
    'views': ((size, len(config.views), side, side, 3), 'uint8'),
    'label': ((size,), 'int32'),
    'index': ((size,), 'int32'),
    'valid': ((size,), 'bool'),
  }
  if 'masks' in config.data:
    shapes['mask'] = ((size, 1, side, side), 'uint8')
  if 'local_views' in config and config.local_views.count:
    local = config.local_views
    shapes['local_views'] = ((size, local.count, local.size, local.size, 3), 'uint8')
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    for name, (shape, dtype) in shapes.items()
  }


def shortfall(message: str) -> tuple[float, float] | None:
  """(bytes needed, bytes granted) from a compiler's out-of-memory error, or None for any other error.

  TPU: '... temporaries (28.29G) exceeds available HBM (15.75G)' or 'Used 18.50G of 15.75G hbm'.
  """
  if 'RESOURCE_EXHAUSTED' not in message and 'ut of memory' not in message:
    return None
  size = r'([\d.]+)([KMGT]?)i?B?'
  for pattern in (rf'\({size}\) exceeds available \w+ \({size}\)', rf'[Uu]sed {size} of {size}'):
    if match := re.search(pattern, message):
      needed, needed_unit, granted, granted_unit = match.groups()
      return float(needed) * _UNITS[needed_unit], float(granted) * _UNITS[granted_unit]
  return None


def _settings(config: ml_collections.ConfigDict, devices: int) -> str:
  words = f'{config.batch_size / devices:g} images a chip'
  if 'remat' in config.model:
    words += f', remat {config.model.remat}'
  if config.accumulate > 1:
    words += f', {config.accumulate} microbatches'
  if config.mesh.fsdp > 1:
    words += f', fsdp {config.mesh.fsdp}'
  return words


def _versions(topology_name: str) -> dict[str, str]:
  found = {}
  for package in ('jax', 'jaxlib', *topology.packages(topology_name)):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
