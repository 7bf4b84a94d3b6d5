"""What the devices of a compiled program tell each other: every collective, with its arrays and its groups."""

import dataclasses
import math
import re

from folk_jax.compiled.cost import Visit
from folk_jax.compiled.hlo import Computation, Instruction, Module, Shape

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: such as 'all-reduce'.
    shapes: the arrays, at the size of the larger side: what is reduced, or what was gathered.
    bytes: of them, in one execution.
    times: executions a step.
    group: devices that take part together.
    groups: how many such groups.
    op_name: where it comes from; '' unknown.
  """

  kind: str
  shapes: tuple[Shape, ...]
  bytes: int
  times: int
  group: int
  groups: int
  op_name: str

  @property
  def sent(self) -> float:
    """Bytes that a device must send in a step: of n devices in a ring, a gather or scatter passes on (n - 1) / n of
    the array, an all-reduce is both, and a permutation sends all of it."""
    share = (self.group - 1) / self.group
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.0 if self.group > 1 else 0.0}
    return factor.get(self.kind, share) * self.bytes * self.times


def collective_of(module: Module, visit: Visit, devices: int) -> Collective | None:
  """The collective that this instruction is, or None; of an asynchronous pair, its start."""
  instruction = visit.instruction
  kind = instruction.opcode.removesuffix('-start')
  if kind not in COLLECTIVES:
    return None
  shapes = tuple(
    shape for name in instruction.operands for shape in _parts(module, visit.inside, name)
  )
  if kind == 'all-gather':
    shapes = instruction.shapes
    if instruction.opcode.endswith('-start'):
      shapes = shapes[len(instruction.operands) :]  # (operands, results)
  groups, size = _groups(instruction, devices)
  return Collective(
    kind,
    shapes,
    sum(shape.elements * _itemsize(shape) for shape in shapes),
    visit.times,
    size,
    groups,
    visit.op_name,
  )


def _parts(module: Module, inside: Computation, name: str) -> tuple[Shape, ...]:
  """The arrays that a collective is given; a GPU's compiler lays many end to end and sends them as one."""
  while inside.instructions[name].opcode == 'bitcast':
    name = inside.instructions[name].operands[0]
  instruction = inside.instructions[name]
  if instruction.opcode == 'fusion':
    fused = module.computations[instruction.called('calls')[0]]
    if fused.instructions[fused.root].opcode == 'concatenate':
      inside, instruction = fused, fused.instructions[fused.root]
  if instruction.opcode != 'concatenate':
    return instruction.shapes
  return tuple(s for operand in instruction.operands for s in _parts(module, inside, operand))


def _itemsize(shape: Shape) -> int:
  return dataclasses.replace(shape, dims=(), layout=(), tile=()).bytes


def _groups(instruction: Instruction, devices: int) -> tuple[int, int]:
  """(number of groups, devices in each): of `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['a'=2,'b'=4] {'b'}` or, where all take
  part, `{}`."""
  if instruction.opcode.startswith('collective-permute'):
    return 1, devices
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}', instruction.attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    size = math.prod(sizes.get(name, 1) for name in re.findall(r"'(\w+)'", match[2]))
    return devices // size, size
  text = instruction.attribute('replica_groups')
  if match := re.match(r'\[(\d+),(\d+)\]', text):
    return int(match[1]), int(match[2])
  groups = re.findall(r'\{([\d,]+)\}', text)
  if groups:
    return len(groups), len(groups[0].split(','))
  return 1, devices
