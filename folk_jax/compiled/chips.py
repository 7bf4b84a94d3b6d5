"""Published rates of the chips that a step is compiled for.

From Google Cloud's "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" pages (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p,
/v6e), section "System architecture", read in November 2026:

| chip | bfloat16 peak, TFLOP/s | HBM | HBM bandwidth, GB/s | ICI a chip, Gbit/s, one way |
| --- | --- | --- | --- | --- |
| v4 | 275 | 32 GiB | 1228 | 2400 |
| v5e | 197 | 16 GB | 819 | 1600 |
| v5p | 459 | 95 GB | 2765 | 4800 |
| v6e | 918 | 32 GB | 1638 | 3200 |

ICI, the links between the chips of a slice, is the sum over a chip's links in one direction; newer pages give both
directions together, in bytes (v5e 400, v6e 800 GB/s). The v5e page's "all-reduce bandwidth per Pod", 51.2 TB/s for 256
chips, is the same 200 GB/s a chip. The compiler keeps a part of HBM for itself (it grants 15.75 GiB of a v5e's 16), so
whether a step fits is its word and not this table's.

The clock is the peak over what the matrix units do a cycle: 2 x 128 x 128 FLOP in each of 8 units on v4 and v5p (two
cores a chip), 4 on v5e. The units that v6e's page lists would need 3.5 GHz for its peak, so none is given.

NVIDIA's data sheets "A100 80GB", "H100", "H200", "HGX B200" and its white paper on the Ada architecture (RTX 4090):

| chip | bfloat16 peak, TFLOP/s, dense | float32, TFLOP/s | memory, GB | bandwidth, GB/s | links a GPU, GB/s, one way |
| --- | --- | --- | --- | --- | --- |
| a100 (SXM, 80 GB) | 312 | 19.5 | 80 | 2039 | 300 (NVLink 3) |
| h100 (SXM) | 989 | 67 | 80 | 3350 | 450 (NVLink 4) |
| h200 (SXM) | 989 | 67 | 141 | 4800 | 450 (NVLink 4) |
| b200 (HGX) | 2250 | 75 | 180 | 8000 | 900 (NVLink 5) |
| rtx4090 | 165 | 82.6 | 24 | 1008 | 32 (PCI Express 4.0 x16) |

A GPU's peak is at its boost clock, which its power limit does not let it keep in large products. So benchmarks measure
the peak of the same run, and a bound from this table is a looser one. NVIDIA's GB of memory are GiB, as its tools show
them.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip's published rates.

  Attributes:
    name: Google's, such as 'v5e', or NVIDIA's, such as 'h200'.
    peak_flops: bfloat16 products on the matrix unit, FLOP/s, two to a multiply-add.
    hbm_bytes: capacity of the main memory.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second out of the chip, over all its links to chips of its slice, or GPUs of its host.
    clock: cycles a second of a core, for the compiler's own estimates; None where it isn't published and doesn't follow
      from the peak.
    axes: of the slice's mesh or torus, 2 or 3; 0 for GPUs, which are counted.
    smallest: the smallest topology the compiler takes, for messages.
    passes: how many bfloat16 products a float32 product costs at precision 'default', 'high' and 'highest'. A TPU's
      matrix unit makes so many; a GPU has TF32 at half the rate, and true float32 beside its matrix units.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_bandwidth: float
  clock: float | None
  axes: int
  smallest: str
  passes: tuple[float, float, float] = (1, 3, 6)

  @property
  def platform(self) -> str:
    """What jax calls its kind: 'tpu' or 'gpu'."""
    return 'tpu' if self.axes else 'gpu'


def _gpu(name: str, tflops: float, float32: float, gib: float, memory: float, links: float) -> Chip:
  passes = (2.0, 2.0, max(2.0, tflops / float32))
  return Chip(
    name, tflops * 1e12, gib * GIB, memory * 1e9, links * 1e9, None, 0, '1', passes=passes
  )


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 275e12, 32 * GIB, 1228e9, 2400e9 / 8, 1.05e9, 3, '2x2x1'),
    Chip('v5e', 197e12, 16 * GIB, 819e9, 1600e9 / 8, 1.5e9, 2, '2x2'),
    Chip('v5p', 459e12, 95 * GIB, 2765e9, 4800e9 / 8, 1.75e9, 3, '2x2x1'),
    Chip('v6e', 918e12, 32 * GIB, 1638e9, 3200e9 / 8, None, 2, '2x2'),
    _gpu('a100', 312, 19.5, 80, 2039, 300),
    _gpu('h100', 989, 67, 80, 3350, 450),
    _gpu('h200', 989, 67, 141, 4800, 450),
    _gpu('b200', 2250, 75, 180, 8000, 900),
    _gpu('rtx4090', 165, 82.6, 24, 1008, 32),
  )
}

# What jax calls each chip, where a step is compiled for the devices at hand.
_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'NVIDIA A100-SXM4-80GB': 'a100',
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H200': 'h200',
  'NVIDIA B200': 'b200',
  'NVIDIA GeForce RTX 4090': 'rtx4090',
}


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`, or None where this table has none (CPUs, other GPUs)."""
  return CHIPS.get(_KINDS.get(device_kind, ''))
