"""No recipe's compiled step sends images or features between devices: gradients and statistics only."""

import json

import pytest

# Chosen patches, a decoder, local views, masks; FOLK is in test_dryrun.py and with a ResNet in
# tests/models/test_resnet.py.
RECIPES = ('mae', 'ibot')

CODE = """
  import importlib.util, json, sys
  import jax
  from folk_jax.compiled import hlo, report, step

  spec = importlib.util.spec_from_file_location('every', 'tests/support/every_objective.py')
  every = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(every)
  target = step.Target('', 1, jax.devices(), None, None)
  found = {}
  for name in sys.argv[1:]:
    config = every.make_config(name)
    compiler = step.Compiler(name, target, every.IMAGES, every.CLASSES)
    found[name] = compiler.report(config)[0]
  print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def reports(run_with_devices):
  return json.loads(run_with_devices(CODE, *RECIPES, timeout=900).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_only_gradients_and_statistics_are_exchanged(reports, name):
  rows = reports[name]['collectives']
  assert {row['kind'] for row in rows} == {'all-reduce'}
  assert {row['what'] for row in rows} <= {'parameters', 'statistics'}
  # And all gradients are: a parameter's is summed once, in float32.
  summed = sum(row['bytes'] for row in rows)
  assert summed > 0.9 * 4 * reports[name]['setting']['parameters']


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_executes_what_its_model_needs(reports, name):
  """At 32 pixels what is done to images weighs more than in a real recipe: hence up to a fifth."""
  assert 0.99 < reports[name]['flops']['executed_over_model'] < 1.2
