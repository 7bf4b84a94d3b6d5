"""Pages whose figures come from JSON say what the JSON says: nobody typed over them or forgot to write them."""

import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ('results_page', 'performance_page', 'reliability_page', 'study_page')


@pytest.mark.parametrize('name', PAGES)
def test_page_is_what_its_command_writes(name, monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
  module = importlib.import_module(name)
  pages = {}
  for attribute in ('_PAGE', '_README'):
    if hasattr(module, attribute):
      page = getattr(module, attribute)
      copy = tmp_path / page.name
      copy.write_text(page.read_text(encoding='utf-8'), encoding='utf-8')
      monkeypatch.setattr(module, attribute, copy)
      pages[copy] = page
  if hasattr(module, 'draw'):  # Figures are pictures of the same numbers.
    monkeypatch.setattr(module, 'draw', lambda *_: None)
  module.main()
  for copy, page in pages.items():
    written, there = copy.read_text(encoding='utf-8'), page.read_text(encoding='utf-8')
    assert written == there, f'run: python benchmarks/{name}.py'


def test_study_recipes_exist_and_hold_together(monkeypatch):
  """Every row of every study is a configuration that the trainer takes."""
  monkeypatch.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
  study, studies = importlib.import_module('study'), importlib.import_module('studies')
  config_lib = importlib.import_module('folk_jax.config')
  for one in studies.STUDIES.values():
    names = [method.name for method in one.methods]
    assert len(names) == len(set(names))
    seen = {}
    for method in one.methods:
      config = study.configuration(one, method, 'DIR')
      config_lib.validate(config)
      assert method.reference in ('', *names)
      same = seen.setdefault(config_lib.to_json(config), method.name)
      assert same == method.name, f'{one.name}: {same} and {method.name} are the same run'
    assert {part for _, part in one.stages} == {'train', *one.parts}


def test_study_averages_seeds_and_pairs_them(monkeypatch):
  monkeypatch.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
  page, studies = importlib.import_module('study_page'), importlib.import_module('studies')
  study = studies.STUDIES['cpu_ablations']

  def row(method, seed, knn):
    train = {'scores': {'knn_top1': knn / 100, 'linear_cached_top1': 0.5}}
    return {
      'method': method,
      'budget': 'epochs',
      'seed': seed,
      'steps': 350,
      'gflop_an_image': 0.25,
      'parts': {'train': train},
    }

  rows = [row('none', 0, 30), row('none', 1, 32), row('clamp', 0, 33), row('clamp', 1, 31)]
  # By hand: (33 - 30 + 31 - 32) / 2 = 1, deviations +2 and -2 of two: sqrt(8) = 2.8; one of two is above.
  (line,) = [one for one in page.paired(study, rows).splitlines() if 'clamp' in one]
  assert '| +1.0 ± 2.8, 1 of 2 |' in line
  lines = page.table(study, rows, 'epochs').splitlines()
  assert '| none | 350 | 0.25 | 31.0 ± 1.4 | 50.0 ± 0.0 |' in lines
  assert any('no_distillation' in one and 'not run' in one for one in lines)
