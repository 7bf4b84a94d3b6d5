"""The guard: what it calls trouble, after how long, what it says, and what it does."""

import dataclasses
import json
import math

import numpy as np
import pytest
from absl import logging

from folk_jax.errors import UserError
from folk_jax.train.guard import Guard, GuardSettings, RunStopped

STOPS = GuardSettings(
  on_nonfinite='stop',
  max_skipped=2,
  max_skipped_share=0.004,
  on_collapse='stop',
  collapse_entropy=0.99,
  collapse_mean_entropy=0.05,
  collapse_rank=1.05,
  collapse_std=0.02,
  patience=3,
  spike_deviations=0.0,
  spike_window=64,
)
GOES_ON = dataclasses.replace(STOPS, on_nonfinite='skip', on_collapse='warn')
HEALTHY = {
  'loss': 5.0,
  'gradient_norm': 1.0,
  'nonfinite': 0.0,
  'teacher_entropy': 0.6,
  'teacher_entropy_of_mean': 0.8,
  'agreement': 0.5,
  'feature_std': 0.4,
  'effective_rank': 9.0,
}
BAD = HEALTHY | {'loss': math.nan, 'nonfinite': 1.0}
UNIFORM = HEALTHY | {'teacher_entropy': 0.9999}
ONE_OUTPUT = HEALTHY | {'teacher_entropy_of_mean': 0.001, 'agreement': 1.0}
FLAT = HEALTHY | {'effective_rank': 1.001}
CONSTANT = {'loss': 1.0, 'nonfinite': 0.0, 'feature_std': 0.003, 'effective_rank': 0.0}


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
    (ONE_OUTPUT, ['one output', '0.0010', 'agree on 100%', 'lower objective.centre_momentum']),
    (CONSTANT, ['share one feature', 'spread 0.0030', 'data.path', 'learning_rate']),
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
  guard = Guard(GOES_ON)
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
    edges = {'teacher_entropy': 0.99, 'teacher_entropy_of_mean': 0.05}
    guard.check(step, HEALTHY | edges | {'effective_rank': 1.05, 'feature_std': 0.02})
  assert not warnings


def test_objectives_without_a_teacher_are_watched_for_what_they_report(warnings: list[str]):
  guard = Guard(STOPS)
  for step in range(5):
    guard.check(step, {'loss': 1.0, 'nonfinite': 0.0})
  assert not warnings


def launch(guard: Guard, metrics_by_step: list[dict[str, float]], first: int = 1) -> None:
  for step, metrics in enumerate(metrics_by_step, first):
    guard.launched(step, np.arange(3), metrics)


def test_a_step_is_read_four_steps_late_or_when_asked_for():
  guard = Guard(STOPS)
  launch(guard, [HEALTHY, BAD, HEALTHY, HEALTHY, HEALTHY])
  with pytest.raises(RunStopped, match='non-finite numbers at step 2 .*loss nan.*on_nonfinite'):
    guard.launched(6, np.arange(3), HEALTHY)
  guard = Guard(STOPS)
  launch(guard, [HEALTHY, BAD, HEALTHY])
  assert guard.settle(1)
  assert guard.skipped_by(3) == 1  # What is logged counts it, and what is checked after stops.
  with pytest.raises(RunStopped, match='non-finite numbers at step 2'):
    guard.check(3, HEALTHY)


def test_skipped_steps_are_counted_said_once_and_stop_the_run_past_as_many_in_a_row(warnings):
  guard = Guard(GOES_ON)
  launch(guard, [HEALTHY, BAD, BAD, HEALTHY, BAD, BAD])
  assert not guard.settle(6)
  assert guard.skipped == 4
  assert len(warnings) == 1 and 'non-finite numbers at step 2' in warnings[0]
  launch(guard, [BAD], first=7)
  with pytest.raises(RunStopped, match='step 7 .*3 steps in a row .*max_skipped.*learning_rate'):
    guard.settle(7)


def test_a_share_of_the_last_thousand_steps_stops_the_run():
  """Four in a thousand are allowed: a fifth within 1000 steps of the first stops it, a step later none does."""
  for last in (1000, 1001):
    guard = Guard(GOES_ON)
    bad_steps = {1, 200, 400, 600, last}
    launch(guard, [BAD if step in bad_steps else HEALTHY for step in range(1, last + 1)])
    if last == 1000:
      with pytest.raises(RunStopped, match='5 of the last 1000 steps were skipped'):
        guard.settle(last)
    else:
      assert not guard.settle(last)


def test_what_a_checkpoint_keeps_goes_on_as_if_nothing_had_been(warnings):
  first, second = Guard(GOES_ON), Guard(GOES_ON)
  launch(first, [HEALTHY, BAD, BAD])
  first.settle(3)
  first.check(3, UNIFORM)
  second.restore({'step': 3, 'guard': json.loads(json.dumps(first.kept()))})
  assert (second.skipped, second.kept()) == (2, first.kept())
  launch(second, [BAD], first=4)
  with pytest.raises(RunStopped, match='3 steps in a row'):
    second.settle(4)
  second = Guard(GOES_ON)
  second.restore({'step': 3})  # A checkpoint from before the guard was in it.
  assert second.skipped == 0


def test_the_message_says_which_network_and_which_part_of_the_loss(warnings):
  guard = Guard(GOES_ON)
  parts = {'loss_reconstruction': math.inf, 'loss_distillation': 3.0}
  norms = {'gradient_norm': math.nan, 'gradient_norm_backbone': math.nan}
  launch(guard, [BAD | parts | norms | {'gradient_norm_projection': 1.5}])
  guard.settle(1)
  (said,) = warnings
  for words in ('loss_reconstruction inf', 'gradient norm nan: backbone nan, projection 1.5'):
    assert words in said
  assert 'loss_distillation' not in said


def test_a_skipped_step_neither_lengthens_nor_ends_a_streak():
  guard = Guard(STOPS)
  for step in (10, 20):
    guard.check(step, UNIFORM)
    guard.check(step + 5, BAD)
  with pytest.raises(RunStopped, match='collapse at step 30'):
    guard.check(30, UNIFORM)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('on_nonfinite', 'warn', "unknown config.guard.on_nonfinite 'warn'. Known: skip, stop."),
    ('on_collapse', 'Stop', "unknown config.guard.on_collapse 'Stop'. Known: stop, warn."),
    ('max_skipped', -1, 'config.guard.max_skipped is -1; it must be at least 0.'),
    (
      'max_skipped_share',
      1.5,
      'config.guard.max_skipped_share is 1.5; it must be between 0 and 1.',
    ),
    ('spike_window', 1, 'config.guard.spike_window is 1; it must be at least 2.'),
    (
      'spike_deviations',
      -1.0,
      'config.guard.spike_deviations is -1.0; it must not be negative (0: none).',
    ),
    ('patience', 0, 'config.guard.patience is 0; it must be at least 1.'),
  ],
)
def test_settings_that_would_disarm_it_are_refused(field, value, message):
  with pytest.raises(UserError) as refused:
    dataclasses.replace(STOPS, **{field: value})
  assert str(refused.value) == message
