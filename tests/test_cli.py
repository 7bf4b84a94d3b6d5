"""How commands end: the exit status and the one line of real processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from folk_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]

PROGRAM = '''
"""Does what --act says.

For instance: %s --config=recipe.py --workdir=run
"""
import signal
import sys
import time

from absl import flags
from ml_collections import config_flags

from folk_jax import cli
from folk_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file('config')
ACT = flags.DEFINE_enum('act', 'show', ['show', 'refuse', 'break', 'wait', 'status'], 'What to do.')
flags.DEFINE_string('workdir', None, 'Where to do it.')
flags.mark_flag_as_required('workdir')


def main(argv):
  if ACT.value == 'refuse':
    raise UserError('batch_size is 7:\\n  expected a multiple of 8')
  if ACT.value == 'break':
    raise KeyError('a defect')
  if ACT.value == 'wait':
    # A shell starts background jobs with SIGINT ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print('waiting', flush=True)
    time.sleep(60)
  if ACT.value == 'status':
    return 5
  assert 'jax' not in sys.modules
  print(CONFIG.value.to_dict() if CONFIG.value else None)


cli.run(main)
'''

RECIPE = """
import ml_collections

from folk_jax.errors import UserError


def get_config(arg=None):
  if arg == 'refuse':
    raise UserError('unknown argument of the recipe')
  if arg == 'break':
    raise ValueError('a defect of the recipe')
  if arg == 'open':
    open('no_such_table.csv')
  config = ml_collections.ConfigDict({'batch_size': 4, 'fast': False, 'steps': None})
  config.model = ml_collections.ConfigDict({'name': 'vit', 'depth': 12, 'width': 96})
  return config
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('cli')
  (folder / 'program.py').write_text(PROGRAM.lstrip())
  (folder / 'recipe.py').write_text(RECIPE)
  return folder


def start(folder: pathlib.Path, *arguments: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, 'program.py', *arguments],
    cwd=folder,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
  process = start(folder, *arguments)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_main_runs_with_overrides(folder):
  arguments = ('--config', 'recipe.py', '--config.batch_size=8', '--config.fast', '--workdir=w')
  status, out, err = finish(folder, *arguments, '--config.model.depth', '3')
  assert (status, err) == (0, '')
  expected = {'batch_size': 8, 'fast': True, 'steps': None}
  assert eval(out) == expected | {'model': {'name': 'vit', 'depth': 3, 'width': 96}}


MISTAKES = [
  (
    ['--config.batchsize=8'],
    "unknown config key config.batchsize; did you mean 'config.batch_size'?",
  ),
  (['--config.batchsize', '8'], "config.batchsize; did you mean 'config.batch_size'?"),
  (['--noconfig.fsat'], "unknown config key config.fsat; did you mean 'config.fast'?"),
  (['--config.model.dept=8'], "config.model.dept; did you mean 'config.model.depth'?"),
  (['--config.modle.depth=8'], "unknown config key config.modle; did you mean 'config.model'?"),
  (['--config.width=8'], "unknown config key config.width; did you mean 'config.model.width'?"),
  (['--config.zzz=8'], 'unknown config key config.zzz; known: batch_size, fast, model, steps'),
  (['--config.model.depth.x=8'], 'config.model.depth is 12 and has no keys of its own'),
  (['--config.batch_size=many'], 'flag --config.batch_size=many: invalid literal for int()'),
  (['--config.model=8'], 'flag --config.model=8: Failed to parse'),
  (['--config.steps=8'], '--config.steps has no type to be read as; set it in the config file'),
  (['--config.batch_size'], 'missing value for flag --config.batch_size'),
  (['--wrokdir=x'], "unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
  (['--act=dance'], 'flag --act=dance: value should be one of <show|refuse|break|wait|status>'),
  (['workdir=x'], "unexpected argument 'workdir=x': every option is written --name=value"),
  (['--act=refuse'], 'batch_size is 7: expected a multiple of 8'),
]


@pytest.mark.parametrize(('arguments', 'said'), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line_and_status_2(folder, arguments, said):
  status, out, err = finish(folder, '--config=recipe.py', '--workdir=w', *arguments)
  assert (status, out) == (2, '')
  assert err.startswith('error: ') and said in err
  assert err.count('\n') == 1 and err.endswith('\n')


CONFIG_MISTAKES = [
  (['--config=recip.py'], "there is no config file recip.py; did you mean 'recipe.py'?"),
  (['--config=recip.py:smoke', '--config.batch_size=3'], "did you mean 'recipe.py'?"),
  (['--config=recipe.py:refuse'], 'error: unknown argument of the recipe\n'),
  (['--config=recipe.py:refuse', '--config.batch_size=3'], 'unknown argument of the recipe'),
  (['--config=recipe.py:open'], 'the config file failed: [Errno 2] No such file or directory'),
  (['--config.batch_size=3'], '--config.batch_size needs --config=FILE before it'),
  (['--config.batch_size=3', '--config=recipe.py'], 'before a value for --config was specified'),
]


@pytest.mark.parametrize(('arguments', 'said'), CONFIG_MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_about_the_config_file(folder, arguments, said):
  status, _, err = finish(folder, '--workdir=w', *arguments)
  assert status == 2
  assert err.startswith('error: ') and said in err and err.count('\n') == 1


def test_a_required_flag_is_asked_for(folder):
  assert finish(folder) == (2, '', 'error: --workdir is required; --help lists the flags\n')


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--act=break'], "KeyError: 'a defect'"),
    (['--config=recipe.py:break'], 'ValueError: a defect of the recipe'),
    (['--config=recipe.py:break', '--config.batch_size=3'], 'ValueError: a defect of the recipe'),
  ],
)
def test_defects_keep_their_traceback(folder, arguments, said):
  status, _, err = finish(folder, '--workdir=w', *arguments)
  assert status == 1
  assert 'Traceback' in err and said in err


def test_help_helps(folder):
  status, out, err = finish(folder, '--help')
  assert (status, err) == (0, '')
  for words in ('Does what --act says', '--config', '--workdir', 'Where to do it.'):
    assert words in out


def test_main_gives_the_status(folder):
  assert finish(folder, '--workdir=w', '--act=status')[0] == 5


def test_an_interrupt_is_130(folder):
  process = start(folder, '--workdir=w', '--act=wait')
  assert process.stdout.readline() == 'waiting\n'
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, 'interrupted\n')


def test_folding_keeps_spaces_within_lines():
  assert cli.one_line('a  b:\n    c\r\n\nd\n') == 'a  b: c d'
