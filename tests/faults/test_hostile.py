"""Files that mean harm are refused in one line, in bounded memory and time; nothing here runs what a file holds."""

import ast
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import hostile  # noqa: E402  # Tests and trials share the files.

from folk_jax.interop import timm  # noqa: E402


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('hostile')


@pytest.mark.parametrize('kind', hostile.SAFETENSORS)
def test_safetensors_that_lie_are_refused(kind, folder):
  assert hostile.SAFETENSORS[kind](folder) == ''


@pytest.mark.parametrize('kind', hostile.NPZ)
def test_archives_that_lie_are_refused(kind, folder):
  assert hostile.NPZ[kind](folder) == ''


@pytest.mark.parametrize('kind', hostile.CHECKPOINTS)
def test_checkpoints_that_lie_are_refused(kind, folder):
  assert hostile.CHECKPOINTS[kind](folder) == ''


def test_what_the_libraries_write_is_read_as_they_read_it(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    f'{dtype}_{order}': np.asarray(rng.normal(size=(3, 4, 2)) * 9, dtype, order=order)
    for dtype in ('float16', 'float32', 'float64', 'int64', 'uint8')
    for order in 'CF'
  } | {'none': np.zeros((0, 3), np.float32), 'scalar': np.array(2.5)}
  np.savez(tmp_path / 'plain.npz', **arrays)
  np.savez_compressed(tmp_path / 'packed.npz', **arrays)
  whole = {name: np.array(array, order='C') for name, array in arrays.items()}
  safetensors.numpy.save_file(whole, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
  for name in ('plain.npz', 'packed.npz', 'a.safetensors'):
    found = timm.load_timm_file(tmp_path / name)
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
      assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
      np.testing.assert_array_equal(found[key], array)


def test_bfloat16_of_safetensors_is_widened(tmp_path):
  import struct

  header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
  # The upper halves of 1.0 and -2.5 in float32.
  data = struct.pack('<Q', len(header)) + header + struct.pack('<2H', 0x3F80, 0xC020)
  (tmp_path / 'a.safetensors').write_bytes(data)
  found = timm.load_timm_file(tmp_path / 'a.safetensors')['a']
  assert found.dtype == np.float32 and found.tolist() == [1.0, -2.5]


# What runs code that a file brings along. A reader may be named here with the argument that makes it safe.
RUNS_CODE = {'cloudpickle', 'dill', 'joblib', 'marshal', 'pickle', 'shelve', 'jsonpickle'}
SAFE_WITH = {
  'numpy.load': ('allow_pickle', False),
  'np.load': ('allow_pickle', False),
  'torch.load': ('weights_only', True),
}
NEVER = {'eval', 'exec', 'yaml.load', 'yaml.unsafe_load', 'np.fromregex', 'tarfile.extractall'}
# Between a run's own processes, through memory; no file is read.
ITS_OWN_PROCESSES = {'folk_jax/data/tasks.py'}


def _dotted(node: ast.expr) -> str:
  if isinstance(node, ast.Attribute):
    return f'{_dotted(node.value)}.{node.attr}'
  return node.id if isinstance(node, ast.Name) else ''


def readers_that_run_code(source: str) -> list[str]:
  """Imports and calls in a source that would run what a file holds."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      modules = (
        [alias.name for alias in node.names]
        if isinstance(node, ast.Import)
        else [node.module or '']
      )
      found += [name for name in modules if name.split('.')[0] in RUNS_CODE]
    elif isinstance(node, ast.Call):
      name = _dotted(node.func)
      if name in NEVER:
        found.append(name)
      if name in SAFE_WITH:
        argument, value = SAFE_WITH[name]
        given = {word.arg: word.value for word in node.keywords}
        if argument not in given or getattr(given[argument], 'value', None) is not value:
          found.append(name)
      if any(
        word.arg == 'allow_pickle' and getattr(word.value, 'value', 1) for word in node.keywords
      ):
        found.append(f'{name} with allow_pickle')
  return found


def test_nothing_in_the_package_runs_what_a_file_holds():
  files = sorted((ROOT / 'folk_jax').rglob('*.py'))
  found = {
    path.relative_to(ROOT).as_posix(): readers_that_run_code(path.read_text(encoding='utf-8'))
    for path in files
  }
  assert len(found) > 50
  assert {name for name, readers in found.items() if readers} <= ITS_OWN_PROCESSES


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'from joblib import load',
    'def f():\n  import dill',
    'np.load(path)',
    'np.load(path, allow_pickle=True)',
    'torch.load(path)',
    'torch.load(path, weights_only=False)',
    'eval(text)',
    'other.load(path, allow_pickle=anything)',
  ],
)
def test_a_reader_that_runs_code_is_found(source):
  assert len(readers_that_run_code(source)) >= 1


def test_safe_readers_are_left_alone():
  source = (
    'np.load(f, allow_pickle=False)\ntorch.load(f, weights_only=True)\nmodel.eval()\njson.load(f)'
  )
  assert readers_that_run_code(source) == []
