"""The scripts that benchmarks/gpu.sh runs start and write figures: a GPU's minutes are too few to find out there."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Flags of a short run, and the part of the JSON that is measured.
SMALL = {
  'step.py': ('--config=configs/vit_s.py:smoke --batches=2 --settings=xla:none --steps=1', 'rows'),
  'attention.py': ('--models=vit_s --batch=2 --tokens=17 --rounds=1', 'rows'),
  'filter.py': ('--batch=2 --size=32 --rounds=1', 'median_ms'),
  'peer.py': ('--quick --sides=ours', 'images_per_second'),
}


def run(script, *flags):
  command = [sys.executable, str(ROOT / 'benchmarks' / script), *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def numbers(value):
  if isinstance(value, dict | list):
    for inner in value.values() if isinstance(value, dict) else value:
      yield from numbers(inner)
  elif isinstance(value, float):
    yield value


@pytest.mark.parametrize('script', SMALL)
def test_a_script_of_the_gpu_set_measures_something(script, tmp_path):
  assert script in (ROOT / 'benchmarks' / 'gpu.sh').read_text(encoding='utf-8')
  out = tmp_path / 'found.json'
  flags, measured = SMALL[script]
  done = run(script, *flags.split(), f'--out={out}')
  assert done.returncode == 0, done.stderr[-2000:]
  found = list(numbers(json.loads(out.read_text(encoding='utf-8'))[measured]))
  assert found and max(found) > 0


def test_a_step_that_cannot_be_timed_is_no_success(tmp_path):
  out = tmp_path / 'found.json'
  done = run('step.py', '--config=configs/vit_s.py:smoke', '--settings=flash:none', f'--out={out}')
  assert done.returncode == 2 and not out.exists()
  assert 'flash' in done.stderr and 'no step could be timed' in done.stderr
