"""The listings of docs/adding_an_objective.md, as they stand there, make a method that trains."""

import importlib.util
import pathlib
import re
import shutil

import numpy as np
import pytest

from folk_jax import config as config_lib
from folk_jax import objectives
from folk_jax.errors import UserError
from folk_jax.train import loop, metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def listings() -> list[str]:
  page = (ROOT / 'docs' / 'adding_an_objective.md').read_text(encoding='utf-8')
  found = re.findall(r'^```python\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
  assert len(found) == 2
  return found


@pytest.fixture
def recipe(listings, tmp_path, monkeypatch) -> pathlib.Path:
  """The page's recipe among the others, its objective registered."""
  module_file = tmp_path / 'rotation.py'
  module_file.write_text(listings[0], encoding='utf-8')
  spec = importlib.util.spec_from_file_location('rotation', module_file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setitem(objectives.OBJECTIVES, 'rotation', module.Rotation)
  shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
  file = tmp_path / 'configs' / 'rotation.py'
  file.write_text(listings[1], encoding='utf-8')
  return file


@pytest.mark.parametrize('arg', ['smoke', 'model=resnet50,smoke'])
def test_the_page_trains(recipe, tmp_path, arg):
  config = config_lib.load_recipe(str(recipe), arg)
  config.compilation_cache = ''
  config.logging.update({'tensorboard': False, 'progress': False})
  config_lib.validate(config)
  loop.pretrain(config, str(tmp_path / 'run'))
  lines = metrics.read_metrics(str(tmp_path / 'run'))
  losses = [line['train/loss'] for line in lines if 'train/loss' in line]
  # Four answers from a head that starts near zero: ln 4 to begin with.
  assert losses[0] == pytest.approx(np.log(4), abs=0.3) and len(losses) == 4
  assert all(0 <= line['train/right'] <= 1 for line in lines if 'train/right' in line)
  assert sum('eval/knn_top1' in line for line in lines) == 2


def test_the_pages_fields_are_checked(recipe, tmp_path):
  config = config_lib.load_recipe(str(recipe), 'smoke')
  config.objective.turns = 5
  config.compilation_cache = ''
  with pytest.raises(UserError, match='turns 5 must be 2, 3 or 4'):
    loop.pretrain(config, str(tmp_path / 'run'))
