"""Which steps are traced, and that the trace is there to be opened."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from folk_jax.train.profile import Profile


@pytest.mark.parametrize(
  'steps, start, total, traced',
  [
    (0, 0, 100, []),
    (3, 0, 100, [11, 12, 13]),
    (2, 40, 100, [51, 52]),
    (3, 0, 6, [4, 5, 6]),  # A run too short for the warm-up is traced at its end,
    (9, 2, 6, [3, 4, 5, 6]),  # and one shorter than the trace as a whole.
  ],
)
def test_steps_are_traced_after_the_warm_up(tmp_path, steps, start, total, traced):
  assert list(Profile(steps, str(tmp_path), start, total).steps) == traced


def run(profile, total):
  compute = jax.jit(lambda x: x @ x)
  written = []
  for step in range(1, total + 1):
    if profile.begins(step):
      profile.start()
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      value = compute(jnp.ones((64, 64)))
    if profile.ends(step):
      jax.block_until_ready(value)
      written.append((step, profile.stop()))
  return written


def test_trace_names_the_steps(tmp_path):
  assert run(Profile(2, str(tmp_path), 0, 4), 4) == [(4, True)]
  (file,) = (tmp_path / 'profile').rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(file.read_bytes()))['traceEvents']
  assert sum(event.get('name') == 'train' for event in events) == 2
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path, caplog):
  (tmp_path / 'profile').write_text('in the way')
  assert run(Profile(1, str(tmp_path), 0, 2), 2) == [(2, False)]
  assert 'could not be written' in caplog.text


def test_processes_of_one_workdir_trace_into_folders_of_their_own(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert Profile(1, str(tmp_path), 0, 2).directory == str(tmp_path / 'profile' / 'process_1')
