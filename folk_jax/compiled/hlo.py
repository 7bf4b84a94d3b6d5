"""Reads the text of a compiled program (`jax.stages.Compiled.as_text()`) into computations and instructions.

The text is XLA's HLO after optimisation and partitioning: shapes are one device's own. Nothing is counted here;
`cost.py` does that.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from folk_jax.errors import UserError

_BITS = {
  'pred': 8,
  's2': 2,
  'u2': 2,
  's4': 4,
  'u4': 4,
  'f4e2m1fn': 4,
  's8': 8,
  'u8': 8,
  'f8e4m3fn': 8,
  'f8e5m2': 8,
  's16': 16,
  'u16': 16,
  'f16': 16,
  'bf16': 16,
  's32': 32,
  'u32': 32,
  'f32': 32,
  's64': 64,
  'u64': 64,
  'f64': 64,
  'c64': 64,
  'c128': 128,
  'token': 0,
  'opaque': 0,
}
_SHAPE = re.compile(r'\b([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?')
_INSTRUCTION = re.compile(r'\s*(ROOT )?%?([\w.\-]+) = ')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+)\s*\(.*\) -> .*\{\s*$')
_OPEN, _CLOSE = '([{', ')]}'


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array of a program.

  Attributes:
    dtype: XLA's name, such as 'bf16'.
    dims: sizes.
    layout: axes from the fastest-varying to the slowest; () where the text has none.
    tile: the outermost tile of a tiled layout, such as (8, 128) on a TPU; () untiled.
    memory: the memory space: 0 is the device's main memory (HBM); a TPU's 1 is its on-chip VMEM.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  memory: int = 0

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """What the array takes in memory: a tiled layout rounds its fastest axes up to whole tiles."""
    dims = list(self.dims)
    for size, axis in zip(reversed(self.tile), self.layout, strict=False):
      dims[axis] = -(-dims[axis] // size) * size
    return -(-math.prod(dims) * _BITS.get(self.dtype, 32) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: unique in its computation.
    opcode: such as 'dot'.
    shapes: the arrays of its result; several for a tuple, nested ones flattened.
    operands: names of instructions of the same computation.
    literal: what stands between its parentheses.
    attributes: the text after them, unparsed.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @functools.cached_property
  def op_name(self) -> str:
    """The path of scopes and primitives it came from, such as 'jit(step)/student/dot_general'; '' unknown."""
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return match[1] if match else ''

  @functools.cached_property
  def backend_config(self) -> Mapping[str, Any]:
    """The back-end's own settings; {} where there are none or they aren't JSON."""
    start = self.attributes.find('backend_config={')
    if start < 0:
      return {}
    start += len('backend_config=')
    try:
      return json.loads(self.attributes[start : _matching(self.attributes, start)])
    except json.JSONDecodeError:
      return {}

  def attribute(self, name: str) -> str:
    """The text of `name=...` up to the next comma outside brackets; '' where there is none."""
    match = re.search(rf'(?:^|[ ,]){re.escape(name)}=', self.attributes)
    if match is None:
      return ''
    end = match.end()
    while end < len(self.attributes) and self.attributes[end] not in ', ':
      end = _matching(self.attributes, end) if self.attributes[end] in _OPEN else end + 1
    return self.attributes[match.end() : end]

  def numbers(self, name: str) -> tuple[int, ...]:
    """The integers of an attribute such as `dimensions={0,2}`."""
    return tuple(int(n) for n in re.findall(r'-?\d+', self.attribute(name)))

  def called(self, *names: str) -> tuple[str, ...]:
    """The computations that the attributes `names` hold."""
    found = []
    for name in names:
      found += re.findall(r'%?([\w.\-]+)', self.attribute(name))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions in order; the root's value is its result."""

  name: str
  instructions: Mapping[str, Instruction]
  root: str

  @functools.cached_property
  def parameters(self) -> Mapping[int, Instruction]:
    """Its parameters by number."""
    return {int(i.literal): i for i in self.instructions.values() if i.opcode == 'parameter'}

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """The instructions that take each instruction's value."""
    users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return {name: tuple(found) for name, found in users.items()}

  def operand_shapes(self, instruction: Instruction) -> Iterator[tuple[Shape, ...]]:
    """The result shapes of each of its operands."""
    for operand in instruction.operands:
      yield self.instructions[operand].shapes


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program, as one device runs it."""

  computations: Mapping[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Reads a program.

  Args:
    text: HLO, as `compiled.as_text()` gives it.

  Returns:
    The module; every operand and every computation that is called is in it.

  Raises:
    UserError: the text holds no entry computation.
  """
  computations, entry = {}, None
  name, instructions, root = None, {}, ''
  for line in text.splitlines():
    if name is None:
      match = _COMPUTATION.match(line)
      if match:
        name, instructions, root = match[2], {}, ''
        entry = name if match[1] else entry
    elif line.startswith('}'):
      computations[name] = Computation(name, instructions, root or next(reversed(instructions)))
      name = None
    elif match := _INSTRUCTION.match(line):
      instruction = _instruction(match[2], line[match.end() :])
      instructions[instruction.name] = instruction
      root = instruction.name if match[1] else root
  if entry is None:
    raise UserError('this is no compiled program: it has no ENTRY computation')
  return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  text = re.sub(r'/\*.*?\*/', '', text)  # Comments number the elements of long tuples.
  end = _matching(text, 0) if text.startswith('(') else text.index(' ')
  shapes = parse_shapes(text[:end])
  opening = text.index('(', end)
  opcode, closing = text[end:opening].strip(), _matching(text, opening)
  literal = text[opening + 1 : closing - 1]
  operands = ()
  if opcode not in ('constant', 'parameter'):
    operands = tuple(_operands(literal))
  return Instruction(name, opcode, shapes, operands, literal, text[closing:].lstrip(', '))


def _operands(literal: str) -> Iterator[str]:
  """Names of operands; each may stand after its shape, and may have a per cent sign."""
  if '%' in literal:
    yield from re.findall(r'%([\w.\-]+)', literal)
    return
  depth, start = 0, 0
  for at, char in enumerate([*literal, ',']):
    depth += (char in _OPEN) - (char in _CLOSE)
    if char == ',' and depth == 0:
      if words := literal[start:at].split():
        yield words[-1]
      start = at + 1


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """The arrays of a type such as `(f32[2,3]{1,0:T(8,128)}, s32[])`."""
  shapes = []
  for dtype, dims, layout in _SHAPE.findall(text):
    order, _, rest = layout.strip('{}').partition(':')
    tile = re.search(r'T\(([\d,]+)\)', rest)
    memory = re.search(r'S\((\d+)\)', rest)
    shapes.append(
      Shape(
        dtype,
        tuple(int(n.strip('<= ')) for n in dims.split(',') if n.strip()),
        tuple(int(n) for n in order.split(',') if n),
        tuple(int(n) for n in tile[1].split(',')) if tile else (),
        int(memory[1]) if memory else 0,
      )
    )
  return tuple(shapes)


def _matching(text: str, start: int) -> int:
  """Just after the bracket that closes the one at `start`; brackets inside strings don't count."""
  depth, at, quoted = 0, start, False
  while at < len(text):
    char = text[at]
    if quoted:
      at += char == '\\'
      quoted = char != '"'
    elif char == '"':
      quoted = True
    else:
      depth += (char in _OPEN) - (char in _CLOSE)
      if depth == 0:
        return at + 1
    at += 1
  return len(text)


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int | None:
  """How often a `while` runs its body.

  The compiler's own word where it gives one (`known_trip_count`); else from a condition that compares a counter with a
  constant, where the counter starts at a constant and is raised by one.

  Returns:
    The count, or None where the program doesn't say.
  """
  match = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
  if match:
    return int(match[1])
  condition = module.computations[loop.called('condition')[0]]
  body = module.computations[loop.called('body')[0]]
  compare, compared = _through_fusion(module, condition, condition.instructions[condition.root])
  if compare.opcode != 'compare' or len(compared) != 2:
    return None
  direction = compare.attribute('direction')
  counter, limit = compared if direction in ('LT', 'LE') else reversed(compared)
  if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
    return None
  index = counter.numbers('index')[0]
  first = _element(inside, inside.instructions[loop.operands[0]], index)
  raised, terms = _through_fusion(module, body, _element(body, body.instructions[body.root], index))
  by_one = raised.opcode == 'add' and any(_integer(term) == 1 for term in terms)
  start, stop = _integer(first), _integer(limit)
  if start is None or stop is None or not by_one:
    return None
  return max(0, stop - start + (direction in ('LE', 'GE')))


def _through_fusion(
  module: Module, inside: Computation, instruction: Instruction
) -> tuple[Instruction, list[Instruction]]:
  """The instruction and its operands; of a fusion, its root, whose parameters are what the fusion was given."""
  given = [inside.instructions[name] for name in instruction.operands]
  if instruction.opcode != 'fusion':
    return instruction, given
  fused = module.computations[instruction.called('calls')[0]]
  root = fused.instructions[fused.root]
  operands = [fused.instructions[name] for name in root.operands]
  return root, [given[int(o.literal)] if o.opcode == 'parameter' else o for o in operands]


def _element(inside: Computation, instruction: Instruction, index: int) -> Instruction:
  if instruction.opcode == 'tuple':
    instruction = inside.instructions[instruction.operands[index]]
  while instruction.opcode == 'copy':
    instruction = inside.instructions[instruction.operands[0]]
  return instruction


def _integer(instruction: Instruction) -> int | None:
  if instruction.opcode == 'constant' and re.fullmatch(r'-?\d+', instruction.literal):
    return int(instruction.literal)
  return None
