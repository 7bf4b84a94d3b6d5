"""The evaluation command on a real run: one table, results.json, resumed; and its mistakes in one line."""

import json

import pytest

from folk_jax import config as config_lib
from folk_jax import evaluate
from folk_jax.errors import UserError
from folk_jax.train import loop

QUIET = {'logging.progress': False, 'logging.tensorboard': False, 'compilation_cache': ''}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A workdir of four steps of FOLK."""
  workdir = tmp_path_factory.mktemp('run')
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.update_from_flattened_dict(QUIET | {'evaluation.at_start': False, 'evaluation.knn': ()})
  loop.pretrain(config, str(workdir))
  return workdir


def make_config(checkpoint, *evaluations, arg='smoke', **changes):
  config = config_lib.load_recipe('configs/evaluate.py', arg)
  config.checkpoint, config.evaluations = str(checkpoint), evaluations
  config.update_from_flattened_dict(QUIET)
  config.low_shot.update({'images_a_class': (1, 2), 'shares': (0.1,), 'draws': 2})
  config.robustness.update({'severities': (3,), 'corruptions': ('brightness',)})
  for part in (config.linear, config.finetune):
    part.update_from_flattened_dict(QUIET)
  config.update(changes)
  return config


def scores_of(workdir):
  return json.loads((workdir / 'results.json').read_text())['scores']


def test_frozen_evaluations_share_features_and_are_resumed(pretrained, tmp_path, capsys):
  names = ('knn', 'low_shot', 'linear_cached', 'robustness')
  evaluate.evaluate(make_config(pretrained, *names), str(tmp_path))
  scores = scores_of(tmp_path)
  assert tuple(scores) == names
  assert set(scores['knn']) == {'top1_k1', 'top1_k20'}
  assert set(scores['low_shot']) == {
    f'{amount}{end}'
    for amount in ('1_images_a_class', '2_images_a_class', '10_percent')
    for end in ('', '_interval')
  }
  assert {'top1', 'calibration_error', 'top1_fgsm', 'top1_pgd', 'error_brightness'} <= set(
    scores['robustness']
  )
  # The classifier under attack is the one of linear_cached, and an attack doesn't help it.
  assert scores['robustness']['top1'] == pytest.approx(scores['linear_cached']['top1'])
  assert scores['robustness']['top1_pgd'] <= scores['robustness']['top1'] + 1e-9
  printed = capsys.readouterr().out
  assert all(f'\n{name}' in printed for name in names) and 'results.json' in printed
  # Started again, nothing is done twice; one more evaluation is added.
  before = (tmp_path / 'results.json').read_text()
  evaluate.evaluate(make_config(pretrained, *names), str(tmp_path))
  assert (tmp_path / 'results.json').read_text() == before
  assert capsys.readouterr().out.count('skipped') == len(names)
  evaluate.evaluate(make_config(pretrained, 'knn', 'restoration'), str(tmp_path))
  restored = scores_of(tmp_path)['restoration']
  assert {'denoise_psnr', 'denoise_psnr_gain', 'com_ssim', 'deblur_ssim_gain'} <= set(restored)


def test_trained_evaluations_start_from_the_checkpoint(pretrained, tmp_path):
  evaluate.evaluate(make_config(pretrained, 'linear', 'finetune'), str(tmp_path))
  scores = scores_of(tmp_path)
  (chosen,) = [name for name in scores['linear'] if name.startswith('chosen: ')]
  assert 'top1_lr' in chosen and 0 <= scores['linear']['validation_top1'] <= 1
  assert 0 <= scores['finetune']['top1'] <= scores['finetune']['top5'] <= 1
  linear = json.loads((tmp_path / 'linear' / 'config.json').read_text())
  assert linear['init_from'] == str(pretrained) and linear['data']['validation'] == 0.1
  assert linear['evaluation']['split'] == 'validation'


@pytest.mark.parametrize(
  'checkpoint, evaluations, words',
  [
    ('', ('knn',), 'config.checkpoint is empty'),
    ('/nowhere/at/all', ('knn',), 'is not a workdir, so nothing says which data'),
    ('RUN', ('knm',), "unknown evaluation 'knm'. Did you mean 'knn'?"),
  ],
)
def test_mistakes_are_one_line(pretrained, tmp_path, checkpoint, evaluations, words):
  checkpoint = pretrained if checkpoint == 'RUN' else checkpoint
  with pytest.raises(UserError) as refused:
    evaluate.evaluate(make_config(checkpoint, *evaluations), str(tmp_path))
  assert words in str(refused.value) and '\n' not in str(refused.value)
  assert not (tmp_path / 'results.json').exists()


def test_results_of_other_settings_are_not_mixed(pretrained, tmp_path):
  evaluate.evaluate(make_config(pretrained, 'knn'), str(tmp_path))
  with pytest.raises(UserError, match='with other settings: give another --workdir'):
    evaluate.evaluate(make_config(pretrained, 'knn', seed=1), str(tmp_path))
