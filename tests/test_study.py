"""The study's commands share rows: what one has found is never lost to another, and no row is made twice."""

import importlib
import json
import pathlib
import sys

import pytest

from folk_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def study(monkeypatch):
  monkeypatch.setattr(sys, 'path', [str(ROOT / 'benchmarks'), *sys.path])
  return importlib.import_module('study')


def test_two_commands_write_one_file(study, tmp_path):
  one = study.STUDIES['cpu']
  folk, mfm = one.methods[:2]
  out = tmp_path / 'study.json'
  first, second = study.Rows(one, out), study.Rows(one, out)
  first.keep(first.row(folk, 'epochs', 0), 'train', {'seconds': 3.0})
  second.keep(second.row(mfm, 'epochs', 0), 'train', {'seconds': 2.0})
  second.keep(second.row(folk, 'epochs', 0), 'frozen', {'seconds': 1.0})
  first.keep(first.row(folk, 'compute', 0), 'train', {'seconds': 4.0})
  rows = {(row['method'], row['budget']): row for row in json.loads(out.read_text())['rows']}
  assert [*rows] == [('FOLK', 'epochs'), ('MFM', 'epochs'), ('FOLK', 'compute')]
  assert set(rows['FOLK', 'epochs']['parts']) == {'train', 'frozen'}
  first.refresh()
  assert first.row(folk, 'epochs', 0)['parts']['frozen']['seconds'] == 1.0
  # The longest that any method took, where this one was never timed.
  assert first.seconds('train', one.methods[2]) == 4.0


def test_a_row_that_another_command_makes_is_left_to_it(study, tmp_path):
  row = tmp_path / 'folk_epochs_0'
  with study.alone(row, wait=False) as mine:
    with study.alone(row, wait=False) as theirs:
      assert mine and not theirs
  with study.alone(row, wait=False) as again:
    assert again


def test_a_file_of_another_study_is_refused(study, tmp_path):
  out = tmp_path / 'study.json'
  cpu, ablations = study.STUDIES['cpu'], study.STUDIES['cpu_ablations']
  rows = study.Rows(cpu, out)
  rows.keep(rows.row(cpu.methods[0], 'epochs', 0), 'train', {'seconds': 3.0})
  with pytest.raises(UserError, match="holds .*'study': 'cpu'.*name another --out"):
    study.Rows(ablations, out)


@pytest.mark.parametrize('text', ['{"asked": {"study"', '[1, 2]', '\x00'])
def test_a_damaged_file_is_named_with_what_to_do(study, tmp_path, text):
  out = tmp_path / 'study.json'
  out.write_text(text)
  with pytest.raises(UserError, match=r'study\.json is not a result .*git checkout.*remove it'):
    study.Rows(study.STUDIES['cpu'], out)
  assert out.read_text() == text
