"""The same configuration and seed, twice: the same numbers."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'benchmarks' / 'faults'))

import children  # noqa: E402  # Programs are found where they are run from, and tests are no package.
import determinism  # noqa: E402


@pytest.mark.slow
def test_a_run_that_is_made_twice_and_another_seed(tmp_path, tmp_path_factory, monkeypatch):
  """One of benchmarks/faults/determinism.py's trials; it fails, too, where another seed changes nothing."""
  (tmp_path / 'cache').symlink_to(children.shared_cache(tmp_path_factory.getbasetemp()))
  monkeypatch.setattr(determinism, 'STEPS', children.TOTAL)
  assert determinism.trial(0, ('--config.checkpoint.every=0',), tmp_path, anew=False) == ''
