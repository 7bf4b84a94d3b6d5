"""Where a number that is not finite came from: a function run operation by operation, with a note beside every array.

The note of an array that isn't finite is that of the operand that brought it, or a new one where all operands were
finite. So what is found is what reached the result: an infinity that a mask covers is no finding. Loops and calls run
whole at first; only the one that brings something is looked into, iteration by iteration.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_HERE = pathlib.Path(__file__).resolve().parent
# Operations that are a program of their own: by what their parameters call it.
_PROGRAMS = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')


@dataclasses.dataclass(frozen=True)
class Origin:
  """The first operation whose result was not finite though what it was given was.

  Attributes:
    where: names of modules and scopes around it, with the iteration of loops (a block's number, from 0).
    operation: such as 'div', or 'input' where what the function was given isn't finite.
    found: 'nan' or 'inf'.
    shape: of the array, as float32[8,197,384].
    source: file and line, '' where unknown.
  """

  where: str
  operation: str
  found: str
  shape: str
  source: str

  def __str__(self) -> str:
    at = f' ({self.source})' if self.source else ''
    return f'{self.where or "top level"}: {self.operation} gave {self.found} in {self.shape}{at}'


def first_nonfinite(function: Callable[..., Any], *args: Any) -> Origin | None:
  """What made the first result of `function(*args)` that is not finite so; None where all are finite.

  Slow: each operation is dispatched on its own. On one device: what `shard_map` holds is not looked into.

  Args:
    function: jittable.
    *args: pytrees of arrays; dictionaries give the names of inputs.

  Returns:
    The origin, of the first bad result in the order of the results' tree.
  """
  program = jax.make_jaxpr(function)(*args)
  values = []
  for path, leaf in jax.tree.leaves_with_path(args):
    name = '/'.join(jax.tree_util.keystr((entry,), simple=True) for entry in path[1:])
    leaf = jnp.asarray(leaf)
    found = _found(leaf)
    values.append(_Value(leaf, Origin(name, 'input', found, _shape(leaf), '') if found else None))
  results = _run(program.jaxpr, program.consts, values, '')
  return next((value.origin for value in results if value.origin), None)


@dataclasses.dataclass(frozen=True)
class _Value:
  array: Any
  origin: Origin | None = None


def _run(jaxpr: Any, consts: Sequence[Any], values: Sequence[_Value], outside: str) -> list[_Value]:
  """Evaluates a program one operation after another."""
  known: dict[Any, _Value] = {}
  known.update(zip(jaxpr.constvars, map(_Value, consts), strict=True))
  known.update(zip(jaxpr.invars, values, strict=True))
  last_use = _last_uses(jaxpr)

  def read(atom):
    return _Value(atom.val) if isinstance(atom, core.Literal) else known[atom]

  for number, equation in enumerate(jaxpr.eqns):
    operands = [read(atom) for atom in equation.invars]
    scope = '/'.join(filter(None, (outside, str(equation.source_info.name_stack))))
    known.update(zip(equation.outvars, _apply(equation, operands, scope), strict=True))
    for atom in last_use.get(number, ()):
      known.pop(atom, None)
  return [read(atom) for atom in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
  """By number of the operation, the arrays that nothing needs after it."""
  last = {}
  for number, equation in enumerate(jaxpr.eqns):
    for atom in itertools.chain(equation.invars, equation.outvars):
      if not isinstance(atom, core.Literal):
        last[atom] = number
  kept = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
  found: dict[int, list[Any]] = {}
  for atom, number in last.items():
    if atom not in kept:
      found.setdefault(number, []).append(atom)
  return found


def _apply(equation: Any, operands: list[_Value], scope: str) -> list[_Value]:
  """The results of one operation with their notes."""
  arrays = [value.array for value in operands]
  params = equation.primitive.get_bind_params(equation.params)
  results = equation.primitive.bind(*arrays, **params)
  results = list(results) if equation.primitive.multiple_results else [results]
  bad = [_found(result) for result in results]
  if not any(bad):
    return [_Value(result) for result in results]
  brought = next((value.origin for value in operands if value.origin), None)
  if brought is None:
    if inside := _inside(equation, operands, scope):
      return inside
    if not _is_new(operands, bad):
      return [_Value(result) for result in results]
  origins = [
    brought or Origin(scope, equation.primitive.name, found, _shape(result), _source(equation))
    for result, found in zip(results, bad, strict=True)
  ]
  return [
    _Value(result, origin if found else None)
    for result, origin, found in zip(results, origins, bad, strict=True)
  ]


def _is_new(operands: list[_Value], bad: list[str]) -> bool:
  """Whether an operation made it: constants may hold infinities, which masks and maxima begin with."""
  found = {_found(value.array) for value in operands}
  return found <= {''} or ('nan' in bad and 'nan' not in found)


def _inside(equation: Any, operands: list[_Value], scope: str) -> list[_Value] | None:
  """The results by way of what the operation runs; None where it can't be looked into."""
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    return _scan(equation, operands, scope)
  if name == 'cond':
    chosen = params['branches'][int(operands[0].array)]
    return _run(chosen.jaxpr, chosen.consts, operands[1:], scope)
  program = next((params[key] for key in _PROGRAMS if key in params), None)
  if program is None or name in ('while', 'shard_map'):
    return None
  jaxpr, consts = getattr(program, 'jaxpr', program), getattr(program, 'consts', ())
  if len(jaxpr.invars) != len(operands):
    return None
  return _run(jaxpr, consts, operands, scope)


def _scan(equation: Any, operands: list[_Value], scope: str) -> list[_Value]:
  params = equation.params
  body, length = params['jaxpr'], params['length']
  # What has an axis more outside is cut into turns; jax's versions name the numbers in different ways.
  whole = _of_equal_rank(equation.invars, body.jaxpr.invars)
  first = whole - _of_equal_rank(equation.outvars, body.jaxpr.outvars)
  consts, carry, rows = operands[:first], operands[first:whole], operands[whole:]
  order = range(length - 1, -1, -1) if params['reverse'] else range(length)
  outputs: dict[int, list[_Value]] = {}
  for turn in order:
    row = [_Value(value.array[turn]) for value in rows]
    results = _run(body.jaxpr, body.consts, [*consts, *carry, *row], f'{scope}[{turn}]')
    carry, outputs[turn] = results[: len(carry)], results[len(carry) :]
  stacked = []
  for column in zip(*(outputs[turn] for turn in range(length)), strict=True):
    origins = [column[turn].origin for turn in order]
    stacked.append(
      _Value(jnp.stack([value.array for value in column]), next(filter(None, origins), None))
    )
  return [*carry, *stacked]


def _of_equal_rank(outside: list[Any], inside: list[Any]) -> int:
  return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _found(array: Any) -> str:
  """'nan', 'inf' or '' for all finite."""
  dtype = getattr(array, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.inexact) or jnp.all(jnp.isfinite(array)):
    return ''
  return 'nan' if jnp.any(jnp.isnan(array)) else 'inf'


def _shape(array: Any) -> str:
  return f'{array.dtype.name}[{",".join(map(str, array.shape))}]'


def _source(equation: Any) -> str:
  """The innermost line that asked for the operation, of code that is not an installed package's."""
  traceback = equation.source_info.traceback
  for frame in traceback.frames if traceback else ():
    path = pathlib.Path(frame.file_name)
    if 'site-packages' in path.parts or path.parent == _HERE:
      continue
    shown = (
      path.relative_to(_HERE.parents[1]) if path.is_relative_to(_HERE.parents[1]) else path.name
    )
    return f'{shown}:{frame.line_num}'
  return ''
