"""The least time a step can take on a chip: whichever of arithmetic, memory and links takes longest (Williams,
Waterman and Patterson, "Roofline", CACM 52(4), 2009).

It is a bound and no prediction: it takes the three to overlap perfectly, every product to run at the published peak,
and leaves out vector arithmetic, transforms and latencies. `serial` is nearer to what GPUs do: one kernel after the
other, each as long as its own products, its own traffic or what it sends. It is no bound where copies overlap products.
"""

import dataclasses
from collections.abc import Iterable

from folk_jax.compiled.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Bounds of one step on one chip.

  Attributes:
    compute: seconds of products at the bfloat16 peak.
    memory: seconds of traffic to and from HBM.
    links: seconds of collectives over ICI.
    serial: seconds of all kernels, one after the other.
    mfu: the model's own FLOPs at the peak over `seconds`: what utilisation can reach at best, in [0, 1].
  """

  compute: float
  memory: float
  links: float
  serial: float
  mfu: float

  @property
  def seconds(self) -> float:
    """The least time of a step."""
    return max(self.compute, self.memory, self.links)

  @property
  def bound_by(self) -> str:
    """What takes longest: 'compute', 'memory' or 'links'."""
    return max(('compute', 'memory', 'links'), key=lambda name: getattr(self, name))


def roofline(
  chip: Chip, kernels: Iterable[tuple[float, float, float]], *, model_flops: float
) -> Roofline:
  """The bounds of a step on `chip`.

  Args:
    chip: published rates.
    kernels: of each kernel that a chip runs in a step, or of all runs of it together: FLOPs of its products, a float32
      product counted as often as the matrix unit passes over it; bytes read and written; bytes that it must send to
      other chips.
    model_flops: a chip's share of what the model has to compute.
  """
  rates = (chip.peak_flops, chip.hbm_bandwidth, chip.ici_bandwidth)
  times = [tuple(amount / rate for amount, rate in zip(one, rates, strict=True)) for one in kernels]
  compute, memory, links = (sum(one[part] for one in times) for part in range(3))
  serial = sum(max(one) for one in times)
  longest = max(compute, memory, links)
  mfu = model_flops / chip.peak_flops / longest if longest else 0.0
  return Roofline(compute, memory, links, serial, mfu)
