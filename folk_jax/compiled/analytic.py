"""What a step has to compute at the least: products and convolutions of the traced function, and closed forms.

Nothing is compiled here. Trace the step without rematerialisation and outside a mesh, and the count is the model's own
work on the global batch: what utilisation (MFU) is measured against.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from folk_jax.compiled import cost


@dataclasses.dataclass(frozen=True)
class Product:
  """A product or a convolution of a traced function.

  Attributes:
    flops: floating-point operations of all its executions, two to a multiply-add.
    name: the scopes it was traced in, such as 'transpose(jvp(student))'.
  """

  flops: float
  name: str


def products(function: Any, *args: Any) -> list[Product]:
  """Every product and convolution that `function(*args)` traces to.

  A scan's body counts as often as it runs, a loop without a known length once, and of a conditional the branch with
  the most products (what `jax.lax.platform_dependent` says in several ways is done once). A function under
  `shard_map` counts on all its devices.

  Args:
    function: traceable; a jitted function is traced with its inner one.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  return list(_walk(jax.make_jaxpr(function)(*args).jaxpr, 1, ''))


def _walk(jaxpr: Any, times: int, scope: str) -> Iterator[Product]:
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    path = '/'.join(part for part in (scope, str(equation.source_info.name_stack)) if part)
    if name in _PRODUCTS:
      yield Product(times * _PRODUCTS[name](equation), path)
      continue
    if name == 'cond':
      branches = [list(_walk(_jaxpr_of(b), times, path)) for b in equation.params['branches']]
      yield from max(branches, key=lambda branch: sum(product.flops for product in branch))
      continue
    repeated = times
    if name == 'scan':
      repeated *= equation.params['length']
    elif name == 'shard_map':
      mapped = equation.params.get('newly_manual_axes', equation.params.get('manual_axes'))
      repeated *= math.prod(equation.params['mesh'].shape[axis] for axis in mapped)
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda leaf: _jaxpr_of(leaf) is not None
    ):
      if (body := _jaxpr_of(inner)) is not None:
        yield from _walk(body, repeated, path)


def _jaxpr_of(value: Any) -> Any:
  """The jaxpr that a parameter of an equation is, closed or not; None for anything else."""
  value = getattr(value, 'jaxpr', value)
  return value if hasattr(value, 'eqns') else None


def _dot(equation: Any) -> float:
  left = equation.invars[0].aval.shape
  (contracted, _), _ = equation.params['dimension_numbers']
  result = math.prod(equation.outvars[0].aval.shape)
  return 2.0 * result * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
  """Taps on padding and on holes of a dilation don't count, as in `cost.flops`."""
  image, kernel = (variable.aval.shape for variable in equation.invars)
  result, params = equation.outvars[0].aval.shape, equation.params
  numbers = params['dimension_numbers']
  _, kernel_in, *kernel_axes = numbers.rhs_spec
  _, features, *result_axes = numbers.out_spec
  taps = 1.0
  for axis, (image_axis, kernel_axis, result_axis) in enumerate(
    zip(numbers.lhs_spec[2:], kernel_axes, result_axes, strict=True)
  ):
    window = {
      'stride': params['window_strides'][axis],
      'pad': params['padding'][axis][0],
      'lhs_dilate': params['lhs_dilation'][axis],
      'rhs_dilate': params['rhs_dilation'][axis],
    }
    taps *= cost.valid_taps(image[image_axis], kernel[kernel_axis], result[result_axis], window)
  samples = image[numbers.lhs_spec[0]] // params['batch_group_count']
  return 2.0 * taps * samples * kernel[kernel_in] * result[features]


_PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _convolution}


def vit_forward_flops(
  *,
  image_size: int,
  patch: int,
  width: int,
  depth: int,
  mlp_ratio: float = 4.0,
  channels: int = 3,
  class_only: bool = False,
) -> float:
  """Products of one ViT forward pass on one image, two FLOPs to a multiply-add (arXiv 2010.11929, section 3.1).

  T = (image_size / patch)^2 + 1 tokens of D channels: the embedding of the patches, and a block's four projections
  (4 T D^2), two products of attention (2 T^2 D) and MLP (2 r T D^2), in multiply-adds. A ViT-B/16 at 224 pixels has
  35.1 GFLOP. Where the class token alone is read (`class_only`), the last block has keys and values of all tokens
  (2 T D^2), and all else of one; zeros that its heads multiply are not counted.
  """
  patches = (image_size // patch) ** 2
  tokens, hidden = patches + 1, int(width * mlp_ratio)
  pair, of_a_token = 2 * tokens * width**2, 2 * width**2 + 2 * tokens * width + 2 * width * hidden
  blocks = depth * pair + ((depth - 1) * tokens + (1 if class_only else tokens)) * of_a_token
  return 2.0 * (patches * patch**2 * channels * width + blocks)
