"""Collapse and losses that stand out: real outputs of collapsed networks, what is said, what is kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from folk_jax.objectives import losses
from folk_jax.objectives.statistics import feature_statistics
from folk_jax.train.guard import Guard, GuardSettings
from folk_jax.train.spikes import Spikes

SETTINGS = GuardSettings(
  on_nonfinite='skip',
  max_skipped=10,
  max_skipped_share=0.01,
  on_collapse='warn',
  collapse_entropy=0.99,
  collapse_mean_entropy=0.05,
  collapse_rank=1.05,
  collapse_std=0.02,
  patience=2,
  spike_deviations=12.0,
  spike_window=64,
)
IMAGES, OUTPUTS, WIDTH = 64, 512, 32


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(
    logging, 'warning', lambda text, *args: said.append(text % args if args else text)
  )
  return said


def found_in(feature_BD, logits_BVK, centre_K=None):
  """What a step would log of a teacher with these features and logits, at DINO's temperatures."""
  centre_K = jnp.zeros(OUTPUTS) if centre_K is None else centre_K
  alive = losses.distillation_statistics(logits_BVK, logits_BVK, centre_K, 0.1, 0.04)
  values = {**alive, **feature_statistics(feature_BD), 'loss': 1.0, 'nonfinite': 0.0}
  return {name: float(value) for name, value in values.items()}


def healthy():
  keys = jax.random.split(jax.random.key(0))
  feature_BD = jax.random.normal(keys[0], (IMAGES, WIDTH))
  return feature_BD, jax.random.normal(keys[1], (IMAGES, 2, OUTPUTS))


def test_health_is_no_news(warnings):
  guard = Guard(SETTINGS)
  for step in (1, 2, 3):
    guard.check(step, found_in(*healthy()))
  assert not warnings


def test_a_teacher_whose_centre_has_caught_up_with_it_is_uniform(warnings):
  """All outputs the same for all images, which a centre takes away whole: nothing is left but 1 / K."""
  feature_BD, logits_BVK = healthy()
  same_BVK = jnp.broadcast_to(logits_BVK[:1, :1], logits_BVK.shape) + 1e-4 * logits_BVK
  guard = Guard(SETTINGS)
  for step in (1, 2):
    guard.check(step, found_in(feature_BD, same_BVK, logits_BVK[0, 0]))
  (said,) = warnings
  assert 'collapse at step 2: the teacher is uniform (entropy / ln K = 1.0000' in said
  assert 'teacher_temperature' in said


def test_a_teacher_without_a_centre_that_gives_one_output_is_the_other_collapse(warnings):
  """As before, and no centre to take it away: sharpened, it is one prototype. Its own entropy is low, as in health."""
  feature_BD, logits_BVK = healthy()
  one_BVK = logits_BVK.at[..., 3].add(10.0)
  guard = Guard(SETTINGS)
  for step in (1, 2):
    guard.check(step, found_in(feature_BD, one_BVK))
  (said,) = warnings
  assert 'collapse at step 2: the teacher gives all images one output' in said
  assert 'agree on 100% of the views' in said and 'lower objective.centre_momentum' in said


@pytest.mark.parametrize('method', ['with a teacher', 'reconstruction only'])
def test_constant_features_are_named_with_and_without_a_teacher(warnings, method):
  feature_BD, logits_BVK = healthy()
  constant_BD = feature_BD[:1] + 1e-3 * feature_BD
  metrics = found_in(constant_BD, logits_BVK)
  if method == 'reconstruction only':
    metrics = {
      k: v for k, v in metrics.items() if not k.startswith(('teacher', 'student', 'agreement'))
    }
  guard = Guard(SETTINGS)
  for step in (1, 2):
    guard.check(step, metrics)
  (said,) = warnings
  assert 'all images share one feature (spread 0.0' in said


def test_features_of_two_opposite_values_are_a_single_direction(warnings):
  feature_BD, logits_BVK = healthy()
  spread_BD = jnp.where(jnp.arange(IMAGES)[:, None] % 2, 1.0, -1.0) * feature_BD[:1]
  guard = Guard(SETTINGS)
  for step in (3, 4):
    guard.check(step, found_in(spread_BD, logits_BVK))
  (said,) = warnings
  assert 'one direction (effective rank 1.000' in said


def make_spikes(folder, **changes):
  settings = {'deviations': 12.0, 'window': 64, 'rate': lambda step: step / 1000} | changes
  return Spikes(workdir=str(folder), **settings)


def noise(count, seed=0):
  return 5.0 + 0.05 * np.random.default_rng(seed).standard_normal(count)


def test_a_spike_is_written_with_its_images_and_said_once(tmp_path, warnings):
  spikes = make_spikes(tmp_path)
  for step, loss in enumerate(noise(100), 1):
    assert not spikes.offer(step, loss, 1.0, np.arange(4))
  assert spikes.offer(101, 7.0, np.inf, np.array([11, 12, 13]))
  assert spikes.offer(102, 8.0, 2.0, np.array([14]))  # It stands out beside the one before.
  assert not spikes.offer(103, 5.0, 1.0, np.arange(4))
  first, second = map(json.loads, (tmp_path / 'spikes.jsonl').read_text().splitlines())
  assert (first['step'], first['loss'], first['indices']) == (101, 7.0, [11, 12, 13])
  assert (first['learning_rate'], first['gradient_norm'], second['step']) == (0.1, 'inf', 102)
  # 0.05 of noise is a deviation of 0.034: 2 above are some 60 of them.
  assert 40 < first['deviations'] < 90
  assert len(warnings) == 1 and 'the loss of step 101, 7,' in warnings[0]


@pytest.mark.parametrize(
  'losses_', [noise(300), np.linspace(1, 9, 300), np.linspace(9, 1, 300), np.full(300, 2.0)]
)
def test_noise_and_steady_change_are_no_spikes(tmp_path, losses_):
  spikes = make_spikes(tmp_path)
  assert not any(spikes.offer(step, float(loss), 1.0, []) for step, loss in enumerate(losses_))
  assert not (tmp_path / 'spikes.jsonl').exists()


def test_a_loss_that_stays_where_it_jumped_is_taken_for_what_it_is(tmp_path, warnings):
  spikes = make_spikes(tmp_path)
  found = [
    spikes.offer(step, float(loss), 1.0, [])
    for step, loss in enumerate(np.concatenate([noise(64), 2 + noise(200, seed=1)]), 1)
  ]
  assert 20 < sum(found) <= 32 and not any(found[64 + 32 :])


def test_a_resumed_run_judges_by_the_losses_before_and_drops_the_lines_it_does_again(tmp_path):
  whole, first = make_spikes(tmp_path / 'whole'), make_spikes(tmp_path / 'first')
  values = [*noise(80), 7.0, 5.0, 7.5, *noise(20, seed=2), 9.0]
  for step, loss in enumerate(values, 1):
    whole.offer(step, loss, 1.0, [step])
  for step, loss in enumerate(values[:90], 1):
    first.offer(step, loss, 1.0, [step])
    if step == 82:
      kept = json.loads(json.dumps(first.kept()))
  resumed = make_spikes(tmp_path / 'first', start_step=82)
  resumed.restore(kept)
  for step, loss in enumerate(values[82:], 83):
    resumed.offer(step, loss, 1.0, [step])
  lines = [(tmp_path / name / 'spikes.jsonl').read_text() for name in ('whole', 'first')]
  assert lines[0] == lines[1] and len(lines[0].splitlines()) == 3


def test_a_disk_that_is_full_costs_the_log_and_not_the_run(tmp_path, warnings):
  (tmp_path / 'file').write_text('')
  spikes = make_spikes(tmp_path / 'file')
  for step, loss in enumerate([*noise(50), 9.0]):
    spikes.offer(step, loss, 1.0, [])
  assert any('cannot write' in said for said in warnings)
