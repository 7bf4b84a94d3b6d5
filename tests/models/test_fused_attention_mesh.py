"""The kernel on several devices: parameters are initialised, and the whole train step lowers for TPUs."""

import pytest

CODE = """
  import jax
  from folk_jax import config as config_lib
  from folk_jax.compiled import step as compiled
  from folk_jax.models.fused_attention import fused_attention
  from folk_jax.train import loop, run, sharding

  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.model.update({'width': 128, 'heads': 2, 'attention': 'pallas'})
  for view in config.views.values():
    view.blur_sigma = (0.1, 0.5)
  made = run.make_run(config, 256)
  mesh = sharding.make_mesh(1)
  with jax.set_mesh(mesh):
    # One image initialises, which four devices can't share.
    state = jax.eval_shape(made.new_state, jax.random.key(0), {})
    jax.jit(made.new_state).lower(jax.random.key(0), {}).compile()
    batch = compiled.abstract_batch(config, sharding.batch_sharding(mesh))
    text = (
      loop.compile_step(made, state, mesh).trace(state, batch).lower(lowering_platforms=('tpu',))
    ).as_text()
    # Student forwards, teacher forwards, student backwards.
    print(text.count('stablehlo.custom_call @tpu_custom_call'))
    # The check of the kernel, inside an evaluation's mesh: on one device.
    with jax.set_mesh(sharding.make_mesh(1, jax.local_devices()[:1])):
      shapes = [jax.ShapeDtypeStruct(shape, 'float32') for shape in ((2, 5, 384), (384,))]
      lowered = jax.jit(lambda *args: fused_attention(*args, 2)).trace(*shapes)
      print('tpu_custom_call' in lowered.lower(lowering_platforms=('tpu',)).as_text())
"""


DECODER = """
  import jax
  from folk_jax import config as config_lib
  from folk_jax.compiled import step as compiled
  from folk_jax.train import loop, run, sharding

  for recipe in ('mae', 'wavelet_mim'):
    config = config_lib.load_recipe(f'configs/{recipe}.py', 'smoke')
    config.model.update({'width': 128, 'heads': 2, 'attention': 'pallas'})
    made = run.make_run(config, 256)
    mesh = sharding.make_mesh(1)
    with jax.set_mesh(mesh):
      state = jax.eval_shape(made.new_state, jax.random.key(0), {})
      batch = compiled.abstract_batch(config, sharding.batch_sharding(mesh))
      traced = loop.compile_step(made, state, mesh).trace(state, batch)
      print('tpu_custom_call' in traced.lower(lowering_platforms=('tpu',)).as_text())
"""


@pytest.mark.slow
def test_decoders_of_narrow_heads_do_without_the_kernel(run_with_devices):
  assert run_with_devices(DECODER, timeout=600).splitlines()[-2:] == ['True', 'True']


@pytest.mark.slow
def test_a_run_on_several_devices_initialises_and_lowers(run_with_devices):
  count, checked = run_with_devices(CODE, timeout=600).splitlines()[-2:]
  assert int(count) >= 3
  assert checked == 'True'
