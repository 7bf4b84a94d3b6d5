"""One compiled step as numbers: memory, products, bytes, collectives and the least time, each for one chip."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from folk_jax.compiled import cost, hlo
from folk_jax.compiled.chips import Chip
from folk_jax.compiled.collectives import Collective, collective_of
from folk_jax.compiled.roofline import roofline

# What objectives and the step name their parts with (`jax.named_scope`), in the order of a step.
SCOPES = (
  'augment',
  'filter',
  'student',
  'teacher',
  'reconstruction_loss',
  'distillation',
  'optimizer',
)
# What is done to images beside running networks on them.
SIGNAL = ('augment', 'filter', 'reconstruction_loss')
# Kernels that are called by name: what they compute isn't in the program.
_KERNELS = ('tpu_custom_call', '__cudnn', '__cublas', 'triton', '__onednn')


@dataclasses.dataclass(frozen=True)
class Step:
  """What is known of a step before it is compiled, for all chips together.

  Attributes:
    images: of one step.
    model_flops: that the networks have to compute for them.
    parameter_sizes: elements of every parameter, whole.
    layers: leading axes by which parameters are stacked and may be cut, such as a ViT's depth.
    features: of the backbone; their matrix of second moments is a statistic.
    fsdp: devices over which a parameter is spread.
    view_elements: pixels times channels of one view: an array of as many elements may be an image.
    at_once: images that a device has in its hands, those of one microbatch.
  """

  images: int
  model_flops: float
  parameter_sizes: frozenset[int]
  layers: frozenset[int]
  features: int
  fsdp: int
  view_elements: int
  at_once: int


def report(
  module: hlo.Module, memory: Any, step: Step, devices: int, chip: Chip | None
) -> dict[str, Any]:
  """Everything that the program says of its cost, ready for JSON.

  Args:
    module: the program.
    memory: `compiled.memory_analysis()`.
    step: what it computes.
    devices: that run it together.
    chip: published rates; None leaves the bounds out.

  Returns:
    Keys `memory` (bytes a chip), `flops`, `bytes`, `share` (by scope), `collectives`, `roofline` and `compiler` (None
    where not known), and `notes`, sentences on what could not be counted.
  """
  visits, unknown = cost.visits(module)
  flops = 0.0
  by_scope = {what: dict.fromkeys((*SCOPES, 'other'), 0.0) for what in ('bytes', 'flops', 'cycles')}
  collectives, unseen = [], set()
  # By the kernel's number: FLOPs, bytes moved and bytes sent.
  kernels: dict[int, list[float]] = {}
  of_float32 = chip.passes if chip else (1, 3, 6)
  for visit in visits:
    scope = cost.scope_of(visit.op_name, SCOPES) or 'other'
    kernel = kernels.setdefault(visit.kernel, [0.0, 0.0, 0.0])
    if product := visit.times * cost.flops(visit):
      flops += product
      kernel[0] += product * cost.passes(visit, of_float32)
      by_scope['flops'][scope] += product
    moved = visit.times * cost.moved_bytes(module, visit)
    kernel[1] += moved
    by_scope['bytes'][scope] += moved
    by_scope['cycles'][scope] += visit.times * cost.cycles(visit)
    if (found := collective_of(module, visit, devices)) is not None:
      collectives.append(found)
      kernel[2] += found.sent
    target = visit.instruction.attribute('custom_call_target').strip('"')
    if target.startswith(_KERNELS) and not cost.flops(visit):
      unseen.add(target)
  matrix, moved, sent = (sum(part) for part in zip(*kernels.values(), strict=True))
  cycles = sum(by_scope['cycles'].values())
  model = step.model_flops / devices
  bound = None
  if chip is not None:
    limits = roofline(chip, map(tuple, kernels.values()), model_flops=model)
    bound = dataclasses.asdict(limits) | {
      'seconds': limits.seconds,
      'serial_mfu': model / chip.peak_flops / limits.serial if limits.serial else None,
      'bound_by': limits.bound_by,
      'images_per_second': step.images / limits.seconds if limits.seconds else None,
    }
  return {
    'memory': _memory(memory, chip),
    'flops': {
      'executed': flops,
      'matrix_unit': matrix,
      'model': model,
      'executed_over_model': flops / model if model else None,
    },
    'bytes': {'moved': moved, 'sent': sent},
    'share': {what: _shares(sums) for what, sums in by_scope.items() if sum(sums.values())},
    'collectives': _summed(collectives, step),
    'roofline': bound,
    'compiler': _compiler(cycles, model, chip),
    'notes': _notes(unknown, unseen),
  }


def _memory(memory: Any, chip: Chip | None) -> dict[str, Any]:
  parts = {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'code': memory.generated_code_size_in_bytes,
  }
  return parts | {'total': total_memory(memory), 'capacity': chip.hbm_bytes if chip else None}


def total_memory(memory: Any) -> int:
  """Bytes a device needs for the step: what is donated is the result's place already."""
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _shares(sums: Mapping[str, float]) -> dict[str, float]:
  whole = sum(sums.values())
  return {name: amount / whole for name, amount in sums.items()} | {
    'signal': sum(sums[name] for name in SIGNAL) / whole
  }


def _compiler(cycles: float, model: float, chip: Chip | None) -> dict[str, Any] | None:
  """The TPU compiler's own estimate of the step, where it gives one."""
  if not cycles:
    return None
  seconds = cycles / chip.clock if chip is not None and chip.clock else None
  return {
    'cycles': cycles,
    'seconds': seconds,
    'mfu': model / chip.peak_flops / seconds if seconds else None,
  }


def _summed(collectives: Sequence[Collective], step: Step) -> list[dict[str, Any]]:
  """Collectives of a kind, a purpose and a grouping together, those that send most first."""
  rows: dict[tuple, dict[str, Any]] = {}
  for one in collectives:
    what = purpose(one, step)
    row = rows.setdefault(
      (one.kind, what, one.groups, one.group),
      {
        'kind': one.kind,
        'what': what,
        'groups': one.groups,
        'devices': one.group,
        'times': 0,
        'bytes': 0,
        'sent': 0.0,
        'largest': 0,
        'dtypes': set(),
        'from': set(),
      },
    )
    row['times'] += one.times
    row['bytes'] += one.bytes * one.times
    row['sent'] += one.sent
    row['largest'] = max(row['largest'], *(shape.elements for shape in one.shapes))
    row['dtypes'] |= {shape.dtype for shape in one.shapes}
    row['from'].add(cost.scope_of(one.op_name, SCOPES) or 'other')
  ordered = sorted(rows.values(), key=lambda row: -row['sent'])
  return [row | {name: sorted(row[name]) for name in ('dtypes', 'from')} for row in ordered]


def purpose(collective: Collective, step: Step) -> str:
  """What a collective is about, by the sizes of its arrays.

  Returns:
    'parameters': each has a parameter's size (or of one layer of a stack, or one device's share): gradients, or
    parameters that fsdp gathers; 'statistics': smaller than a view's pixels, second moments of features, or one view's
    size without an axis that could be the images', so a sum over them; 'images': anything else, such as images or
    features that leave their device.
  """
  known = set(step.parameter_sizes)
  known |= {size // n for size in step.parameter_sizes for n in step.layers if size % n == 0}
  known |= {size // step.fsdp for size in known if size % step.fsdp == 0}
  found = 'statistics'
  for shape in collective.shapes:
    if shape.elements in known and shape.elements > 1:
      found = 'parameters'
    elif shape.elements >= step.view_elements and not (
      shape.elements == step.features**2
      or (collective.kind == 'all-reduce' and _summed_view(shape, step))
    ):
      return 'images'
  return found


def _summed_view(shape: hlo.Shape, step: Step) -> bool:
  """Such as the gradient of a reconstruction's bias, before it is summed over positions too."""
  axes = any(size % step.at_once == 0 for size in shape.dims)
  return shape.elements == step.view_elements and not axes


def _notes(unknown: Sequence[str], kernels: set[str]) -> list[str]:
  notes = []
  if unknown:
    notes.append(
      f'{len(unknown)} loops have a length that the program does not say; each was counted once'
    )
  if kernels:
    notes.append(
      f'not counted, as the program does not say: products inside {", ".join(sorted(kernels))}'
    )
  return notes
