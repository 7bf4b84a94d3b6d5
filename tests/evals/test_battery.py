"""Which measures a classifier is put through, and what their results add up to."""

import dataclasses

import pytest

from folk_jax.errors import UserError
from folk_jax.evals import battery as batteries
from folk_jax.evals.battery import Battery
from folk_jax.evals.robustness import Attack, Corrupt

BATTERY = Battery(('fgsm', 'pgd'), 0.1, 4, 0.05, ('fog', 'snow'), (1, 4))


def results(**top1):
  base = {'top5': 1.0, 'calibration_error': 0.25, 'images': 100}
  return {name.replace('_at_', '/'): {'top1': value, **base} for name, value in top1.items()}


FOUND = results(
  clean=0.9, fgsm=0.5, pgd=0.4, fog_at_1=0.8, fog_at_4=0.6, snow_at_1=0.9, snow_at_4=0.7
)


def test_measures_are_what_was_asked_for():
  assert BATTERY.measures == {
    'clean': None,
    'fgsm': Attack(0.1, 1, 0.1, False),
    'pgd': Attack(0.1, 4, 0.05, True),
    'fog/1': Corrupt('fog', 1),
    'fog/4': Corrupt('fog', 4),
    'snow/1': Corrupt('snow', 1),
    'snow/4': Corrupt('snow', 4),
  }
  madry = dataclasses.replace(BATTERY, pgd_step_size=0.0).measures['pgd']
  assert madry.step_size == pytest.approx(2.5 * 0.1 / 4)
  assert list(Battery((), 0.1, 1, 0.0, (), ()).measures) == ['clean']


def test_scores_worked_by_hand():
  scores = batteries.summarise(BATTERY, FOUND)
  assert scores == pytest.approx(
    {
      'top1': 0.9,
      'top5': 1.0,
      'calibration_error': 0.25,
      'top1_fgsm': 0.5,
      'top1_pgd': 0.4,
      'error_fog': 0.3,
      'error_snow': 0.2,
      'error_corruptions_mean': 0.25,
    }
  )
  # The baseline errs 0.6 in fog and 0.4 in snow.
  baseline = results(fog_at_1=0.5, fog_at_4=0.3, snow_at_1=0.7, snow_at_4=0.5)
  against = batteries.summarise(BATTERY, FOUND, baseline)
  assert against['ce_fog'] == pytest.approx(0.5) and against['ce_snow'] == pytest.approx(0.5)
  assert against['mce'] == pytest.approx(0.5)
  assert batteries.summarise(BATTERY, FOUND, FOUND)['mce'] == pytest.approx(1)
  plain = dataclasses.replace(BATTERY, corruptions=(), attacks=())
  assert set(batteries.summarise(plain, FOUND)) == {'top1', 'top5', 'calibration_error'}


def details(kind, found):
  return {'robustness': {f'{kind}/{name}': value for name, value in found.items()}}


def test_a_baseline_must_have_measured_the_same():
  there = details('finetune', FOUND)
  read = batteries.read_baseline(there, BATTERY, 'finetune', 100)
  assert read == {name: value for name, value in FOUND.items() if '/' in name}
  with pytest.raises(
    UserError, match=r"no fog/1 and 3 more of the classifier 'linear_cached' .*: finetune"
  ):
    batteries.read_baseline(there, BATTERY, 'linear_cached', 100)
  with pytest.raises(UserError, match='classifiers there: none'):
    batteries.read_baseline({}, BATTERY, 'finetune', 100)
  with pytest.raises(UserError, match='fog/1 on 100 images and this evaluation has 50'):
    batteries.read_baseline(there, BATTERY, 'finetune', 50)
  more = dataclasses.replace(BATTERY, severities=(1, 4, 5))
  with pytest.raises(UserError, match='has no fog/5 and 1 more of'):
    batteries.read_baseline(there, more, 'finetune', 100)


@pytest.mark.parametrize(
  'change, words',
  [
    ({'attacks': ('fsgm',)}, "unknown config.robustness.attacks 'fsgm'. Known: fgsm, pgd"),
    ({'corruptions': ('rain',)}, "unknown config.robustness.corruptions 'rain'"),
    ({'severities': (0,)}, 'unknown config.robustness.severities 0. Known: 1, 2, 3, 4, 5'),
    ({'severities': ()}, 'severities is empty'),
    ({'corruptions': ('fog', 'fog')}, 'has a name twice'),
    ({'epsilon': 8.0}, 'epsilon of the attack is 8.0'),
    ({'pgd_steps': 0}, '0 steps'),
    ({'pgd_step_size': -1.0}, 'step_size of the attack is -1.0'),
  ],
)
def test_mistakes_are_refused_before_anything_runs(change, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(BATTERY, **change)
