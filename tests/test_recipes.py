"""Every recipe in every variant it offers: it loads, passes the checks, and its objective and state can be built."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import pytest

from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.signal.filters import FILTERS
from folk_jax.train.run import data_settings, make_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAPERS = [
  'vit_b.py',
  'vit_s.py',
  'vit_l.py',
  'resnet50.py',
  *(f'mfm.py:model={model}' for model in ('vit_b', 'vit_s', 'resnet50')),
  'mfm.py:filter=com_rcom',
  *(
    f'restoration.py:task={task},model={model}'
    for task in ('super_resolution', 'deblur', 'denoise')
    for model in ('vit_b', 'vit_s', 'resnet50')
  ),
  *(
    f'{method}.py:model={model}'
    for method in ('mae', 'wavelet_mim')
    for model in ('vit_b', 'vit_s')
  ),
  *(
    f'{method}.py:model={model},local_crops={crops}'
    for method in ('dino', 'ibot')
    for model in ('vit_b', 'vit_s')
    for crops in (0, 10)
  ),
  'dino.py:model=resnet50',
  *(f'linear.py:model={model}' for model in ('vit_b', 'vit_s', 'resnet50')),
  *(f'finetune.py:model={model}' for model in ('vit_b', 'vit_s', 'resnet50')),
]
SMALL = [
  f'{recipe}cifar10,path=/images'
  for recipe in (
    'resnet50.py:',
    'mfm.py:',
    'mfm.py:model=resnet50,',
    'restoration.py:task=super_resolution,',
    'restoration.py:task=deblur,',
    'restoration.py:task=denoise,',
    'mae.py:',
    'wavelet_mim.py:',
    'dino.py:',
    'dino.py:local_crops=4,',
    'ibot.py:',
    'ablations.py:none,',
  )
]


def load(recipe):
  file, _, arg = recipe.partition(':')
  return config_lib.load_recipe(str(ROOT / 'configs' / file), arg or None)


def build(config, images=1_281_167):
  """Checks, data settings and the state's shapes: all that needs neither data nor a device."""
  config_lib.validate(config)
  settings = data_settings(config)
  made = make_run(config, images, 1000)
  return settings, made, jax.eval_shape(made.new_state, jax.random.key(0), {})


@pytest.mark.parametrize('recipe', PAPERS)
def test_papers_recipes_build(recipe):
  config = load(recipe)
  _, made, state = build(config)
  # A3 of "ResNet strikes back" trains at 160 pixels.
  size = 160 if recipe == 'finetune.py:model=resnet50' else 224
  assert config.data.source == 'tfds' and config.image_size == size
  assert made.total_steps == round(config.epochs * 1_281_167 / config.batch_size) > 50_000
  assert set(state.params) >= {'backbone'}


@pytest.mark.parametrize('recipe', SMALL)
def test_small_recipes_build_and_share_their_settings(recipe):
  """The table of all methods compares them at one size, batch and optimiser."""
  config, folk = load(recipe), load('cifar10.py:path=/images')
  settings, made, _ = build(config, images=50_000)
  assert (settings.source, settings.path, settings.image_size) == ('folder', '/images', 32)
  assert made.total_steps == 1000 and config.batch_size == folk.batch_size
  ignored = ('freeze_last_layer_epochs',)
  assert {k: v for k, v in config.optimizer.items() if k not in ignored} == {
    k: v for k, v in folk.optimizer.items() if k not in ignored
  }
  if config.model.name == 'vit':
    assert config.model == folk.model


def _ablations():
  spec = importlib.util.spec_from_file_location('ablations', ROOT / 'configs' / 'ablations.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.ABLATIONS


@pytest.mark.parametrize('name', _ablations())
def test_every_ablation_builds_and_changes_what_it_says(name):
  base = config_lib.flatten(load('vit_s.py').to_dict())
  config = load(f'ablations.py:{name}')
  changed = {
    key: value
    for key, value in config_lib.flatten(config.to_dict()).items()
    if value != base.get(key, object())
  }
  wanted = _ablations()[name][1]
  assert changed.items() <= wanted.items()
  # What a table entry sets and the base already has would be no ablation; blur is for small recipes.
  assert set(changed) == set(wanted) or name == 'blur'
  build(config)


def test_ablations_combine_cover_the_filters_and_are_listed():
  config = load('ablations.py:no_blur,portion_low,cifar10,path=/images')
  assert config.objective.portions == (0.005,) and config.data.path == '/images'
  assert config.views.view_1.blur_probability == 0.0
  filters = {
    fields['objective.filter']
    for _, fields in _ablations().values()
    if 'objective.filter' in fields
  }
  assert filters == set(FILTERS) - {'com_rcom'}
  listed = subprocess.run(
    [sys.executable, 'configs/ablations.py'], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  assert all(f'\n{name} ' in f'\n{listed}' for name in _ablations())


@pytest.mark.parametrize(
  'recipe, words',
  [
    ('ablations.py:no_blurr', "unknown recipe argument 'no_blurr'. Did you mean 'no_blur'?"),
    ('mfm.py:model=vit_h', "unknown recipe argument model 'vit_h'"),
    ('mae.py:model=vit_l', 'Known: resnet50, vit_b, vit_s'),
    ('restoration.py:task=inpaint', "unknown recipe argument task 'inpaint'"),
    ('dino.py:local_crops=many', "local_crops='many' is not of type int"),
  ],
)
def test_mistyped_arguments_are_refused_in_words(recipe, words):
  with pytest.raises(UserError) as refused:
    load(recipe)
  assert words in str(refused.value)


def test_a_path_with_commas_and_quotes_reaches_the_base_recipe():
  config = load('''ibot.py:cifar10,path="/my images, 'raw'=1"''')
  assert config.data.path == "/my images, 'raw'=1"
  values = {'smoke': True, 'path': "a,b='c'", 'name': '', 'cifar10': False, 'steps': 3}
  again = config_lib.parse_arg(
    config_lib.format_arg(values), smoke=False, path='', name='', cifar10=True, steps=0
  )
  assert again.to_dict() == values | {'cifar10': True}


def test_local_crops_must_fit_the_patch():
  config = load('dino.py:local_crops=4')
  config.local_views.size = 90
  with pytest.raises(
    UserError, match='local_views.size 90 is not a multiple of config.model.patch 16'
  ):
    config_lib.validate(config)
