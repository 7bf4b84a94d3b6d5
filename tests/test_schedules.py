"""Schedules against DINO's and timm's numbers, hand-worked values and float64 twins."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from folk_jax import schedules

GOLDEN = Path(__file__).parent / 'golden' / 'schedules.npz'
# float32 arithmetic of about ten operations on numbers without cancellation: a few times 6e-8 each.
RELATIVE = 1e-6


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN) as arrays:
    return dict(arrays)


def values(schedule, steps):
  return np.asarray(jax.vmap(schedule)(jnp.asarray(steps, jnp.int32)))


@pytest.mark.parametrize('name', ['lr', 'lr_start', 'wd', 'momentum'])
def test_dino_convention_matches_the_official_numbers(golden, name):
  epochs, per_epoch, _ = golden['cfg'].tolist()
  base, final, warmup_epochs, start = golden[f'dino.{name}.args'].tolist()
  schedule = schedules.warmup_cosine(
    base, final, int(warmup_epochs) * per_epoch, epochs * per_epoch, start, 'dino'
  )
  expected = golden[f'dino.{name}']
  np.testing.assert_allclose(values(schedule, np.arange(len(expected))), expected, RELATIVE, 0)


@pytest.mark.parametrize('name', ['wd', 'momentum'])
def test_plain_cosine_matches_the_official_numbers(golden, name):
  base, final, _, _ = golden[f'dino.{name}.args'].tolist()
  expected = golden[f'dino.{name}']
  schedule = schedules.cosine(base, final, len(expected))
  np.testing.assert_allclose(values(schedule, np.arange(len(expected))), expected, RELATIVE, 0)


def test_timm_convention_matches_the_official_numbers(golden):
  base, final, start, warmup, total = golden['mfm.lr.args'].tolist()
  schedule = schedules.warmup_cosine(base, final, int(warmup), int(total), start, 'timm')
  expected = golden['mfm.lr']
  np.testing.assert_allclose(values(schedule, np.arange(len(expected))), expected, RELATIVE, 0)


def test_teacher_temperature_passes_through_dinos_epochs():
  # DINO: linspace(0.04, 0.07, 3 epochs), then 0.07; dino_ibot_loss.npz holds 0.04 and 0.055.
  schedule = schedules.linear_then_constant(0.04, 0.07, 2)
  np.testing.assert_allclose(
    [schedule(step) for step in range(4)], [0.04, 0.055, 0.07, 0.07], RELATIVE
  )


def test_cosine_by_hand():
  # Halfway is the mean; a third of the way is 1/4 down, two thirds 3/4 down.
  schedule = schedules.cosine(5.0, 1.0, 6)
  assert [schedule(step) for step in (0, 3, 6)] == [5.0, 3.0, 1.0]
  np.testing.assert_allclose([schedule(2), schedule(4)], [4.0, 2.0], RELATIVE)


def test_the_two_conventions_differ_at_the_peak():
  dino = values(schedules.warmup_cosine(1.0, 0.0, 4, 12, convention='dino'), range(12))
  timm = values(schedules.warmup_cosine(1.0, 0.0, 4, 12, convention='timm'), range(12))
  np.testing.assert_allclose(dino[:4], [0, 1 / 3, 2 / 3, 1], RELATIVE)
  assert dino[4] == 1.0  # The peak is used twice.
  np.testing.assert_allclose(
    timm[:5], [0, 0.25, 0.5, 0.75, 0.75], RELATIVE
  )  # The drop: cos(60 degrees).
  assert (dino[5:] > timm[5:]).all() and timm[-1] > 0


def test_a_warmup_of_one_step_starts_at_start():
  schedule = schedules.warmup_cosine(1.0, 0.0, 1, 5, start=0.25)
  assert schedule(0) == 0.25 and schedule(1) == 1.0


@pytest.mark.parametrize(
  'schedule, final',
  [
    (schedules.cosine(0.04, 0.4, 7), 0.4),
    (schedules.linear_then_constant(0.04, 0.07, 7), 0.07),
    (schedules.linear_then_constant(0.04, 0.07, 0), 0.07),
    (schedules.warmup_cosine(0.3, 0.1, 2, 7), 0.1),
    (schedules.warmup_cosine(0.3, 0.1, 2, 7, convention='timm'), 0.1),
  ],
)
def test_the_final_value_is_exact_and_kept(schedule, final):
  assert (values(schedule, [7, 8, 1000]) == np.float32(final)).all()


@pytest.mark.parametrize('value', [0.05, 0.996, 1e-6])
def test_equal_ends_give_a_constant_without_rounding(value):
  steps = np.arange(101)
  assert (values(schedules.cosine(value, value, 100), steps) == np.float32(value)).all()
  assert (
    values(schedules.linear_then_constant(value, value, 50), steps) == np.float32(value)
  ).all()


@pytest.mark.parametrize('total', [1_000_000, 40_000_000])
def test_long_runs_keep_their_digits(total):
  # Relative to the value, also just before the end, where (1 + cos) / 2 in float32 has no digit
  # left and, past 2^24 steps, neighbouring steps are one float32.
  warmup = total // 40
  steps = np.unique(
    np.r_[
      0, 1, warmup - 1, warmup, np.geomspace(1, total - 1, 50), total - np.geomspace(1, total, 50)
    ]
  ).astype(np.int64)
  share = np.clip((steps - warmup) / (total - warmup), 0, None)
  after = 1e-9 + (1.0 - 1e-9) * np.sin(np.pi / 2 * (1 - share)) ** 2
  expected = np.where(steps < warmup, steps / (warmup - 1), after)
  schedule = schedules.warmup_cosine(1.0, 1e-9, warmup, total)
  np.testing.assert_allclose(values(schedule, steps), expected, RELATIVE, 0)


def test_traced_and_python_steps_agree_and_give_float32_scalars():
  schedule = schedules.warmup_cosine(1e-3, 1e-6, 3, 20)
  traced = jax.jit(schedule)
  for step in (0, 2, 3, 11, 20):
    eager, compiled = schedule(step), traced(jnp.int32(step))
    assert eager.dtype == compiled.dtype == jnp.float32
    assert eager.shape == compiled.shape == ()
    # The compiler may contract a product and a sum.
    np.testing.assert_allclose(eager, compiled, RELATIVE)


def test_a_cosine_never_turns_back():
  fall = values(schedules.cosine(1.0, 0.0, 5000), range(5001))
  assert (np.diff(fall) <= 0).all()


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda: schedules.cosine(0.1, math.nan, 10), 'final is nan'),
    (lambda: schedules.cosine(0.1, 0.0, 0), 'total_steps is 0'),
    (lambda: schedules.cosine(0.1, 0.0, 10.0), 'total_steps is 10.0'),
    (lambda: schedules.linear_then_constant(math.inf, 0.0, 1), 'start is inf'),
    (lambda: schedules.linear_then_constant(0.1, 0.0, -1), 'ramp_steps is -1'),
    (lambda: schedules.warmup_cosine(0.1, 0.0, 10, 10), 'the warm-up must end'),
    (lambda: schedules.warmup_cosine(0.1, 0.0, -1, 10), 'warmup_steps is -1'),
    (lambda: schedules.warmup_cosine(0.1, 0.0, 1, 10, convention='mfm'), 'one of dino, timm'),
  ],
)
def test_bad_arguments_are_refused_in_words(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_a_fractional_step_is_refused():
  with pytest.raises(TypeError, match='whole optimiser steps'):
    schedules.cosine(1.0, 0.0, 10)(jnp.float32(3.5))
