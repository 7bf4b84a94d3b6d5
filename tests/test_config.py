"""String arguments, checks in words, what a resumed run may change; every recipe holds together."""

import json
import pathlib
import subprocess
import sys

import pytest

from folk_jax import config as config_lib
from folk_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))
# DESIGN's list of what every training recipe has.
KEYS = (
  'task init_from seed batch_size accumulate image_size epochs total_steps'
  ' objective.name model.name data.source data.name data.path mesh.fsdp'
  ' checkpoint.every checkpoint.keep log_every eval_every'
).split()


def parse(arg):
  return config_lib.parse_arg(arg, smoke=False, depth=12, rate=0.5, path='here').to_dict()


def refusal(function, *args, **kwargs) -> str:
  with pytest.raises(UserError) as refused:
    function(*args, **kwargs)
  assert '\n' not in str(refused.value)
  return str(refused.value)


def recipe(arg: str = 'smoke', name: str = 'vit_b.py'):
  return config_lib.load_recipe(str(ROOT / 'configs' / name), arg)


@pytest.mark.parametrize(
  'arg, expected',
  [
    (None, {}),
    ('', {}),
    ('smoke', {'smoke': True}),
    ('smoke=false,depth=3', {'depth': 3}),
    (' smoke , depth=3 ,rate=1e-3,', {'smoke': True, 'depth': 3, 'rate': 1e-3}),
    ('rate=2', {'rate': 2.0}),
    ('path=', {'path': ''}),
    ('path="/a,b",depth=3', {'path': '/a,b', 'depth': 3}),
    ('path=\'a=1,"b"\'', {'path': 'a=1,"b"'}),
    ('path=gs://bucket/a:b', {'path': 'gs://bucket/a:b'}),
  ],
)
def test_string_arguments_are_read_as_the_type_of_their_default(arg, expected):
  defaults = {'smoke': False, 'depth': 12, 'rate': 0.5, 'path': 'here'}
  found = parse(arg)
  assert found == defaults | expected
  assert {name: type(value) for name, value in found.items()} == {
    name: type(value) for name, value in defaults.items()
  }


@pytest.mark.parametrize(
  'arg, words',
  [
    (
      'smoek',
      "unknown recipe argument 'smoek'. Did you mean 'smoke'? Known: depth, path, rate, smoke.",
    ),
    ('zzz=1', "unknown recipe argument 'zzz'. Known: depth"),
    ('depth', "recipe argument 'depth' needs a value: write depth=... (int)."),
    ('depth=3.5', "depth='3.5' is not of type int"),
    ('smoke=maybe', "smoke='maybe' is not of type bool"),
    ('path="/a,smoke', 'opens a quote (") and never closes it'),
  ],
)
def test_string_arguments_that_make_no_sense_are_refused(arg, words):
  assert words in refusal(parse, arg)


@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize('arg', ['', 'smoke', 'data=folder,path="/a,b"'])
def test_every_recipe_loads_and_holds_together(name, arg):
  config = recipe(arg, name)
  config_lib.validate(config)
  flat = config_lib.flatten(json.loads(config_lib.to_json(config)))
  if arg.startswith('data'):
    assert (flat['data.source'], flat['data.path']) == ('folder', '/a,b')
  if config.task != 'pretrain':
    return  # No training recipe; without data of its own it takes those of the run it judges.
  assert set(KEYS) <= set(flat)
  if arg == 'smoke':
    assert (
      flat['total_steps'] <= 10 and flat['batch_size'] <= 32 and flat['data.source'] == 'embedded'
    )


def test_the_full_recipes_are_the_sizes_that_they_say():
  sizes = {'vit_s.py': (384, 12, 6), 'vit_b.py': (768, 12, 12), 'vit_l.py': (1024, 24, 16)}
  for name, size in sizes.items():
    model = recipe('', name).model
    assert (model.width, model.depth, model.heads, model.patch) == (*size, 16)


def test_recipes_load_without_jax():
  code = (
    'import sys; from folk_jax import config;'
    f'[config.load_recipe(f"configs/{{name}}") for name in {RECIPES!r}];'
    'print([m for m in ("jax", "flax", "grain", "torch") if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_a_recipe_that_is_not_there():
  assert "recipe 'configs/vit_x.py' not found" in refusal(
    config_lib.load_recipe, 'configs/vit_x.py'
  )


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'batch_size': 0}, 'config.batch_size is 0; it must be at least 1.'),
    ({'model.patch': 0}, 'config.model.patch is 0; it must be at least 1.'),
    ({'evaluation.batch_size': 0}, 'config.evaluation.batch_size is 0;'),
    ({'eval_every': -1}, 'config.eval_every is -1; it must not be negative'),
    ({'epochs': 0, 'total_steps': 0}, 'epochs and config.total_steps are both 0'),
    ({'image_size': 30}, 'image_size 30 is not a multiple of config.model.patch 8: use 24 or 32.'),
    ({'image_size': 5}, 'image_size 5 is not a multiple of config.model.patch 8: use 8.'),
    ({'model.heads': 5}, 'config.model.width 48 is not a multiple of config.model.heads 5.'),
    ({'accumulate': 3}, 'config.batch_size 16 is not a multiple of config.accumulate 3.'),
    (
      {'accumulate': 2, 'objective.reduce': 'pooled'},
      "config.objective.reduce 'pooled' is one mean over the whole batch",
    ),
    (
      {'evaluation.which': 'techer'},
      "unknown config.evaluation.which 'techer'. Did you mean 'teacher'?",
    ),
  ],
)
def test_contradictions_are_refused_in_words(changes, words):
  config = recipe()
  config.update_from_flattened_dict(changes)
  assert words in refusal(config_lib.validate, config)


@pytest.mark.parametrize(
  'layout, words',
  [
    ((20, 1, 8, 1), 'devices x accumulate = 8 x 1 = 8: use 16 or 24.'),
    ((24, 2, 8, 1), 'devices x accumulate = 8 x 2 = 16: use 16 or 32.'),
    ((4, 1, 8, 1), 'use 8.'),
    ((16, 1, 8, 3), 'config.mesh.fsdp 3 does not divide the 8 devices: use one of 1, 2, 4, 8.'),
    ((16, 1, 8, 0), 'use one of 1, 2, 4, 8.'),
  ],
)
def test_layouts_that_do_not_divide_say_what_would(layout, words):
  assert words in refusal(config_lib.check_layout, *layout)


def test_layouts_that_divide_pass():
  for layout in ((16, 1, 8, 1), (1024, 4, 256, 8), (1, 1, 1, 1)):
    config_lib.check_layout(*layout)


def changed(**changes):
  saved = json.loads(config_lib.to_json(recipe()))
  config = recipe()
  config.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in changes.items()}
  )
  config_lib.check_same_run(saved, config, '/runs/a')


def test_a_resumed_run_may_change_what_is_logged_kept_and_laid_out():
  changed()
  changed(log_every=7, eval_every=3, mesh__fsdp=2, accumulate=4, compilation_cache='')
  changed(checkpoint__every=9, evaluation__knn=(1,), logging__wandb=True, guard__patience=2)
  changed(data__path='/moved', data__workers=2, data__threads=1, data__prefetch=1)


@pytest.mark.parametrize(
  'change',
  [
    {'seed': 1},
    {'batch_size': 32},
    {'total_steps': 5},
    {'image_size': 24},
    {'data__source': 'synthetic'},
    {'data__limit': 3},
    {'data__mean': (0.5, 0.5, 0.5)},
    {'model__depth': 3},
    {'optimizer__learning_rate': 1e-3},
    {'views__view_2__flip': 0.0},
    {'objective__portions': (0.01,)},
    {'init_from': '/weights'},
  ],
)
def test_a_resumed_run_may_not_change_what_it_computes(change):
  ((name, value),) = change.items()
  message = refusal(changed, **change)
  assert message.startswith('workdir /runs/a holds a run with another configuration: ')
  assert name.replace('__', '.') + ' was ' in message
  assert f'now {list(value) if isinstance(value, tuple) else value!r}' in message


def test_of_many_differences_four_are_shown():
  message = refusal(changed, seed=1, batch_size=32, image_size=24, total_steps=5, model__depth=3)
  assert message.count(' was ') == 4 and '; and 1 more. Give another --workdir' in message


def test_a_key_that_one_side_lacks_is_a_difference():
  saved = json.loads(config_lib.to_json(recipe()))
  del saved['model']['drop_path']
  message = refusal(config_lib.check_same_run, saved, recipe(), '/runs/a')
  assert 'model.drop_path was None, now 0.1' in message


def test_json_is_whole_and_stable():
  text = config_lib.to_json(recipe())
  assert json.loads(text)['objective']['portions'] == [0.005, 0.01, 0.05]
  assert text == config_lib.to_json(recipe()) and text.endswith('}\n')
