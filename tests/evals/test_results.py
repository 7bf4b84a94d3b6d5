"""results.json: what is kept, found again, refused, and how it is shown."""

import json

import pytest

from folk_jax.errors import UserError
from folk_jax.evals.results import Results, read, table

ABOUT = {'checkpoint': 'runs/a', 'settings': 'abc', 'which': 'teacher'}


def test_everything_is_found_again_and_a_part_is_computed_once(tmp_path):
  file, computed = tmp_path / 'below' / 'results.json', []

  def compute(value):
    computed.append(value)
    return {'top1': value}

  first = Results(file, ABOUT)
  assert first.part('robustness', 'clean', lambda: compute(0.5)) == {'top1': 0.5}
  first.add('linear', {'top1': 1, 'chosen_head': 'lr0.1_pooled'})
  second = Results(file, ABOUT)
  assert second.scores == {'linear': {'top1': 1.0, 'chosen_head': 'lr0.1_pooled'}}
  assert second.stands('robustness', 'clean') and not second.stands('robustness', 'fgsm')
  assert not second.stands('low_shot', 'clean')
  assert second.part('robustness', 'clean', lambda: compute(0.6)) == {'top1': 0.5}
  second.part('robustness', 'fgsm', lambda: compute(0.1))
  assert computed == [0.5, 0.1]
  kept = json.loads(file.read_text())
  assert {name: kept[name] for name in ABOUT} == ABOUT
  assert list(kept['details']['robustness']) == ['clean', 'fgsm']
  assert [path.name for path in file.parent.iterdir()] == ['results.json']


def test_what_fails_leaves_what_stood(tmp_path):
  results = Results(tmp_path / 'results.json', ABOUT)
  results.part('robustness', 'clean', lambda: {'top1': 0.5})

  def fail():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    results.part('robustness', 'fgsm', fail)
  assert Results(tmp_path / 'results.json', ABOUT).details == {
    'robustness': {'clean': {'top1': 0.5}}
  }


def test_other_settings_and_other_files_are_refused_in_words(tmp_path):
  file = tmp_path / 'results.json'
  Results(file, ABOUT).add('knn', {'top1_k1': 0.5})
  with pytest.raises(UserError, match='is of runs/a with other settings: give another --workdir'):
    Results(file, ABOUT | {'settings': 'abd'})
  # From before there were parts.
  old = json.loads(file.read_text())
  del old['details']
  file.write_text(json.dumps(old))
  assert Results(file, ABOUT).details == {}
  for text, words in (('{', 'cannot read'), ('[]', 'no results.json'), ('{"a": 1}', 'no scores')):
    file.write_text(text)
    with pytest.raises(UserError, match=words):
      read(file)
  with pytest.raises(UserError, match='cannot read'):
    read(tmp_path / 'nowhere.json')
  (tmp_path / 'taken').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    Results(tmp_path / 'taken' / 'results.json', ABOUT).add('knn', {})


def test_a_table_worked_by_hand():
  shown = table({'knn': {'top1_k1': 0.5}, 'linear': {'chosen_head': 'lr0.1'}})
  assert shown.splitlines() == [
    'evaluation  what              ',
    'knn         top1_k1      0.5000',
    'linear      chosen_head   lr0.1',
  ] or shown.splitlines() == [
    'evaluation  what               ',
    'knn         top1_k1      0.5000',
    'linear      chosen_head   lr0.1',
  ]
