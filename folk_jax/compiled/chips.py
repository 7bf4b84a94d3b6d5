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

Peaks of GPUs depend on clocks and power limits; benchmarks measure them in the same run instead, and none stands here.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip's published rates.

  Attributes:
    name: Google's, such as 'v5e'.
    peak_flops: bfloat16 products on the matrix unit, FLOP/s, two to a multiply-add.
    hbm_bytes: capacity of the main memory.
    hbm_bandwidth: bytes a second.
    ici_bandwidth: bytes a second out of the chip, over all its links to chips of its slice.
    clock: cycles a second of a core, for the compiler's own estimates; None where it isn't published and doesn't follow
      from the peak.
    axes: of the slice's mesh or torus, 2 or 3.
    smallest: the smallest topology the compiler takes, for messages.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_bandwidth: float
  clock: float | None
  axes: int
  smallest: str


CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 275e12, 32 * GIB, 1228e9, 2400e9 / 8, 1.05e9, 3, '2x2x1'),
    Chip('v5e', 197e12, 16 * GIB, 819e9, 1600e9 / 8, 1.5e9, 2, '2x2'),
    Chip('v5p', 459e12, 95 * GIB, 2765e9, 4800e9 / 8, 1.75e9, 3, '2x2x1'),
    Chip('v6e', 918e12, 32 * GIB, 1638e9, 3200e9 / 8, None, 2, '2x2'),
  )
}

# What jax calls each chip, where a step is compiled for the devices at hand.
_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
}


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`, or None where this table has none (CPUs, GPUs)."""
  return CHIPS.get(_KINDS.get(device_kind, ''))
