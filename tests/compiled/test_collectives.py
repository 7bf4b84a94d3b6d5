"""Collectives by hand-worked programs and a real one: arrays, groups, and what a device must send."""

import json

import pytest

from folk_jax.compiled import cost, hlo
from folk_jax.compiled.collectives import collective_of


def entry_visits(text):
  visits, _ = cost.visits(hlo.parse(text))
  return {visit.instruction.name: visit for visit in visits}


COLLECTIVES = """
ENTRY %main (x: bf16[8,4], y: f32[16]) -> f32[16] {
  %x = bf16[8,4]{1,0:T(8,128)} parameter(0)
  %y = f32[16]{0} parameter(1)
  %both = (bf16[8,4]{1,0:T(8,128)}, f32[16]{0}) all-reduce(%x, %y), \
replica_groups={}, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(student))/psum"}
  %rows = bf16[32,4]{1,0:T(8,128)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %start = (f32[16]{0}, f32[64]{0}) all-gather-start(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %part = f32[2]{0} reduce-scatter(%y), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  %moved = f32[16]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %r = f32[16]{0} negate(%y)
}
"""


@pytest.mark.parametrize(
  ('name', 'kind', 'size', 'groups', 'group', 'sent'),
  [
    ('both', 'all-reduce', 64 + 64, 1, 8, 2 * 7 / 8 * 128),  # without the tiles' padding
    ('rows', 'all-gather', 256, 2, 4, 3 / 4 * 256),
    ('start', 'all-gather', 256, 2, 4, 3 / 4 * 256),
    ('part', 'reduce-scatter', 64, 1, 8, 7 / 8 * 64),
    ('moved', 'collective-permute', 64, 1, 8, 64),
  ],
)
def test_collectives(name, kind, size, groups, group, sent):
  found = collective_of(hlo.parse(COLLECTIVES), entry_visits(COLLECTIVES)[name], devices=8)
  assert (found.kind, found.bytes, found.groups, found.group) == (kind, size, groups, group)
  assert found.sent == pytest.approx(sent)


def test_other_instructions_are_no_collectives():
  module, visits = hlo.parse(COLLECTIVES), entry_visits(COLLECTIVES)
  assert all(collective_of(module, visits[name], 8) is None for name in ('done', 'r'))


# As the compiler for NVIDIA GPUs writes: gradients end to end in one all-reduce.
OF_A_GPU = """
%joined (a: f32[6,4], b: bf16[5]) -> f32[29] {
  %a = f32[6,4]{1,0} parameter(0)
  %flat = f32[24]{0} bitcast(%a)
  %b = bf16[5]{0} parameter(1)
  %wide = f32[5]{0} convert(%b)
  ROOT %end_to_end = f32[29]{0} concatenate(%flat, %wide), dimensions={0}
}

ENTRY %main (a: f32[6,4], b: bf16[5]) -> f32[29] {
  %a = f32[6,4]{1,0} parameter(0)
  %b = bf16[5]{0} parameter(1)
  %gradients = f32[29]{0} fusion(%a, %b), kind=kLoop, calls=%joined
  %sum = ((f32[29]{0}), f32[29]{0}) all-reduce-start(%gradients), \
replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, to_apply=%add
  ROOT %sent = f32[29]{0} all-reduce-done(%sum)
}
"""


def test_what_a_gpu_sends_end_to_end_is_told_apart():
  found = collective_of(hlo.parse(OF_A_GPU), entry_visits(OF_A_GPU)['sum'], 8)
  assert [shape.dims for shape in found.shapes] == [(6, 4), (5,)]
  assert (found.kind, found.bytes, found.groups, found.group) == ('all-reduce', 29 * 4, 4, 2)


def test_real_collectives_on_eight_devices(run_with_devices):
  """A gradient is summed over the devices that hold the batch; inside a scan, once an iteration."""
  code = """
    import json, jax, jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from folk_jax.compiled import cost, hlo
    from folk_jax.compiled.collectives import collective_of
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    def loss(w, x):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    step = jax.jit(jax.grad(loss), in_shardings=(at(), at('data')), out_shardings=at())
    shapes = (jnp.zeros((3, 16, 16)), jnp.zeros((32, 16)))
    module = hlo.parse(step.lower(*shapes).compile().as_text())
    visits, unknown = cost.visits(module)
    found = [c for v in visits if (c := collective_of(module, v, 8)) is not None]
    print(json.dumps([[c.kind, c.times * c.bytes, c.group, c.groups] for c in found]))
  """
  found = json.loads(run_with_devices(code).splitlines()[-1])
  assert {(kind, group, groups) for kind, _, group, groups in found} == {('all-reduce', 8, 1)}
  assert sum(size for _, size, _, _ in found) == 3 * 16 * 16 * 4
