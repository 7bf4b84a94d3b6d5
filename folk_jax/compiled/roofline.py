"""The least time a step can take on a chip: whichever of arithmetic, memory and links takes longest (Williams,
Waterman and Patterson, "Roofline", CACM 52(4), 2009).

It is a bound and no prediction: it takes the three to overlap perfectly, every product to run at the published peak,
and leaves out vector arithmetic, transforms and latencies.
"""

import dataclasses

from folk_jax.compiled.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Bounds of one step on one chip.

  Attributes:
    compute: seconds of products at the bfloat16 peak.
    memory: seconds of traffic to and from HBM.
    links: seconds of collectives over ICI.
    mfu: the model's own FLOPs at the peak over `seconds`: what utilisation can reach at best, in [0, 1].
  """

  compute: float
  memory: float
  links: float
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
  chip: Chip, *, matrix_flops: float, hbm_bytes: float, sent_bytes: float, model_flops: float
) -> Roofline:
  """The bounds of a step on `chip`.

  Args:
    chip: published rates.
    matrix_flops: executed by a chip, a float32 product counted as often as the matrix unit passes over it.
    hbm_bytes: read and written by a chip.
    sent_bytes: that a chip must send to others.
    model_flops: a chip's share of what the model has to compute.
  """
  compute = matrix_flops / chip.peak_flops
  memory = hbm_bytes / chip.hbm_bandwidth
  links = sent_bytes / chip.ici_bandwidth
  longest = max(compute, memory, links)
  mfu = model_flops / chip.peak_flops / longest if longest else 0.0
  return Roofline(compute, memory, links, mfu)
