"""With parameters spread over devices, each gathers the weights it needs: images and features stay where they are."""

import json

import pytest

CODE = """
  import json
  import jax
  from folk_jax import config as config_lib
  from folk_jax.compiled import step

  c = config_lib.load_recipe('configs/{recipe}.py', 'smoke')
  # Wide enough that the blocks' weights are worth spreading.
  c.model.update(dict(width=192, heads=3, depth=2, remat='block'))
  c.mesh.fsdp, c.batch_size = 4, 64
  for view in c.views.values():
    view.blur_sigma = (0.1, 0.5)  # five taps instead of thirteen to compile
  target = step.Target('', 1, jax.devices(), None, None)
  print(json.dumps(step.Compiler('', target, 256, 10).report(c)[0]['collectives']))
"""


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['vit_b', 'dino'])
def test_fsdp_gathers_parameters_and_leaves_features_where_they_are(recipe, run_with_devices):
  rows = json.loads(run_with_devices(CODE.format(recipe=recipe), timeout=600).splitlines()[-1])
  assert {row['what'] for row in rows} == {'parameters', 'statistics'}
  assert {row['kind'] for row in rows} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
  assert any(row['kind'] == 'all-gather' for row in rows)  # They were spread.
