"""The report: purposes of collectives, shares, memory, and every part of its text."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from folk_jax.compiled import hlo, report, settings, table
from folk_jax.compiled.chips import CHIPS, GIB
from folk_jax.compiled.collectives import Collective

STEP = report.Step(
  images=64,
  model_flops=8.0 * 2 * 16 * 16 * 16,
  parameter_sizes=frozenset({12 * 768 * 8, 768}),
  layers=frozenset({12}),
  features=64,
  fsdp=4,
  view_elements=3 * 32 * 32,
  at_once=8,
)
MEMORY = types.SimpleNamespace(
  argument_size_in_bytes=3 * GIB,
  output_size_in_bytes=2 * GIB,
  alias_size_in_bytes=GIB,
  temp_size_in_bytes=4 * GIB,
  generated_code_size_in_bytes=GIB // 2,
)


def collective(*dims, kind='all-reduce'):
  shapes = tuple(hlo.Shape('f32', d) for d in dims)
  return Collective(kind, shapes, 4, 1, 8, 1, '')


@pytest.mark.parametrize(
  ('dims', 'purpose'),
  [
    (((12, 768, 8),), 'parameters'),
    (((768, 8), (768,)), 'parameters'),  # one layer of twelve
    (((768 * 8 // 4,),), 'parameters'),  # one device's share of it
    (((65,), ()), 'statistics'),
    (((65,), (768,)), 'parameters'),
    (((64, 64),), 'statistics'),  # second moments, though a view has only 3072 numbers
    (((64, 32, 32, 3),), 'images'),
    (((768,), (4001,)), 'images'),  # one odd array among gradients
    (
      ((4, 12, 4, 4, 4),),
      'statistics',
    ),  # a view's 3072 numbers, and no axis that could be 8 images
    (((8, 6, 2, 32),), 'images'),
    (((1, 32, 32, 3),), 'images'),  # 32 may be four times 8 images
  ],
)
def test_purposes_of_collectives(dims, purpose):
  assert report.purpose(collective(*dims), STEP) == purpose


def test_a_view_that_is_gathered_is_an_image():
  """Only what is summed can be a sum over images."""
  whole = collective((4, 12, 4, 4, 4), kind='all-gather')
  assert report.purpose(whole, STEP) == 'images'


@pytest.fixture(scope='module')
def module():
  def f(x, w):
    with jax.named_scope('student'):
      x = jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ w), x)
    with jax.named_scope('filter'):
      return jnp.fft.rfft2(x).real

  text = jax.jit(f).lower(jnp.ones((16, 16)), jnp.ones((16, 16))).compile().as_text()
  return hlo.parse(text)


def test_the_report_of_a_program(module):
  found = report.report(module, MEMORY, STEP, 1, CHIPS['v5e'])
  assert found['flops']['executed'] == STEP.model_flops
  assert found['flops']['executed_over_model'] == 1.0
  # 3 in, 2 out of which 1 takes the arguments' place, 4 between, code: 8.5 GiB.
  assert found['memory']['total'] == 8.5 * GIB and found['memory']['capacity'] == 16 * GIB
  share = found['share']
  assert share['flops']['student'] == 1.0 and share['flops']['signal'] == 0.0
  for shares in share.values():
    assert sum(part for name, part in shares.items() if name != 'signal') == pytest.approx(1)
  assert share['bytes']['signal'] == share['bytes']['filter'] > 0.05
  assert found['roofline']['bound_by'] == 'memory'
  assert found['roofline']['images_per_second'] == 64 / found['roofline']['seconds']
  assert found['collectives'] == [] and found['notes'] == [] and found['compiler'] is None


def test_without_published_rates_there_is_no_bound(module):
  found = report.report(module, MEMORY, STEP, 1, None)
  assert found['roofline'] is None and found['memory']['capacity'] is None


CYCLES = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(256)} parameter(0)
  ROOT %y = f32[8]{0:T(256)} negate(%x), metadata={op_name="jit(f)/augment/neg"}, \
backend_config={"window_config":{"estimated_cycles":"3000000"}}
}
"""


def test_the_compilers_own_estimate_in_seconds():
  step = dataclasses.replace(STEP, model_flops=197e12 * 1e-3)
  found = report.report(hlo.parse(CYCLES), MEMORY, step, 1, CHIPS['v5e'])['compiler']
  assert found['seconds'] == pytest.approx(2e-3)  # 3 M cycles at 1.5 GHz
  assert found['mfu'] == pytest.approx(0.5)
  unknown = report.report(hlo.parse(CYCLES), MEMORY, step, 1, CHIPS['v6e'])['compiler']
  assert unknown['seconds'] is None and unknown['cycles'] == 3e6


def test_what_could_not_be_counted_is_said():
  text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %p = (s32[], f32[8]{0}) parameter(0)
}
%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  ROOT %c = pred[] constant(true)
}
ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0}) parameter(0)
  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %w = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body
}
"""
  notes = report.report(hlo.parse(text), MEMORY, STEP, 1, None)['notes']
  assert len(notes) == 2 and '1 loops' in notes[0] and 'tpu_custom_call' in notes[1]


def _setting(**more):
  return {
    'recipe': 'configs/a.py',
    'topology': 'v5e:4x4',
    'slices': 1,
    'device_kind': 'TPU v5 lite',
    'devices': 16,
    'batch_size': 64,
    'images_a_chip': 4.0,
    'accumulate': 1,
    'fsdp': 1,
    'parameters': 86_000_000,
    'dtype': 'bfloat16',
    'remat': 'none',
  } | more


def test_the_text_says_what_the_report_holds(module):
  result = report.report(module, MEMORY, STEP, 1, CHIPS['v5e']) | {
    'setting': _setting(),
    'seconds': {'trace': 1.0, 'lower': 1.0, 'compile': 120.0},
  }
  text = table.render(result)
  for words in ('configs/a.py on v5e:4x4: 16 x TPU v5 lite', '8.50 GiB  53% of 16 GiB'):
    assert words in text
  assert 'no collectives' in text and 'bound by memory traffic' in text and 'filter' in text
  assert "1.00 times the model's own" in text and 'compiled in 120 s' in text
  result['roofline'] = None
  assert 'no bound' in table.render(result)


def test_changed_leaves_the_original_alone():
  from folk_jax import config as config_lib

  config = config_lib.load_recipe('configs/vit_b.py')
  config.model.remat = 'none'
  other = settings.changed(config, {'model.remat': 'block', 'batch_size': 8})
  assert (other.model.remat, other.batch_size) == ('block', 8)
  assert (config.model.remat, config.batch_size) == ('none', 1024)
  assert settings.has(config, 'mesh.fsdp') and not settings.has(config, 'mesh.nothing.more')
  assert settings.field(config, 'model.width') == 768


def test_alternatives_save_memory_and_keep_the_layout_valid():
  from folk_jax import config as config_lib

  config = config_lib.load_recipe('configs/vit_b.py')
  config.model.remat = 'none'
  found = settings.alternatives(config, 16)
  assert found[:2] == [{'model.remat': 'elementwise'}, {'model.remat': 'block'}]
  assert {'model.remat': 'block', 'batch_size': 512} in found
  for change in found:
    other = settings.changed(config, change)
    config_lib.check_layout(other.batch_size, other.accumulate, 16, other.mesh.fsdp)
    assert other != config
  # A mean over the whole batch can't be taken over microbatches.
  config.objective.reduce = 'pooled'
  assert not any('accumulate' in change for change in settings.alternatives(config, 16))
  config.model.remat = 'block'
  assert not any('model.remat' in change for change in settings.alternatives(config, 16))
