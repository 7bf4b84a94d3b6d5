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


def test_trace_names_the_steps(tmp_path):
  profile = Profile(2, str(tmp_path), 0, 4)
  compute = jax.jit(lambda x: x @ x)
  ended = []
  for step in range(1, 5):
    profile.before(step)
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      value = compute(jnp.ones((64, 64)))
    ended.append(profile.after(step, value))
  assert ended == [False, False, False, True]
  (file,) = (tmp_path / 'profile').rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(file.read_bytes()))['traceEvents']
  assert sum(event.get('name') == 'train' for event in events) == 2
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
