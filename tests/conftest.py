"""What every test shares: the CPU, full-precision products, reference numbers, many devices."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping

# Through the environment rather than jax.config, so that the tests' subprocesses inherit it, and
# tests of code that must not import jax stay free of it. A platform that the caller names is kept.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'highest'
# Most of the suite's time is LLVM's: at its lowest level models compile in two thirds of the time.
# XLA's own passes, which place the collectives, all run. Set it to 0 to test what users compile.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# And in less than half of that by the older of XLA's two ways from a fusion to LLVM's language, which jaxlib has up
# to 0.10: a later one ends a process that asks for it. A flag that the caller gives too comes after it, and so wins.
os.environ.setdefault('XLA_FLAGS', '')
if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  _OLDER = '--xla_cpu_use_fusion_emitters=false'
  os.environ['XLA_FLAGS'] = f'{_OLDER} {os.environ["XLA_FLAGS"]}'.strip()

import numpy as np
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Grain's workers read absl flags and die where nobody has parsed them.
flags.FLAGS.mark_as_parsed()


@functools.cache
def _support(name: str):
  """The module tests/support/<name>.py, by path: `tests` is no package that one could import."""
  spec = importlib.util.spec_from_file_location(name, ROOT / 'tests' / 'support' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='session')
def support() -> Callable[[str], object]:
  """`support(name)` gives the module tests/support/<name>.py."""
  return _support


def pytest_runtest_setup(item: pytest.Item) -> None:
  """Makes torchvision, and so timm, importable beside a CPU torch for tests that need them."""
  if item.get_closest_marker('parity'):
    _support('torchvision_schemas').define()


@functools.cache
def _load(name: str) -> Mapping[str, np.ndarray]:
  with np.load(ROOT / 'tests' / 'golden' / f'{name}.npz', allow_pickle=False) as archive:
    arrays = {key: archive[key] for key in archive.files}
  for array in arrays.values():
    array.setflags(write=False)
  return arrays


@pytest.fixture(scope='session')
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
  """`golden(name)` gives the read-only arrays of tests/golden/<name>.npz, by key."""
  return _load


@pytest.fixture(scope='session')
def run_with_devices() -> Callable[..., str]:
  """`run_with_devices(code_or_file, *arguments, devices=8, timeout=300)` gives what it printed.

  `code_or_file` is Python source (a str, dedented) or a script (a pathlib.Path). It runs in a
  process of its own, since the number of CPU devices is fixed when jax starts, and fails the test
  unless it exits 0.
  """

  def run(
    code_or_file: str | pathlib.Path, *arguments: str, devices: int = 8, timeout: float = 300
  ) -> str:
    if isinstance(code_or_file, pathlib.Path):
      program = [str(code_or_file)]
    else:
      program = ['-c', textwrap.dedent(code_or_file)]
    flag = f'--xla_force_host_platform_device_count={devices}'
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(
      [sys.executable, *program, *arguments],
      cwd=ROOT,
      env={**os.environ, 'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}', 'PYTHONPATH': path},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
    )
    if done.returncode != 0:
      pytest.fail(
        f'the process on {devices} devices exited with {done.returncode}\n'
        f'--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}',
        pytrace=False,
      )
    return done.stdout

  return run
