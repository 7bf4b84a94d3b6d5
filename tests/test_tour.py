"""The notebook's cells run, one after the other, as a reader would run them."""

import json
import pathlib
import tempfile

import matplotlib
import pytest

NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'tour.ipynb'


def test_every_cell_runs(monkeypatch, capsys):
  monkeypatch.setenv('TOUR_STEPS', '2')
  monkeypatch.chdir(NOTEBOOK.parent)
  cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
  source = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
  backend = matplotlib.get_backend()
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  drawn = []
  monkeypatch.setattr(plt, 'show', lambda: drawn.append(len(plt.gcf().axes)))
  names: dict = {}
  try:
    for text in source:
      exec(compile(text, str(NOTEBOOK), 'exec'), names)
  finally:
    plt.close('all')
    matplotlib.use(backend)
  # Twelve pictures of filtered views, four curves; weights and a page at the end.
  assert drawn == [12, 4]
  assert {'folk.safetensors', 'report.html'} <= {path.name for path in names['workdir'].iterdir()}
  assert 'of the energy beside the mean colour' in capsys.readouterr().out


def test_saved_outputs_have_no_error_and_no_path():
  text = NOTEBOOK.read_text(encoding='utf-8')
  notebook = json.loads(text)
  outputs = [out for cell in notebook['cells'] for out in cell.get('outputs', [])]
  assert not [out for out in outputs if out['output_type'] == 'error']
  for folder in (pathlib.Path.home(), NOTEBOOK.parents[1], tempfile.gettempdir()):
    assert f'{folder}/' not in text
  if not outputs:
    pytest.fail('the notebook was saved without its outputs: run it before it is committed')
