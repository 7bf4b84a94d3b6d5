"""The import law of the house (docs/architecture.md), read from the syntax tree of every file.

Rooms are the folders and single files of folk_jax/. A room without a law below is a violation, so
that whoever builds one decides what it may know.
"""

import ast
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 400
PACKAGE = 'folk_jax'

# A room -> the rooms of ours it may import, beside itself, `errors` and the bare package.
ANY = frozenset({'*'})
_METHOD = frozenset({'signal', 'models', 'schedules'})
LAW = {
  '__init__': frozenset(),
  'errors': frozenset(),
  'signal': frozenset(),
  'schedules': frozenset(),
  'checkpoint': frozenset(),
  'data': frozenset(),
  'config': frozenset(),
  'cli': frozenset(),
  'models': frozenset({'signal'}),
  'objectives': _METHOD,
  'train': _METHOD | {'objectives', 'checkpoint', 'interop'},
  'evals': _METHOD | {'objectives', 'checkpoint'},
  'interop': frozenset({'models'}),
  'report': _METHOD | {'objectives', 'evals', 'data'},
  'compiled': frozenset(),
  'distributed': frozenset(),
}
# The only files that join rooms, and the only ones that know how a command starts and ends.
ENTRIES = {
  'main.py',
  'export.py',
  'dryrun.py',
  'replay.py',
  'report/__main__.py',
  'data/prepare.py',
}
# The loop is four files: what a run is made of, its folder, its evaluation, and the loop itself.
JOINERS = ENTRIES | {
  'evaluate.py',
  'suite.py',
  'compiled/step.py',
  'report/of_run.py',
  'report/saved.py',
  'train/loop.py',
  'train/run.py',
  'train/evaluation.py',
  'train/workdir.py',
}

# Third parties: who may import them, as folders (with a slash) or files of folk_jax/.
OWNERS = {
  'orbax': ('checkpoint/',),
  'flax': ('models/',),
  # A dataclass that is a pytree, and nothing of Flax's modules.
  'flax.struct': ('models/', 'objectives/', 'train/'),
  # Below the loop, rooms take plain arguments and frozen dataclasses.
  'ml_collections': ('config.py', 'cli.py', *sorted(JOINERS)),
  'tensorflow': ('data/',),
  'tensorflow_datasets': ('data/',),
  'grain': ('data/',),
}
# What signal may import beside the standard library.
SIGNAL_THIRD_PARTIES = {'jax', 'numpy', 'chex'}
# All of these import jax, in data workers too.
JAX_FAMILY = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex'}
# Extras: a plain installation lacks them, so no module may need them to be imported.
OPTIONAL = {'torch', 'torchvision', 'timm', 'tensorflow', 'wandb'}


def _imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str, bool]]:
  """Yields (line, dotted name, whether at module level) for each import of a file in `package`.

  `from a import b` gives a.b: b may be a module, and where it isn't, a.b still names its room.
  """
  inside_functions = {
    id(node)
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    top = id(node) not in inside_functions
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name, top
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      parts = [*base, *([node.module] if node.module else [])]
      for alias in node.names:
        yield node.lineno, '.'.join([*parts, alias.name]), top


def _is(name: str, *modules: str) -> bool:
  return any(name == module or name.startswith(f'{module}.') for module in modules)


def _package_violations(file: str, name: str, top: bool) -> Iterator[str]:
  """What is wrong with the file folk_jax/<file> importing `name`."""
  room = file.split('/')[0].removesuffix('.py')
  first, *rest = name.split('.')

  if first == PACKAGE:
    target = rest[0] if rest else '__init__'
    if file in ENTRIES:
      return
    if target == 'cli':
      yield f'imports {name}: only the entry files do ({", ".join(sorted(ENTRIES))})'
    elif file not in JOINERS:
      allowed = LAW.get(room, frozenset()) | {room, 'errors', '__init__', '__version__'}
      if target not in allowed:
        yield f'imports {name}: {room} may import {", ".join(sorted(allowed))} of ours'
    elif f'{target}.py' in ENTRIES:
      yield f'imports {name}: nobody imports an entry file'
    return

  if room == 'signal' and first not in SIGNAL_THIRD_PARTIES | sys.stdlib_module_names:
    yield f'imports {name}: signal imports {", ".join(sorted(SIGNAL_THIRD_PARTIES))} only'
  if (room in {'data', 'config', 'cli', 'errors'}) and first in JAX_FAMILY:
    yield f'imports {name}: {room} never imports jax, itself or through another package'
  if file == '__init__.py' and first not in sys.stdlib_module_names:
    yield f'imports {name}: importing the package imports nothing else'
  if top and first in OPTIONAL:
    yield f'imports {name} at module level: it is an extra, so import it inside a function'
  owned = max((module for module in OWNERS if _is(name, module)), key=len, default=None)
  if owned:
    owners = OWNERS[owned]
    if not any(file == owner or owner.endswith('/') and file.startswith(owner) for owner in owners):
      yield f'imports {name}: only {", ".join(owners)} import {owned}'


def _config_get_calls(tree: ast.Module) -> Iterator[int]:
  """Yields the lines that call `config.get(...)` or `config.a.b.get(...)`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      holder = node.func.value
      names = {sub.attr for sub in ast.walk(holder) if isinstance(sub, ast.Attribute)}
      names |= {sub.id for sub in ast.walk(holder) if isinstance(sub, ast.Name)}
      if node.func.attr == 'get' and names & {'config', 'cfg'}:
        yield node.lineno


def violations(root: pathlib.Path) -> list[str]:
  """Every breach of the law in the checkout `root`, as 'path:line: what'."""
  found = []
  for folder in (PACKAGE, 'configs', 'benchmarks', 'tests'):
    for path in sorted((root / folder).rglob('*.py')):
      where = path.relative_to(root).as_posix()
      source = path.read_text(encoding='utf-8')
      tree = ast.parse(source, filename=where)
      lines = source.count('\n')
      if lines > MAX_LINES:
        found.append(f'{where}: {lines} lines; past {MAX_LINES} a file is split')
      if path.stem in {'utils', 'util'}:
        found.append(f'{where}: name it for what it does')
      found += [
        f'{where}:{line}: config.get(...): read config.x, so that a typo is an error'
        for line in _config_get_calls(tree)
      ]
      if folder == PACKAGE:
        file = path.relative_to(root / PACKAGE).as_posix()
        room = file.split('/')[0].removesuffix('.py')
        if room not in LAW and file not in JOINERS:
          found.append(f'{where}: the room {room} has no law in tests/test_architecture.py')
        package = path.relative_to(root).parent.parts
        for line, name, top in _imports(tree, package):
          found += [f'{where}:{line}: {what}' for what in _package_violations(file, name, top)]
      elif folder == 'configs':
        found += [
          f'{where}:{line}: imports {name}: a recipe imports {PACKAGE}.config, ml_collections only'
          for line, name, _ in _imports(tree, ('configs',))
          if not _is(name, f'{PACKAGE}.config', 'ml_collections')
        ]
  return found


def test_the_checkout_keeps_the_law():
  assert violations(ROOT) == []


@pytest.mark.parametrize(
  ('file', 'source', 'complaint'),
  [
    ('folk_jax/signal/a.py', 'import optax', 'signal imports'),
    ('folk_jax/signal/a.py', 'from folk_jax import models', 'signal may import'),
    ('folk_jax/signal/a.py', 'from ..models import vit', 'signal may import'),
    ('folk_jax/signal/a.py', 'def f():\n  from folk_jax.models import vit', 'signal may import'),
    ('folk_jax/schedules.py', 'from folk_jax import signal', 'schedules may import'),
    ('folk_jax/checkpoint/a.py', 'import folk_jax.train.state', 'checkpoint may import'),
    ('folk_jax/models/a.py', 'from folk_jax.objectives import base', 'models may import'),
    ('folk_jax/objectives/a.py', 'from folk_jax.train import step', 'objectives may import'),
    ('folk_jax/data/a.py', 'from folk_jax import signal', 'data may import'),
    ('folk_jax/data/a.py', 'import jax.numpy as jnp', 'never imports jax'),
    ('folk_jax/data/a.py', 'def f():\n  import chex', 'never imports jax'),
    ('folk_jax/evals/a.py', 'from folk_jax.train.state import x', 'evals may import'),
    ('folk_jax/evals/a.py', 'from folk_jax import data', 'evals may import'),
    ('folk_jax/interop/a.py', 'import folk_jax.train', 'interop may import'),
    ('folk_jax/report/a.py', 'import folk_jax.train', 'report may import'),
    ('folk_jax/compiled/a.py', 'from folk_jax.train import run', 'compiled may import'),
    ('folk_jax/train/step.py', 'from folk_jax import data', 'train may import'),
    ('folk_jax/train/loop.py', 'import folk_jax.main', 'nobody imports an entry file'),
    ('folk_jax/train/step.py', 'from folk_jax import config', 'train may import'),
    ('folk_jax/models/a.py', 'from folk_jax import cli', 'only the entry files'),
    ('folk_jax/models/a.py', 'import ml_collections', 'import ml_collections'),
    ('folk_jax/train/state.py', 'import orbax.checkpoint as ocp', 'import orbax'),
    ('folk_jax/train/step.py', 'from flax import linen as nn', 'import flax'),
    ('folk_jax/evals/a.py', 'from flax import struct', 'import flax.struct'),
    ('folk_jax/interop/a.py', 'import torch', 'it is an extra'),
    ('folk_jax/train/loop.py', 'import grain', 'import grain'),
    ('folk_jax/__init__.py', 'import jax', 'nothing else'),
    ('folk_jax/attic/a.py', '', 'has no law'),
    ('folk_jax/train/loop.py', 'x = 1\ny = self.config.get("b", 1)', ':2: config.get'),
    ('folk_jax/main.py', 'x = config.model.get("a")', ':1: config.get'),
    ('folk_jax/models/utils.py', '', 'name it'),
    ('folk_jax/models/a.py', '\n' * 401, '401 lines'),
    ('configs/a.py', 'import jax', 'a recipe imports'),
    ('configs/a.py', 'from folk_jax import models', 'a recipe imports'),
  ],
)
def test_a_breach_is_reported_once(file, source, complaint, tmp_path):
  path = tmp_path / file
  path.parent.mkdir(parents=True)
  path.write_text(source, encoding='utf-8')
  (reported,) = violations(tmp_path)
  assert reported.startswith(file)
  assert complaint in reported


@pytest.mark.parametrize(
  ('file', 'source'),
  [
    ('folk_jax/signal/a.py', 'import math\nimport jax\nfrom folk_jax.errors import UserError'),
    ('folk_jax/objectives/a.py', 'from flax import struct\nfrom . import losses'),
    ('folk_jax/train/loop.py', 'from folk_jax import data, evals, models, checkpoint'),
    ('folk_jax/main.py', 'from folk_jax import cli, config\nfrom folk_jax.train import loop'),
    ('folk_jax/data/prepare.py', 'from folk_jax import cli\nimport grain'),
    ('folk_jax/interop/a.py', 'def f():\n  import torch'),
    ('folk_jax/models/a.py', 'x = {}.get("a")'),
    ('configs/a.py', 'import ml_collections\nfrom folk_jax import config'),
  ],
)
def test_what_the_law_allows_is_not_reported(file, source, tmp_path):
  path = tmp_path / file
  path.parent.mkdir(parents=True)
  path.write_text(source, encoding='utf-8')
  assert violations(tmp_path) == []


# Run in a fresh process: prints, as JSON, the heavy modules that each statement brought along.
_PROBE = """
import importlib, json, runpy, sys
heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex', 'tensorflow', 'torch', *sys.argv[2:]}
brought = {}
for target in json.loads(sys.argv[1]):
  if target.endswith('.py'):
    get_config = runpy.run_path(target)['get_config']
    get_config()
    get_config('smoke')
  else:
    importlib.import_module(target)
  found = sorted(heavy & set(sys.modules))
  if found:
    brought[target] = found
    break
print(json.dumps(brought))
"""


def _brought_along(targets: list[str], *more: str) -> dict[str, list[str]]:
  done = subprocess.run(
    [sys.executable, '-c', _PROBE, json.dumps(targets), *more],
    cwd=ROOT,
    env={'PYTHONPATH': str(ROOT), 'PATH': ''},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_the_package_alone_imports_nothing_heavy():
  assert _brought_along([PACKAGE], 'numpy', 'absl', 'ml_collections') == {}


def test_recipes_load_without_jax_or_any_data_library():
  recipes = sorted(str(path) for path in (ROOT / 'configs').glob('*.py'))
  assert recipes
  assert _brought_along(recipes, 'numpy', 'grain', 'tensorflow_datasets', 'cv2') == {}


def test_data_runs_without_jax():
  """Also through third parties: importing jax in a loader's worker costs seconds and a gigabyte."""
  rooms = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for path in (ROOT / PACKAGE / 'data').glob('*.py')
  )
  assert rooms
  assert _brought_along(rooms) == {}
