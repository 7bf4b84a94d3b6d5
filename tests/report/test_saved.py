"""What a run's folder may hold instead of what it should: one line that names file and field."""

import functools
import json

import pytest

from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.evals import results
from folk_jax.report import of_run, saved

METHODS = 'dino', 'folk', 'folk_resnet', 'ibot', 'mae', 'segment', 'wavelet_mim'
METHODS += 'deblur', 'denoise', 'super_resolution'


@pytest.fixture(scope='module')
def written(support):
  """`written(method)`: its config.json, as a dict."""
  make_config = support('every_objective').make_config
  text = functools.cache(lambda method: config_lib.to_json(make_config(method)))
  return lambda method: json.loads(text(method))


def of(workdir, config):
  text = config if isinstance(config, str) else json.dumps(config)
  (workdir / 'config.json').write_text(text)
  return saved.read_config(workdir)


@pytest.mark.parametrize('method', METHODS)
def test_whatever_a_run_writes_is_read(method, written, tmp_path):
  found = of(tmp_path, written(method))
  assert json.loads(config_lib.to_json(found)) == written(method)


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    (None, 'holds no run'),
    ('{"model": ', 'damaged'),
    ('[]', 'damaged'),
    ('{"model": {"name": "vit"}}', 'lacks the field batch_size'),
    ('{"a":' * 100_000 + '1' + '}' * 100_000, 'damaged'),
  ],
)
def test_a_folder_that_is_no_run_gives_one_line(text, said, tmp_path):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=said) as raised:
    of_run.report(str(tmp_path))
  assert '\n' not in str(raised.value) and 'config.json' in str(raised.value)
  assert len(str(raised.value)) < 500 + len(str(tmp_path))
  assert not (tmp_path / 'report.html').exists()


@pytest.mark.parametrize('method', ['folk', 'mae', 'wavelet_mim', 'ibot', 'dino'])
def test_fields_that_are_missing_or_of_another_type_are_named(method, written, tmp_path):
  """Each field whose absence is noticed, in the parts that pages read; the others must not matter."""
  noticed = set()
  for field in config_lib.flatten(written(method)):
    for value in (None, 'absent'):
      config = written(method)
      *parts, last = field.split('.')
      node = config
      for part in parts:
        node = node[part]
      if value is None:
        node[last] = None
      else:
        del node[last]
      try:
        of(tmp_path, config)
      except UserError as error:
        assert 'config.json' in str(error) and field in str(error) and '\n' not in str(error)
        noticed.add(field)
  assert {'total_steps', 'epochs', 'batch_size', 'data.mean', 'model.patch'} <= noticed
  assert {'views.view_1.flip', 'teacher.enabled', 'objective.name'} <= noticed
  expected = {'folk': 'portions', 'mae': 'normalise_pixels', 'wavelet_mim': 'layers'}
  if method in expected:
    assert f'objective.{expected[method]}' in noticed


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('batch_size', 0, 'batch_size is 0, expected at least 1'),
    ('total_steps', True, 'total_steps is a bool, expected int'),
    ('views', {'view_1': 1}, 'lacks the field views.view_1'),
    ('objective', [], 'lacks the field objective.name'),
    ('model', {'name': []}, 'lacks the field model.depth'),
  ],
)
def test_values_that_no_run_has(field, value, said, written, tmp_path):
  with pytest.raises(UserError, match=said):
    of(tmp_path, written('folk') | {field: value})


def test_a_field_of_another_version_is_named(written, tmp_path):
  config = written('folk')
  config['data']['colour'] = 1
  with pytest.raises(UserError, match='data.colour is no field'):
    of(tmp_path, config)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'scores': [1]}, 'its scores is no table'),
    ({'scores': {'knn': 1}}, 'its scores is no table'),
    ({'scores': {'knn': {'top1': [1]}}}, 'scores.knn.top1 is no number'),
    ({'details': 1}, 'its details is no table'),
    ({'details': {'robustness': [1]}}, 'its details is no table'),
    ({'details': {'robustness': {'clean': 1}}}, 'its details.robustness is no table'),
  ],
)
def test_results_that_are_none_are_named_or_left_out(change, said, tmp_path):
  (tmp_path / 'below').mkdir()
  file = tmp_path / 'below' / 'results.json'
  file.write_text(json.dumps({'checkpoint': 'x', 'settings': '', 'scores': {}} | change))
  with pytest.raises(UserError, match=said):
    results.read(file)
  with pytest.raises(UserError, match=said):  # It was asked for.
    saved.read_results(tmp_path, [str(file)], [])
  notices = []
  assert saved.read_results(tmp_path, [], notices) == {}
  assert len(notices) == 1 and said in notices[0] and str(file) in notices[0]


def test_results_that_nest_without_end_are_refused(tmp_path):
  (tmp_path / 'results.json').write_text('[' * 100_000)
  with pytest.raises(UserError, match='cannot read'):
    results.read(tmp_path / 'results.json')


def test_a_machine_that_cannot_be_read_is_left_out(tmp_path):
  assert saved.read_machine(tmp_path) == {}
  (tmp_path / 'machine.json').write_text('{"a":' * 100_000)
  assert saved.read_machine(tmp_path) == {}
