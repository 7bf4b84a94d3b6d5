"""Reading programs: what is written in the text, by hand and as XLA writes it."""

import jax
import jax.numpy as jnp
import pytest

from folk_jax.compiled import hlo
from folk_jax.errors import UserError

# As a TPU's compiler writes it: tiles, memory spaces, operands without shapes, comments in long tuples.
PROGRAM = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,130]{1,0:T(8,128)})->f32[4,130]{1,0:T(8,128)}}

%body (p.1: (s32[], f32[4,130])) -> (s32[], f32[4,130]) {
  %p.1 = (s32[]{:T(128)}, f32[4,130]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x.1 = f32[4,130]{1,0:T(8,128)S(1)} get-tuple-element(%p.1), index=1
  %y = f32[4,130]{1,0:T(8,128)S(1)} multiply(%x.1, %x.1), \
metadata={op_name="jit(f)/while/body/mul (\\"x\\")" source_line=3}
  ROOT %out.1 = (s32[]{:T(128)}, f32[4,130]{1,0:T(8,128)S(1)}) tuple(%next, /*index=1*/%y)
}

%condition (p.2: (s32[], f32[4,130])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[4,130]{1,0:T(8,128)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (x.2: f32[4,130]) -> f32[4,130] {
  %x.2 = f32[4,130]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(2)
  %init = (s32[]{:T(128)}, f32[4,130]{1,0:T(8,128)S(1)}) tuple(%start, %x.2)
  %loop = (s32[]{:T(128)}, f32[4,130]{1,0:T(8,128)S(1)}) while(%init), condition=%condition, body=%body, \
backend_config={"flag":{"a":[]},"s":"}"}
  ROOT %r = f32[4,130]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope='module')
def module():
  return hlo.parse(PROGRAM)


def test_computations_instructions_and_operands(module):
  assert module.entry == 'main' and set(module.computations) == {'main', 'body', 'condition'}
  body = module.computations['body']
  assert body.root == 'out.1' and body.instructions['out.1'].operands == ('next', 'y')
  assert [user.name for user in body.users['x.1']] == ['y']
  loop = module.computations['main'].instructions['loop']
  assert loop.called('condition', 'body') == ('condition', 'body')
  assert loop.backend_config == {'flag': {'a': []}, 's': '}'}
  assert body.instructions['y'].op_name == r'jit(f)/while/body/mul (\"x\")'


def test_shapes_have_tiles_and_memory_spaces(module):
  body = module.computations['body']
  (shape,) = body.instructions['y'].shapes
  assert (shape.dtype, shape.dims, shape.tile, shape.memory) == ('f32', (4, 130), (8, 128), 1)
  assert shape.elements == 520
  # 4 rows take a tile of 8, and 130 columns two tiles of 128.
  assert shape.bytes == 8 * 256 * 4


@pytest.mark.parametrize(
  ('text', 'size'),
  [
    ('f32[]', 4),
    ('bf16[3,5]{1,0}', 30),
    ('pred[7]{0}', 7),
    ('s4[3]{0}', 2),  # twelve bits
    ('c64[2,2]{1,0}', 32),
    ('token[]', 0),
    ('f32[3,4]{0,1:T(8,128)}', 8 * 128 * 4),  # axis 0 is the fastest
    ('bf16[16,128]{1,0:T(8,128)(2,1)S(1)}', 16 * 128 * 2),
    ('(f32[2]{0}, (s32[], u8[3]{0}))', 8 + 4 + 3),
    ('f32[<=10,2]{1,0}', 80),
  ],
)
def test_bytes_of_types(text, size):
  assert sum(shape.bytes for shape in hlo.parse_shapes(text)) == size


def test_a_loop_without_a_stated_count_is_read_from_its_condition(module):
  main = module.computations['main']
  assert hlo.trip_count(module, main, main.instructions['loop']) == 5  # from 2 to 6


@pytest.mark.parametrize(
  ('old', 'new', 'count'),
  [
    ('direction=LT', 'direction=LE', 6),
    ('constant(7)', 'constant(2)', 0),
    ('compare(%j, %limit), direction=LT', 'compare(%limit, %j), direction=GT', 5),
    ('constant(1)', 'constant(3)', None),  # steps of three: not read
    ('%start = s32[]{:T(128)} constant(2)', '%start = s32[]{:T(128)} partition-id()', None),
    ('{"flag":{"a":[]}', '{"known_trip_count":{"n":"12"}', 12),
  ],
)
def test_counts_of_other_loops(old, new, count):
  assert old in PROGRAM
  module = hlo.parse(PROGRAM.replace(old, new))
  main = module.computations['main']
  assert hlo.trip_count(module, main, main.instructions['loop']) == count


def test_names_without_per_cent_signs_and_operands_with_their_shapes():
  text = """
ENTRY main {
  x = f32[2,3]{1,0} parameter(0)
  y = f32[3,2]{1,0} transpose(f32[2,3]{1,0} x), dimensions={1,0}
  ROOT z = f32[2,2]{1,0} dot(x, y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
  text = text.replace('ENTRY main {', 'ENTRY main (x: f32[2,3]) -> f32[2,2] {')
  main = hlo.parse(text).computations['main']
  assert main.instructions['y'].operands == ('x',)
  assert main.instructions['z'].operands == ('x', 'y')
  assert main.instructions['y'].numbers('dimensions') == (1, 0)


def test_what_is_no_program_is_refused():
  with pytest.raises(UserError, match='no ENTRY'):
    hlo.parse('module @jit_f {}')


def test_every_operand_and_every_called_computation_of_a_real_program_is_found():
  def f(x, w):
    def layer(x, w):
      return jax.nn.gelu(x @ w), x.sum()

    return jax.lax.scan(layer, x, w)

  text = jax.jit(f).lower(jnp.ones((8, 16)), jnp.ones((3, 16, 16))).compile().as_text()
  module = hlo.parse(text)
  for computation in module.computations.values():
    assert computation.root in computation.instructions
    for instruction in computation.instructions.values():
      assert set(instruction.operands) <= set(computation.instructions)
      for name in instruction.called('calls', 'to_apply', 'body', 'condition'):
        assert name in module.computations
  # Every line that defines something was read.
  assert sum(len(c.instructions) for c in module.computations.values()) == text.count(' = ')
