"""What XLA's compiler for NVIDIA GPUs has to know of a GPU that isn't there.

The properties are those that CUDA reports (`cudaDeviceProp`): NVIDIA's "CUDA C++ Programming Guide", section "Compute
capabilities", table of technical specifications, and the white papers of the architectures (Ampere, Hopper, Blackwell,
Ada) for the number of multiprocessors, the second-level cache and the boost clock.
"""

import dataclasses
import importlib.metadata
import importlib.util
import re

from folk_jax.compiled.chips import Chip
from folk_jax.errors import UserError

_KIB, _MIB = 2**10, 2**20
# By major version of CUDA: jax's plugin, the packages that say which libraries it would run with.
_CUDA = {
  '13': ('jax_cuda13_plugin', 'nvidia-cuda-runtime', 'nvidia-cudnn-cu13'),
  '12': ('jax_cuda12_plugin', 'nvidia-cuda-runtime-cu12', 'nvidia-cudnn-cu12'),
}


@dataclasses.dataclass(frozen=True)
class Properties:
  """Of one GPU.

  Attributes:
    kind: what jax calls it.
    capability: compute capability, (major, minor).
    multiprocessors: that are switched on.
    threads: resident on a multiprocessor at most.
    shared: bytes of shared memory of a multiprocessor; a block may have 1 KiB less.
    cache: bytes of the second-level cache.
    lanes: float32 units of a multiprocessor.
    clock: boost, GHz.
  """

  kind: str
  capability: tuple[int, int]
  multiprocessors: int
  threads: int
  shared: int
  cache: int
  lanes: int
  clock: float


PROPERTIES = {
  'a100': Properties('NVIDIA A100-SXM4-80GB', (8, 0), 108, 2048, 164 * _KIB, 40 * _MIB, 64, 1.41),
  'h100': Properties('NVIDIA H100 80GB HBM3', (9, 0), 132, 2048, 228 * _KIB, 50 * _MIB, 128, 1.98),
  'h200': Properties('NVIDIA H200', (9, 0), 132, 2048, 228 * _KIB, 50 * _MIB, 128, 1.98),
  'b200': Properties('NVIDIA B200', (10, 0), 148, 2048, 228 * _KIB, 126 * _MIB, 128, 1.965),
  'rtx4090': Properties(
    'NVIDIA GeForce RTX 4090', (8, 9), 128, 1536, 100 * _KIB, 72 * _MIB, 128, 2.52
  ),
}


def cuda() -> str | None:
  """The major version of CUDA that jax's plugin, if one is installed, is built for."""
  return next((major for major, names in _CUDA.items() if importlib.util.find_spec(names[0])), None)


def packages() -> tuple[str, ...]:
  """The distributions whose versions decide what is compiled."""
  plugin, *libraries = _CUDA[cuda() or '13']
  return (plugin.replace('_', '-'), *libraries)


def target(chip: Chip) -> str:
  """The compiler's description of `chip` (a `GpuTargetConfigProto` as text)."""
  one = PROPERTIES[chip.name]
  major, minor = one.capability
  _, runtime, cudnn = packages()
  return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {one.multiprocessors}
  fpus_per_core: {one.lanes}
  clock_rate_ghz: {one.clock}
  memory_bandwidth: {chip.hbm_bandwidth:.0f}
  device_memory_size: {chip.hbm_bytes:.0f}
  l2_cache_size: {one.cache}
  shared_memory_per_core: {one.shared}
  shared_memory_per_block_optin: {one.shared - _KIB}
  shared_memory_per_block: {48 * _KIB}
  threads_per_core_limit: {one.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
device_description_str: "{one.kind}"
runtime_version {{ {_numbers(runtime)} }}
dnn_version_info {{ {_numbers(cudnn)} }}
"""


def _numbers(package: str) -> str:
  """A distribution's version as the fields of a version in the description."""
  try:
    numbers = re.findall(r'\d+', importlib.metadata.version(package))
  except importlib.metadata.PackageNotFoundError as error:
    raise UserError(
      f"jax's plugin for CUDA is installed and NVIDIA's package {package}, which a topology needs too, is not: "
      "pip install -c constraints.txt -e '.[gpu]'"
    ) from error
  fields = zip(('major', 'minor', 'patch'), numbers, strict=False)
  return ' '.join(f'{name}: {number}' for name, number in fields)
