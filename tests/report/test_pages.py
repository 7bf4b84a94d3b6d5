"""A run's page: what it holds for each method, that it is HTML and whole, and that it trusts no file."""

import json
import pathlib
import re

import pytest

from folk_jax.errors import UserError
from folk_jax.report import of_run

_ALL = {'curves', 'views', 'patches', 'neighbours', 'evaluation', 'configuration'}
# Beside those of every method; of methods whose pages share their code one stands for all. DINO's is below.
SECTIONS = {
  'folk': {'filters', 'rebuilt'},
  'folk_resnet': {'filters', 'rebuilt'},
  'wavelet_mim': {'rebuilt'},
  'denoise': {'rebuilt'},
}


@pytest.fixture(scope='module')
def folk_page(make_workdir, read_page):
  """A FOLK run's workdir and page, its names hostile: a browser that believed them would run a script."""
  workdir = make_workdir('folk', **{'data.path': '"><script>alert(1)</script>&amp;'})
  hostile = {'devices': "<img src=x onerror='alert(2)'>"}
  (workdir / 'machine.json').write_text(json.dumps(hostile))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(of_run, '_BANK', (8, 8))
    patch.setattr(of_run, '_BATCH', 8)
    out = of_run.report(str(workdir))
  text = (workdir / 'report.html').read_text()
  assert out == str(workdir / 'report.html')
  return workdir, text, read_page(text)


def test_folk_has_every_section(folk_page):
  _, _, page = folk_page
  assert set(page.sections) == _ALL | SECTIONS['folk']
  # Eight photographs with components and attention; six queries with five neighbours each.
  assert len(page.of('img')) > 8 * 3 + 6 * 6
  assert all(image['alt'] for image in page.of('img'))
  assert page.text.count('Class') == 0 and '4 of 4' in page.text


def test_nothing_is_loaded_from_anywhere(folk_page):
  _, text, page = folk_page
  assert all(image['src'].startswith('data:image/') for image in page.of('img'))
  assert not re.search(r'https?://', text)
  assert not {'script', 'link', 'iframe', 'object'} & {name for name, _ in page.elements}
  assert all(link['href'].startswith('#') for link in page.of('a'))
  assert 'url(' not in text and '@import' not in text
  assert len(text) < 3_000_000


def test_names_from_files_are_text(folk_page):
  _, text, page = folk_page
  assert '<script' not in text and '<img src=x' not in text
  assert 'alert(1)' in page.text and "onerror='alert(2)'" in page.text


def test_numbers_are_those_of_the_files(folk_page):
  _, _, page = folk_page
  labels = [one['aria-label'] for one in page.of('svg')]
  assert 'Loss over steps 1 to 4: total 1 at first, 0.25 at last' in labels
  assert any(label.startswith('Where the time goes') and '50 %' in label for label in labels)
  assert 'knn top1 0.25 0.5 0.25' in page.text


@pytest.mark.parametrize('method', sorted(set(SECTIONS) - {'folk'}))
def test_every_method_has_a_page_of_what_applies_to_it(method, make_workdir, read_page, small_bank):
  page = read_page(pathlib.Path(of_run.report(str(make_workdir(method)))).read_text())
  assert set(page.sections) == _ALL | SECTIONS[method]
  assert ('attention' in page.text) == (method != 'folk_resnet')
  assert ('those of the original' in page.text) == (method == 'wavelet_mim')


def test_a_run_without_its_data_shows_embedded_photographs_and_says_so(
  make_workdir, read_page, small_bank
):
  gone = {'data.source': 'folder', 'data.path': '/nowhere', 'total_steps': 9}
  page = read_page(pathlib.Path(of_run.report(str(make_workdir('dino', **gone)))).read_text())
  assert 'patches' in page.sections
  notices = [attributes for attributes in page.of('p') if attributes.get('class') == 'notice']
  assert len(notices) == 2
  assert 'embedded photographs' in page.text
  assert 'unfinished: it stands at step 4 of 9' in page.text
  # Queries are the photographs whose crops are the bank.
  assert 'have the class of their query' not in page.text and 'held-out image,' not in page.text


def test_a_run_that_has_saved_nothing_has_its_curves(make_workdir, read_page):
  workdir = make_workdir('folk', step=2)
  for file in (workdir / 'checkpoints').iterdir():
    file.rename(workdir / f'moved_{file.name}')
  with open(workdir / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 3, "train/lo')  # A kill cut it short.
  (workdir / 'evaluated').mkdir()
  (workdir / 'evaluated' / 'results.json').write_text(
    '{"checkpoint": "", "settings": "", "scores": [1]}'
  )
  page = read_page(
    pathlib.Path(of_run.report(str(workdir), str(workdir / 'other' / 'page.html'))).read_text()
  )
  assert page.sections == ['curves', 'evaluation', 'configuration']
  assert 'stands at step 2 of 4' in page.text and 'no checkpoint yet' in page.text
  assert re.search(r'left out: .*results.json is no results.json: its scores is', page.text)


def test_a_page_that_cannot_be_written_gives_one_line(make_workdir, tmp_path):
  workdir = make_workdir('folk')
  (tmp_path / 'file').write_text('')
  for step in (workdir / 'checkpoints').iterdir():
    step.rename(workdir / f'moved_{step.name}')
  with pytest.raises(UserError, match='give an --out that can be written'):
    of_run.report(str(workdir), str(tmp_path / 'file' / 'page.html'))


def test_results_alone_make_a_page(tmp_path, read_page):
  scores = {'knn': {'top1_k20': 0.5}, 'linear': {'chosen_head': '<b>'}}
  found = {'checkpoint': 'runs/x', 'settings': '', 'which': 'teacher', 'scores': scores}
  (tmp_path / 'results.json').write_text(json.dumps(found))
  text = pathlib.Path(of_run.report(str(tmp_path))).read_text()
  assert read_page(text).sections == ['evaluation']
  assert 'top1 k20' in text and '&lt;b&gt;' in text
