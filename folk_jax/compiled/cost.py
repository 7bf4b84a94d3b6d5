"""Counts what a compiled program executes: products, and bytes to and from main memory; loops multiplied out.

XLA's own `cost_analysis()` counts a loop's body once, so a scan over twelve layers reports a twelfth. Here every
instruction is visited with the number of times it runs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from folk_jax.compiled import hlo
from folk_jax.compiled.hlo import Computation, Instruction, Module, Shape

# Results that are names for memory that is there already, or that hold nothing. Of an asynchronous pair the start is
# counted; loops, calls and branches are counted through what they run.
_FREE = frozenset(
  """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier while call
  conditional async-start async-update async-done copy-done slice-done dynamic-slice-done fusion-done add-dependency
  domain all-reduce-done all-gather-done collective-permute-done send-done recv-done get-dimension-size""".split()
)
_FREE_TARGETS = frozenset(
  {'AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape'}
)
_READS_A_PART = frozenset({'dynamic-slice', 'slice', 'gather'})


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction, where it stands, and how often one step runs it.

  `fused`: it runs inside a fusion, where intermediate results don't reach memory. `op_name`: where it comes from; of an
  instruction that the compiler made without saying so, such as a copy, that of the loop around it. `kernel`: the same
  number for what runs as one: a fusion and what is inside it.
  """

  instruction: Instruction
  inside: Computation
  times: int
  fused: bool
  op_name: str
  kernel: int = 0


def visits(module: Module) -> tuple[list[Visit], list[str]]:
  """Every instruction that a step runs, and the names of loops whose count isn't known (taken as 1).

  Of a conditional every branch is visited: an upper bound.
  """
  found, unknown, kernels = [], [], 0

  def walk(name: str, times: int, fused: bool, around: str) -> None:
    nonlocal kernels
    inside = module.computations[name]
    for instruction in inside.instructions.values():
      op_name = instruction.op_name or around
      kernels += not fused
      found.append(Visit(instruction, inside, times, fused, op_name, kernels))
      if instruction.opcode == 'while':
        count = hlo.trip_count(module, inside, instruction)
        if count is None:
          unknown.append(instruction.name)
          count = 1
        walk(instruction.called('body')[0], times * count, fused, op_name)
        walk(instruction.called('condition')[0], times * (count + 1), fused, op_name)
      elif instruction.opcode in ('fusion', 'fusion-start', 'async-start'):
        inner = fused or instruction.opcode != 'async-start'
        walk(instruction.called('calls')[0], times, inner, op_name)
      elif instruction.opcode in ('call', 'conditional'):
        names = ('to_apply', 'branch_computations', 'true_computation', 'false_computation')
        for called in instruction.called(*names):
          walk(called, times, fused, op_name)

  walk(module.entry, 1, False, '')
  return found, unknown


def flops(visit: Visit) -> float:
  """Floating-point operations of one execution of a product or a convolution, two to a multiply-add; else 0.

  Taps of a convolution that fall on padding or on holes of a dilation aren't counted: compilers write plain products
  as such convolutions. Products inside a back-end's own library calls are counted where the call describes them.
  """
  instruction = visit.instruction
  if instruction.opcode == 'dot':
    left, _ = (shapes[0] for shapes in visit.inside.operand_shapes(instruction))
    return _product(left, instruction.numbers('lhs_contracting_dims'), instruction.shapes[0])
  if instruction.opcode == 'convolution':
    image, kernel = (shapes[0] for shapes in visit.inside.operand_shapes(instruction))
    return _convolution(instruction, image, kernel, instruction.shapes[0])
  if instruction.opcode == 'custom-call':
    return _library_call(visit)
  return 0.0


def _product(left: Shape, contracted: tuple[int, ...], result: Shape) -> float:
  return 2.0 * result.elements * math.prod(left.dims[axis] for axis in contracted)


def _library_call(visit: Visit) -> float:
  call = visit.instruction.backend_config
  gemm = call.get('gemm_backend_config', call)
  if 'dot_dimension_numbers' in gemm:
    left = next(visit.inside.operand_shapes(visit.instruction))[0]
    contracted = gemm['dot_dimension_numbers'].get('lhs_contracting_dimensions', ())
    axes = tuple(int(axis) for axis in contracted)
    return _product(left, axes, visit.instruction.shapes[0])
  target = visit.instruction.attribute('custom_call_target')
  if '$conv' in target:
    first, second, *_ = (shapes[0] for shapes in visit.inside.operand_shapes(visit.instruction))
    result = visit.instruction.shapes[0]
    # Labels and window are those of the forward convolution, whichever of its arrays is asked for.
    image, kernel, output = (
      (result, second, first)
      if 'BackwardInput' in target
      else (first, result, second)
      if 'BackwardFilter' in target
      else (first, second, result)
    )
    return _convolution(visit.instruction, image, kernel, output)
  if 'cudnn_fmha_backend_config' in call:
    return _fused_attention(visit)
  # A kernel written by hand (Pallas) may state what it costs.
  estimate = call.get('custom_call_config', call).get('cost_estimate', {})
  return float(estimate.get('flops', 0))


def _fused_attention(visit: Visit) -> float:
  """cuDNN's attention: two products forward, five backward, where the scores are computed anew."""
  call = visit.instruction.backend_config['cudnn_fmha_backend_config']
  query = next(visit.inside.operand_shapes(visit.instruction))[0]
  keys = int(call['intermediate_tensor_shape']['dimensions'][-1])
  backward = 'Backward' in visit.instruction.attribute('custom_call_target')
  return (5 if backward else 2) * 2.0 * query.elements * keys


def _convolution(instruction: Instruction, image: Shape, kernel: Shape, result: Shape) -> float:
  labels = re.match(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels'))
  if labels is None:
    return 0.0
  inputs, kernels, outputs = labels[1], labels[2], labels[3]
  taps = 1.0
  for axis in (c for c in outputs if c.isdigit()):
    taps *= valid_taps(
      image.dims[inputs.index(axis)],
      kernel.dims[kernels.index(axis)],
      result.dims[outputs.index(axis)],
      _window(instruction.attribute('window'), int(axis)),
    )
  batch_groups = (*instruction.numbers('batch_group_count'), 1)[0]
  batch = image.dims[inputs.index('b')] // batch_groups
  # The kernel's input features are those of one group already.
  return 2.0 * taps * batch * kernel.dims[kernels.index('i')] * result.dims[outputs.index('f')]


def _window(text: str, axis: int) -> dict[str, int]:
  """Stride, padding in front and dilations of one spatial axis of `{size=3x3 stride=2x2 pad=1_1x1_1}`."""
  found = {'stride': 1, 'pad': 0, 'lhs_dilate': 1, 'rhs_dilate': 1}
  for name, values in re.findall(r'(\w+)=([\d_x\-]+)', text):
    if name in found:
      found[name] = int(re.match(r'-?\d+', values.split('x')[axis])[0])
  return found


def valid_taps(image: int, kernel: int, result: int, window: Mapping[str, int]) -> int:
  """Pairs of a result's position and a kernel's position, along one axis, that meet an element of the image.

  Args:
    image, kernel, result: sizes along the axis.
    window: `stride`, `pad` (in front), `lhs_dilate` and `rhs_dilate`.
  """
  starts = np.arange(result, dtype=np.int64)[:, None] * window['stride'] - window['pad']
  at = starts + np.arange(kernel, dtype=np.int64) * window['rhs_dilate']
  inside = (at >= 0) & (at <= (image - 1) * window['lhs_dilate'])
  return int(np.count_nonzero(inside & (at % window['lhs_dilate'] == 0)))


def passes(visit: Visit, of_float32: tuple[float, float, float] = (1, 3, 6)) -> float:
  """How many bfloat16 products the chip's matrix unit makes of this one, or has time for meanwhile.

  Args:
    visit: a product.
    of_float32: of a product of float32, at precision 'default', 'high' and 'highest' (`Chip.passes`).
  """
  precision = visit.instruction.attribute('operand_precision')
  dtypes = {shapes[0].dtype for shapes in visit.inside.operand_shapes(visit.instruction)}
  if dtypes != {'f32'}:
    return 1
  default, high, highest = of_float32
  return highest if 'highest' in precision else high if 'high' in precision else default


def moved_bytes(module: Module, visit: Visit) -> float:
  """Bytes that one execution reads from and writes to main memory.

  A fusion reads its operands and writes its result once, whatever it does inside; where it only takes a slice of an
  operand, or updates one in place, the slice is counted. Arrays in on-chip memory are free: the copies that bring
  them there are instructions of their own. Tiled layouts count with their padding.
  """
  instruction, inside = visit.instruction, visit.inside
  if visit.fused or instruction.opcode in _FREE:
    return 0.0
  if instruction.attribute('custom_call_target').strip('"') in _FREE_TARGETS:
    return 0.0
  if instruction.opcode in ('copy-start', 'slice-start', 'dynamic-slice-start'):
    # The result is a tuple that repeats the operand: (to, from, context), or (from, to, ...) for slices.
    operand = next(inside.operand_shapes(instruction))[0]
    to = instruction.shapes[0 if instruction.opcode == 'copy-start' else 1]
    return to.bytes * ((operand.memory == 0) + (to.memory == 0))
  if instruction.opcode in ('fusion', 'fusion-start'):
    fused = module.computations[instruction.called('calls')[0]]
    results = instruction.shapes
    if instruction.opcode == 'fusion-start':  # ((operands), results, context)
      operands = sum(len(shapes) for shapes in inside.operand_shapes(instruction))
      results = results[operands : operands + len(fused.instructions[fused.root].shapes)]
    read = sum(
      _read_of_parameter(module, fused, fused.parameters[i].name)
      for i, shapes in enumerate(inside.operand_shapes(instruction))
      if any(shape.memory == 0 for shape in shapes)
    )
    return read + _written(module, fused, fused.root, results)
  if instruction.opcode in _READS_A_PART:
    source = next(inside.operand_shapes(instruction))[0]
    return _in_memory(instruction.shapes) + instruction.bytes * (source.memory == 0)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _in_memory(inside.instructions[instruction.operands[1]].shapes)
  read = sum(_in_memory(shapes) for shapes in inside.operand_shapes(instruction))
  if instruction.opcode.endswith('-start'):
    return 2 * read  # Its result repeats the operands.
  return read + _in_memory(instruction.shapes)


def cycles(visit: Visit) -> float:
  """The TPU compiler's own estimate of one execution, in clock cycles of the core; 0 where it gives none."""
  if visit.fused:
    return 0.0
  window = visit.instruction.backend_config.get('window_config', {})
  return float(window.get('estimated_cycles', 0))


def _in_memory(shapes: tuple[Shape, ...]) -> int:
  return sum(shape.bytes for shape in shapes if shape.memory == 0)


def _read_of_parameter(module: Module, fused: Computation, name: str) -> int:
  """Bytes that a fusion reads of one operand."""
  whole = fused.instructions[name].bytes
  read = 0
  for user in fused.users[name]:
    if user.opcode == 'bitcast':
      read += _read_of_parameter(module, fused, user.name)
    elif user.opcode in _READS_A_PART and user.operands[0] == name:
      read += user.bytes
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      pass  # Updated in place: the rest of it isn't touched.
    elif user.opcode == 'fusion':
      inner = module.computations[user.called('calls')[0]]
      read += sum(
        _read_of_parameter(module, inner, inner.parameters[i].name)
        for i, operand in enumerate(user.operands)
        if operand == name
      )
    else:
      return whole
  return min(read, whole)


def _written(module: Module, fused: Computation, name: str, shapes: tuple[Shape, ...]) -> int:
  """Bytes that a fusion writes; `shapes` are its results', which say where they lie."""
  root = fused.instructions[name]
  if root.opcode == 'tuple':
    written, rest = 0, shapes
    # One of them may be a tuple itself: a reduction of several arrays.
    for operand in root.operands:
      many = len(fused.instructions[operand].shapes)
      written, rest = written + _written(module, fused, operand, rest[:many]), rest[many:]
    return written
  if root.opcode == 'bitcast':
    return _written(module, fused, root.operands[0], shapes)
  if root.opcode == 'fusion':
    inner = module.computations[root.called('calls')[0]]
    return _written(module, inner, inner.root, shapes)
  if root.opcode == 'dynamic-update-slice' and shapes[0].memory == 0:
    # What it replaces needn't be read where the update is computed here.
    return fused.instructions[root.operands[1]].bytes
  return _in_memory(shapes)


def scope_of(op_name: str, scopes: tuple[str, ...]) -> str:
  """The innermost of `scopes` on the path of an instruction, '' where it is in none.

  Transformations wrap a scope's name, as in 'jit(step)/transpose(jvp(student))/dot_general'.
  """
  for part in reversed(op_name.split('/')):
    for word in reversed(re.findall(r'\w+', part)):
      if word in scopes:
        return word
  return ''
