"""The guard: what it calls trouble, after how long, what it says, and what it does."""

import dataclasses
import math

import pytest
from absl import logging

from folk_jax.errors import UserError
from folk_jax.train.guard import Guard, GuardSettings, RunStopped

STOPS = GuardSettings(
  on_nonfinite='stop', on_collapse='stop', collapse_entropy=0.99, collapse_rank=1.05, patience=3
)
WARNS = dataclasses.replace(STOPS, on_nonfinite='warn', on_collapse='warn')
HEALTHY = {
  'loss': 5.0,
  'gradient_norm': 1.0,
  'nonfinite': 0.0,
  'teacher_entropy': 0.6,
  'effective_rank': 9.0,
}
UNIFORM = HEALTHY | {'teacher_entropy': 0.9999}
FLAT = HEALTHY | {'effective_rank': 1.001}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  said: list[str] = []
  monkeypatch.setattr(logging, 'warning', said.append)
  return said


def test_health_is_no_news(warnings: list[str]):
  guard = Guard(STOPS)
  for step in range(20):
    guard.check(step, HEALTHY)
  assert not warnings


@pytest.mark.parametrize(
  'metrics, words',
  [
    (UNIFORM, ['the teacher is uniform', '0.9999 for 3', 'teacher_temperature', 'centre_momentum']),
    (FLAT, ['one direction', 'rank 1.001 for 3', 'learning_rate', 'centre_momentum']),
  ],
)
def test_a_collapse_stops_the_run_after_as_many_log_points_as_patience_says(metrics, words):
  guard = Guard(STOPS)
  guard.check(10, metrics)
  guard.check(20, metrics)
  with pytest.raises(RunStopped, match='collapse at step 30: ') as stopped:
    guard.check(30, metrics)
  for word in words:
    assert word in str(stopped.value)


def test_one_healthy_log_point_ends_a_streak():
  guard = Guard(STOPS)
  for step, metrics in enumerate([UNIFORM, UNIFORM, HEALTHY, UNIFORM, UNIFORM, FLAT, FLAT]):
    guard.check(step, metrics)
  with pytest.raises(RunStopped, match='one direction'):
    guard.check(7, FLAT)


def test_a_warning_is_said_once_a_streak(warnings: list[str]):
  guard = Guard(WARNS)
  for step in range(10):
    guard.check(step, UNIFORM)
  assert len(warnings) == 1 and 'collapse at step 2:' in warnings[0]
  guard.check(10, HEALTHY)
  for step in range(11, 15):
    guard.check(step, UNIFORM)
  assert len(warnings) == 2 and 'collapse at step 13:' in warnings[1]


def test_the_thresholds_themselves_are_healthy(warnings: list[str]):
  guard = Guard(STOPS)
  for step in range(5):
    guard.check(step, HEALTHY | {'teacher_entropy': 0.99, 'effective_rank': 1.05})
  assert not warnings


def test_objectives_without_a_teacher_are_watched_for_what_they_report(warnings: list[str]):
  guard = Guard(STOPS)
  for step in range(5):
    guard.check(step, {'loss': 1.0, 'nonfinite': 0.0})
  assert not warnings


@pytest.mark.parametrize(
  'metrics', [{'nonfinite': 1.0}, {'loss': math.nan}, {'loss': math.inf, 'nonfinite': 1.0}]
)
def test_the_first_number_that_is_not_finite_stops_the_run(metrics):
  with pytest.raises(RunStopped, match='non-finite numbers at step 7 .*loss .*gradient norm 1.0'):
    Guard(STOPS).check(7, HEALTHY | metrics)
  # Also between log points, before a checkpoint is overwritten with it.
  with pytest.raises(RunStopped, match='non-finite numbers at step 7'):
    Guard(STOPS).check_finite(7, HEALTHY | metrics)


def test_a_run_that_is_to_go_on_is_warned_of_non_finite_numbers_once(warnings: list[str]):
  guard = Guard(WARNS)
  for step in range(4):
    guard.check(step, HEALTHY | {'nonfinite': 1.0})
  assert len(warnings) == 1 and 'non-finite numbers at step 0' in warnings[0]


def test_checks_between_log_points_neither_lengthen_nor_end_a_streak():
  guard = Guard(STOPS)
  for step in (10, 20):
    guard.check(step, UNIFORM)
    guard.check_finite(step, UNIFORM)
    guard.check_finite(step + 5, HEALTHY)
  with pytest.raises(RunStopped, match='collapse at step 30'):
    guard.check(30, UNIFORM)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('on_nonfinite', 'halt', "unknown config.guard.on_nonfinite 'halt'. Known: stop, warn."),
    ('on_collapse', 'Stop', "unknown config.guard.on_collapse 'Stop'. Known: stop, warn."),
    ('patience', 0, 'config.guard.patience is 0; it must be at least 1.'),
  ],
)
def test_settings_that_would_disarm_it_are_refused(field, value, message):
  with pytest.raises(UserError) as refused:
    dataclasses.replace(STOPS, **{field: value})
  assert str(refused.value) == message
