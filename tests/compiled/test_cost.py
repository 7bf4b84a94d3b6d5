"""What programs cost: real ones with FLOPs worked out by hand, and small ones written as compilers write them.

Shape letters: B batch, H, W pixels, C, D channels.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from folk_jax.compiled import cost, hlo


def compiled(function, *shapes):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def executed(module):
  visits, unknown = cost.visits(module)
  assert unknown == []
  return sum(visit.times * cost.flops(visit) for visit in visits)


def entry_visits(text):
  visits, _ = cost.visits(hlo.parse(text))
  return {visit.instruction.name: visit for visit in visits}


def moved(text, name):
  module = hlo.parse(text)
  visit = next(v for v in cost.visits(module)[0] if v.instruction.name == name)
  return cost.moved_bytes(module, visit)


PRODUCT = 2 * 8 * 16 * 16  # [8, 16] @ [16, 16]


def test_a_scan_counts_every_iteration():
  def f(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  assert executed(compiled(f, (8, 16), (5, 16, 16))) == 5 * PRODUCT


def test_loops_in_loops_multiply():
  def f(x, w):
    def inner(_, x):
      return x @ w

    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(jax.lax.fori_loop(0, 4, inner, x)), x)

  assert executed(compiled(f, (8, 16), (16, 16))) == 12 * PRODUCT


@pytest.mark.parametrize(('remat', 'products'), [(False, 3), (True, 4)])
def test_rematerialisation_is_executed_again(remat, products):
  """Forward, gradient to the input, gradient to the weight; and the forward pass once more."""

  def f(x, weights):
    def layer(x, w):
      return jnp.sin(jnp.tanh(x @ w)), None

    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    return jax.lax.scan(body, x, weights)[0].sum()

  module = compiled(jax.grad(f, argnums=(0, 1)), (8, 16), (5, 16, 16))
  assert executed(module) == products * 5 * PRODUCT


def test_products_inside_fusions_count():
  def f(x, w):
    return jnp.tanh(x @ w) + 1

  assert executed(compiled(f, (8, 16), (16, 16))) == PRODUCT


def test_a_convolution_counts_the_taps_that_meet_the_image():
  def f(image_BHWC, kernel_HWCD):
    return jax.lax.conv_general_dilated(
      image_BHWC, kernel_HWCD, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  # 3 taps at 4 of 6 positions along an axis, 2 at the two ends: 16 pairs; an axis of 5: 13.
  taps = 16 * 13
  assert executed(compiled(f, (2, 6, 5, 3), (3, 3, 3, 7))) == 2 * 2 * taps * 3 * 7


def test_grouped_and_strided_convolutions():
  def f(image_BHWC, kernel_HWCD):
    return jax.lax.conv_general_dilated(
      image_BHWC,
      kernel_HWCD,
      (2, 2),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=4,
    )

  # 2 x 2 outputs of 8 channels, each from 3 x 3 taps of the 2 channels of its group.
  assert executed(compiled(f, (3, 5, 5, 8), (3, 3, 2, 8))) == 2 * 3 * 4 * 9 * 2 * 8


# A TPU's compiler writes batched products as convolutions over holes: 12 heads are 12 'pixels' with 11 holes between.
AS_CONVOLUTION = """
ENTRY %main (q: f32[12,197,64], k: f32[12,197,64]) -> f32[12,197,197] {
  %q = f32[12,197,64]{2,1,0} parameter(0)
  %k = f32[12,197,64]{2,1,0} parameter(1)
  ROOT %s = f32[12,197,197]{2,1,0} convolution(%q, %k), \
window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=0bf_0oi->0bf, operand_precision={highest,highest}
}
"""


def test_batched_products_written_as_convolutions_count_once():
  visit = entry_visits(AS_CONVOLUTION)['s']
  assert cost.flops(visit) == 2 * 12 * 197 * 197 * 64


@pytest.mark.parametrize(
  ('old', 'new', 'passes'),
  [
    ('highest,highest', 'highest,highest', 6),
    ('highest,highest', 'high,high', 3),
    ('highest,highest', 'default,default', 1),
    ('f32', 'bf16', 1),
  ],
)
def test_passes_of_the_matrix_unit(old, new, passes):
  assert cost.passes(entry_visits(AS_CONVOLUTION.replace(old, new))['s']) == passes


@pytest.mark.parametrize(
  ('config', 'flops'),
  [
    ({'gemm_backend_config': {'dot_dimension_numbers': {'lhs_contracting_dimensions': ['1']}}}, 60),
    ({'custom_call_config': {'cost_estimate': {'flops': 77, 'bytes_accessed': 5}}}, 77),
    ({}, 0),
  ],
)
def test_library_calls_count_where_they_say_what_they_do(config, flops):
  text = """
ENTRY %main (a: f32[2,3], b: f32[3,5]) -> f32[2,5] {
  %a = f32[2,3]{1,0} parameter(0)
  %b = f32[3,5]{1,0} parameter(1)
  ROOT %c = f32[2,5]{1,0} custom-call(%a, %b), custom_call_target="kernel", backend_config=CONFIG
}
"""
  visit = entry_visits(text.replace('CONFIG', json.dumps(config)))['c']
  assert cost.flops(visit) == flops


TRAFFIC = """
%fused (stack: f32[12,4,8], x: f32[4,8], at: s32[]) -> f32[4,8] {
  %stack = f32[12,4,8]{2,1,0} parameter(0)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,4,8]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,4,8}
  %flat = f32[4,8]{1,0} bitcast(%layer)
  %x = f32[4,8]{1,0} parameter(1)
  ROOT %sum = f32[4,8]{1,0} add(%flat, %x)
}

%update (stack.1: f32[12,4,8], x.1: f32[4,8], at.1: s32[]) -> f32[12,4,8] {
  %stack.1 = f32[12,4,8]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %x.1 = f32[4,8]{1,0} parameter(1)
  %row = f32[1,4,8]{2,1,0} bitcast(%x.1)
  ROOT %set = f32[12,4,8]{2,1,0} dynamic-update-slice(%stack.1, %row, %at.1, %zero.1, %zero.1)
}

ENTRY %main (s: f32[12,4,8], v: f32[4,8], n: s32[]) -> f32[12,4,8] {
  %s = f32[12,4,8]{2,1,0} parameter(0)
  %v = f32[4,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %read = f32[4,8]{1,0} fusion(%s, %v, %n), kind=kLoop, calls=%fused
  %here = f32[4,8]{1,0:S(1)} copy(%read)
  %onchip = f32[4,8]{1,0:S(1)} add(%here, %here)
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0:S(1)}, u32[]) copy-start(%onchip)
  %done = f32[4,8]{1,0} copy-done(%start)
  ROOT %write = f32[12,4,8]{2,1,0} fusion(%s, %done, %n), kind=kLoop, calls=%update
}
"""
LAYER = 4 * 8 * 4  # bytes


@pytest.mark.parametrize(
  ('name', 'bytes_moved'),
  [
    (
      'read',
      2 * LAYER + 4 + LAYER,
    ),  # one layer of twelve, the other operand, the index, the result
    ('here', LAYER),  # from main memory to the chip
    ('onchip', 0),
    ('start', LAYER),  # and back
    ('done', 0),
    ('write', LAYER + 4 + LAYER),  # the update in place: what is not replaced isn't touched
    ('s', 0),
    ('sum', 0),  # inside a fusion
  ],
)
def test_bytes_of_slices_updates_and_on_chip_memory(name, bytes_moved):
  assert moved(TRAFFIC, name) == bytes_moved


def test_a_real_elementwise_program_reads_and_writes_once():
  module = compiled(lambda x: jnp.tanh(x) * 2 + 1, (100, 100))
  visits, _ = cost.visits(module)
  assert sum(v.times * cost.moved_bytes(module, v) for v in visits) == 2 * 100 * 100 * 4


# As the compiler for NVIDIA GPUs writes: gradients end to end in one all-reduce, copies beside kernels, cuDNN's kernel.
OF_A_GPU = """
%joined (a: f32[6,4], b: bf16[5]) -> f32[29] {
  %a = f32[6,4]{1,0} parameter(0)
  %flat = f32[24]{0} bitcast(%a)
  %b = bf16[5]{0} parameter(1)
  %wide = f32[5]{0} convert(%b)
  ROOT %end_to_end = f32[29]{0} concatenate(%flat, %wide), dimensions={0}
}

%stored (all: f32[12,8,4], n: s32[], one: f32[8,4]) -> f32[12,8,4] {
  %all = f32[12,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[8,4]{1,0} parameter(2)
  %row = f32[1,8,4]{2,1,0} bitcast(%one)
  %zero = s32[] constant(0)
  ROOT %in_place = f32[12,8,4]{2,1,0} dynamic-update-slice(%all, %row, %n, %zero, %zero)
}

%reduced (x: f32[16,8]) -> (f32[16,8], (f32[16], s32[16])) {
  %x = f32[16,8]{1,0} parameter(0)
  %twice = f32[16,8]{1,0} add(%x, %x)
  %at = s32[16,8]{1,0} iota(), iota_dimension=1
  %nought = f32[] constant(0)
  %none = s32[] constant(0)
  %both = (f32[16]{0}, s32[16]{0}) reduce(%twice, %at, %nought, %none), dimensions={1}, to_apply=%larger
  ROOT %out = (f32[16,8]{1,0}, (f32[16]{0}, s32[16]{0})) tuple(%twice, %both)
}

ENTRY %main (a: f32[6,4], b: bf16[5]) -> f32[29] {
  %a = f32[6,4]{1,0} parameter(0)
  %b = bf16[5]{0} parameter(1)
  %all = f32[12,8,4]{2,1,0} parameter(2)
  %n = s32[] parameter(3)
  %one = f32[8,4]{1,0} parameter(4)
  %x = f32[16,8]{1,0} parameter(5)
  %q = bf16[2,64,3,4]{3,2,1,0} parameter(6)
  %gradients = f32[29]{0} fusion(%a, %b), kind=kLoop, calls=%joined
  %sum = ((f32[29]{0}), f32[29]{0}) all-reduce-start(%gradients), \
replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, to_apply=%add
  %sent = f32[29]{0} all-reduce-done(%sum)
  %store = ((f32[12,8,4]{2,1,0}, s32[], f32[8,4]{1,0}), f32[12,8,4]{2,1,0}, u32[]) fusion-start(%all, %n, %one), \
kind=kLoop, calls=%stored
  %kept = f32[12,8,4]{2,1,0} fusion-done(%store)
  %pair = (f32[16,8]{1,0}, f32[16]{0}, s32[16]{0}) fusion(%x), kind=kInput, calls=%reduced
  %mixed = (bf16[2,3,64,4]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "3", "64", "64"]}}}
  %pulled = (bf16[2,3,64,4]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "3", "64", "64"]}}}
  ROOT %r = f32[29]{0} negate(%sent)
}
"""


def test_what_a_gpu_stores_beside_its_kernels():
  # The row is read and written in place, and the number of the layer read; waiting for it moves nothing.
  assert moved(OF_A_GPU, 'store') == 2 * 8 * 4 * 4 + 4 and moved(OF_A_GPU, 'kept') == 0
  visits = entry_visits(OF_A_GPU)
  assert visits['in_place'].fused and visits['in_place'].kernel == visits['store'].kernel


def test_a_reduction_of_two_arrays_beside_a_third():
  assert moved(OF_A_GPU, 'pair') == 2 * 16 * 8 * 4 + 16 * 4 + 16 * 4


@pytest.mark.parametrize(
  ('target', 'operands', 'result'),
  [
    ('Forward', ('image', 'kernel'), 'f32[2,6,6,5]'),
    ('BackwardInput', ('output', 'kernel'), 'f32[2,8,8,4]'),
    ('BackwardFilter', ('image', 'output'), 'f32[3,3,4,5]'),
  ],
)
def test_a_convolution_of_cudnns_and_its_gradients_cost_the_same(target, operands, result):
  """3 x 3 over 8 x 8 pixels without padding, 4 channels to 5, two images: labels are the forward convolution's."""
  text = f"""
ENTRY %main (image: f32[2,8,8,4], kernel: f32[3,3,4,5], output: f32[2,6,6,5]) -> {result} {{
  %image = f32[2,8,8,4]{{3,2,1,0}} parameter(0)
  %kernel = f32[3,3,4,5]{{3,2,1,0}} parameter(1)
  %output = f32[2,6,6,5]{{3,2,1,0}} parameter(2)
  %both = ({result}, u8[0]{{0}}) custom-call(%{operands[0]}, %{operands[1]}), window={{size=3x3}}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$conv{target}"
  ROOT %r = {result} get-tuple-element(%both), index=0
}}
"""
  assert cost.flops(entry_visits(text)['both']) == 2 * 2 * 6 * 6 * 3 * 3 * 4 * 5


def test_cudnns_attention_is_two_products_and_five():
  visits = entry_visits(OF_A_GPU)
  product = 2 * 2 * 3 * 64 * 64 * 4  # images, heads, queries, keys, channels
  assert cost.flops(visits['mixed']) == 2 * product
  assert cost.flops(visits['pulled']) == 5 * product


def test_a_fusion_and_what_is_inside_are_one_kernel():
  visits = entry_visits(OF_A_GPU)
  assert visits['gradients'].kernel == visits['wide'].kernel == visits['end_to_end'].kernel
  assert len({visits[name].kernel for name in ('gradients', 'sum', 'store', 'pair', 'mixed')}) == 5


@pytest.mark.parametrize(
  ('op_name', 'scope'),
  [
    ('jit(step)/transpose(jvp(student))/ViT/while/body/dot_general', 'student'),
    ('jit(step)/jvp()/shard_map/filter/jit(fft)/dot', 'filter'),
    ('jit(step)/jvp(student)/reconstruction_loss/mul', 'reconstruction_loss'),
    ('jit(step)/students/mul', ''),
    ('', ''),
  ],
)
def test_the_innermost_scope_counts(op_name, scope):
  assert cost.scope_of(op_name, ('student', 'filter', 'reconstruction_loss')) == scope


def test_what_a_loop_holds_belongs_to_the_loop_where_it_says_nothing_else():
  def f(x):
    with jax.named_scope('filter'):
      return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), x)

  visits, _ = cost.visits(compiled(f, (8,)))
  inside = [v for v in visits if v.times == 3 and v.instruction.opcode not in ('parameter',)]
  assert inside and {cost.scope_of(v.op_name, ('filter',)) for v in inside} == {'filter'}
