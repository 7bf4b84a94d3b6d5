"""The TPU slices and NVIDIA GPUs that a program can be compiled for without having one.

`libtpu`, the package that holds the TPU's compiler, and jax's plugin for CUDA describe chips as devices that exist on
paper: shapes can be placed on them and programs compiled, and nothing can run.
"""

import importlib.util
import os
import re
from typing import Any

import jax

from folk_jax.compiled import gpus
from folk_jax.compiled.chips import CHIPS, Chip
from folk_jax.errors import UserError

# Read by jax or by libtpu when they start. The compiling process itself needs no accelerator; the queries skipped are
# those for the TPU machine that this isn't; and several processes may compile at a time, as none of them opens a TPU.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
}
_SIZES = {2: '4x4 (16 chips) or 16x16 (256)', 3: '2x2x4 (16 chips) or 4x4x4 (64)'}


def prepare_environment(name: str) -> None:
  """Sets what the compiler for a topology needs, before jax starts: call it before anything uses a device.

  Raises:
    UserError: the compiler isn't installed, or as `parse`.
  """
  if parse(name)[0].platform == 'gpu':
    if gpus.cuda() is None:
      raise _not_installed('NVIDIA GPUs', "jax's plugin for CUDA", 'gpu')
    os.environ |= {'JAX_PLATFORMS': 'cpu'}
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # What does not fit is said in one line.
  else:
    if importlib.util.find_spec('libtpu') is None:
      raise _not_installed('TPUs', 'the package libtpu', 'tpu')
    os.environ.update(ENVIRONMENT)
  # The environment is read at jax's import, which may have been before.
  jax.config.update('jax_platforms', 'cpu')


def _not_installed(what: str, package: str, extra: str) -> UserError:
  return UserError(
    f'--topology needs the compiler for {what}, {package}, which is not installed: '
    f"pip install -c constraints.txt -e '.[{extra}]' (none of them is needed)"
  )


def packages(name: str) -> tuple[str, ...]:
  """The distributions beside jax whose versions decide what is compiled for a topology; '' is the local devices."""
  if name and parse(name)[0].platform == 'gpu':
    return gpus.packages()
  return ('libtpu',)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
  """The chip and the sizes of a topology such as 'v5e:4x4'; of GPUs, 'h200:8' or 'h200:2x8', hosts and GPUs of each.

  Raises:
    UserError: a chip that isn't known, or sizes of another form than the chip's slices have.
  """
  chip_name, _, sizes = name.partition(':')
  if chip_name not in CHIPS:
    known = ', '.join(f'{chip.name}:{chip.smallest}' for chip in CHIPS.values())
    raise UserError(
      f'unknown topology {name!r}: give a chip and the sides of its slice, such as {known}'
    )
  chip = CHIPS[chip_name]
  if chip.platform == 'gpu':
    if not re.fullmatch(r'([1-9]\d*x)?[1-9]\d*', sizes):
      raise UserError(
        f'topology {name!r}: give the number of GPUs, such as {chip_name}:8, or hosts and GPUs of each, such as '
        f'{chip_name}:2x8'
      )
    return chip, _hosts(sizes)
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', sizes) or sizes.count('x') + 1 != chip.axes:
    raise UserError(
      f'topology {name!r}: a slice of {chip.name} has {chip.axes} sides, such as '
      f'{chip.name}:{_SIZES[chip.axes].replace(" or ", f" or {chip.name}:")}'
    )
  return chip, tuple(int(side) for side in sizes.split('x'))


def _hosts(sizes: str) -> tuple[int, int]:
  hosts, _, each = sizes.rpartition('x')
  return int(hosts or 1), int(each)


def devices(name: str, slices: int = 1) -> list[Any]:
  """The chips of `slices` slices of a topology, as devices that a mesh can be made of; no program can run on them.

  Call `prepare_environment` first.

  Raises:
    UserError: for what `parse` refuses, and for slices that the compiler doesn't know.
  """
  from jax.experimental import topologies

  chip, sides = parse(name)
  if chip.platform == 'gpu':
    return _gpus(name, chip, *sides)
  options: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
  if chip.name == 'v4':
    options['chip_config_name'] = (
      'megacore'  # As on real machines, a chip's two cores are one device.
    )
  if max(sides) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    described = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f'the compiler knows no slice {name}: {str(error).partition(": ")[2] or error}. Its hosts have '
      f'{"2x2x1" if chip.axes == 3 else "2x2"} chips, which the sides must be multiples of; try '
      f'{chip.name}:{_SIZES[chip.axes].replace(" or ", f" or {chip.name}:")}'
    ) from error
  return list(described.devices)


def _gpus(name: str, chip: Chip, hosts: int, each: int) -> list[Any]:
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(
      platform='cuda', target_config=gpus.target(chip), topology=f'1x{hosts}x{each}'
    )
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
      f'jax {jax.__version__} and its plugin for CUDA cannot compile for {name}: {reason}. Install both anew: '
      "pip install -c constraints.txt -e '.[gpu]'"
    ) from error
  return list(described.devices)
