"""The evaluation command on a real run: one table, results.json, resumed; and its mistakes in one line."""

import concurrent.futures
import contextlib
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from folk_jax import config as config_lib
from folk_jax import data, evaluate, suite
from folk_jax.errors import UserError
from folk_jax.evals import restoration, robustness
from folk_jax.train import loop, sharding
from folk_jax.train.run import data_settings
from folk_jax.train.watchdog import Watchdog

QUIET = {'logging.progress': False, 'logging.tensorboard': False, 'compilation_cache': ''}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A workdir of four steps of FOLK."""
  workdir = tmp_path_factory.mktemp('run')
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.update_from_flattened_dict(QUIET | {'evaluation.at_start': False, 'evaluation.knn': ()})
  loop.pretrain(config, str(workdir))
  return workdir


@pytest.fixture(scope='module')
def same_images(tmp_path_factory):
  """The test images of that run once more, in class folders."""
  folder = tmp_path_factory.mktemp('folder')
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  source = data.make_source(data_settings(config), 'test')
  for number in range(len(source)):
    pixels, label = source.read(number)
    (folder / source.class_names[label]).mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / source.class_names[label] / f'{number}.png')
  return folder


def make_config(checkpoint, *evaluations, arg='smoke', **changes):
  config = config_lib.load_recipe('configs/evaluate.py', arg)
  config.checkpoint, config.evaluations = str(checkpoint), evaluations
  config.update_from_flattened_dict(QUIET)
  config.low_shot.update({'images_a_class': (5,), 'shares': (0.2,), 'draws': 2})
  config.low_shot.regularisers = config.linear_cached.regularisers = (1.0, 10.0)
  config.robustness.update({'severities': (3,), 'corruptions': ('brightness',)})
  config.robustness.update({'attacks': ('pgd',), 'pgd_steps': 2})
  for part in (config.linear, config.finetune):
    part.update_from_flattened_dict(QUIET)
  config.update_from_flattened_dict(changes)
  return config


def scores_of(workdir):
  return json.loads((workdir / 'results.json').read_text())['scores']


@pytest.fixture
def passes(monkeypatch):
  """The perturbations of the passes over images, one entry a pass; `stop_at` of them is cut short."""

  class Passes(list):
    stop_at = -1

  seen, original = Passes(), robustness.accuracy_under

  def accuracy_under(perturb, *args, **kwargs):
    seen.append(perturb)
    if len(seen) == seen.stop_at:
      raise KeyboardInterrupt
    return original(perturb, *args, **kwargs)

  monkeypatch.setattr(robustness, 'accuracy_under', accuracy_under)
  return seen


def test_frozen_evaluations_share_features_and_are_resumed(
  pretrained, same_images, tmp_path, capsys, passes, monkeypatch
):
  names = ('knn', 'low_shot', 'linear_cached', 'robustness')
  folders = {'robustness.folders': (f'same={same_images}',)}
  config = make_config(pretrained, *names, **folders)
  # Cut short in the third of four passes: clean and attacked stand.
  passes.stop_at = 3
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(config, str(tmp_path))
  assert tuple(scores_of(tmp_path)) == names[:3]
  evaluate.evaluate(make_config(pretrained, *names, **folders), str(tmp_path))
  assert [str(perturb) for perturb in passes[3:]] == [str(passes[2]), 'None']
  scores = scores_of(tmp_path)
  assert tuple(scores) == names
  assert set(scores['knn']) == {'top1_k1', 'top1_k20'}
  assert set(scores['low_shot']) == {
    f'{amount}{end}' for amount in ('5_images_a_class', '20_percent') for end in ('', '_interval')
  }
  robust = {key.removeprefix('linear_cached/'): v for key, v in scores['robustness'].items()}
  assert set(robust) >= {'calibration_error', 'top5', 'error_brightness', 'error_corruptions_mean'}
  # The classifier under attack is the one of linear_cached, and an attack doesn't help it.
  assert robust['top1'] == pytest.approx(scores['linear_cached']['top1'])
  assert robust['top1_pgd'] <= robust['top1'] + 1e-9
  # Class folders of the test images are the test images.
  assert robust['top1_same'] == pytest.approx(robust['top1']) and 0 < robust['top1'] < 1
  printed = capsys.readouterr().out
  assert all(f'\n{name}' in printed for name in names) and 'results.json' in printed

  # Started again, nothing is done twice; one more evaluation is added.
  before = (tmp_path / 'results.json').read_text()
  evaluate.evaluate(make_config(pretrained, *names, **folders), str(tmp_path))
  assert (tmp_path / 'results.json').read_text() == before
  assert capsys.readouterr().out.count('skipped') == len(names)
  few = {name: restoration.tasks(32)[name] for name in ('com', 'denoise')}  # Each compiles.
  monkeypatch.setattr(restoration, 'tasks', lambda side: few)
  evaluate.evaluate(make_config(pretrained, 'restoration', **folders), str(tmp_path))
  restored = scores_of(tmp_path)['restoration']
  assert set(restored) == {
    f'{name}_{measure}{end}'
    for name in few
    for measure in ('psnr', 'ssim')
    for end in ('', '_gain')
  }

  # Against its own errors every corruption error is 1.
  baseline = tmp_path / 'baseline.json'
  (tmp_path / 'results.json').rename(baseline)
  against = {'robustness.baseline': str(baseline), 'robustness.attacks': ()}
  evaluate.evaluate(make_config(pretrained, 'robustness', **against), str(tmp_path))
  robust = scores_of(tmp_path)['robustness']
  assert robust['linear_cached/mce'] == robust['linear_cached/ce_brightness'] == pytest.approx(1)
  assert robust['baseline'] == str(baseline)


def test_trained_evaluations_start_from_the_checkpoint(pretrained, tmp_path, passes, capsys):
  names = ('linear', 'finetune', 'robustness')
  changes = {'robustness.classifiers': ('finetune',), 'robustness.attacks': ()}
  config = make_config(pretrained, *names, **changes, **{'robustness.corruptions': ()})
  evaluate.evaluate(config, str(tmp_path))
  scores = scores_of(tmp_path)
  rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
  assert scores['linear']['chosen_head'] in {
    f'lr{rate:g}_{feature}' for rate in rates for feature in ('pooled', 'concat')
  }
  assert 0 <= scores['linear']['validation_top1'] <= 1
  linear = json.loads((tmp_path / 'linear' / 'config.json').read_text())
  assert linear['init_from'] == str(pretrained) and linear['data']['validation'] == 0.1
  assert linear['evaluation']['split'] == 'validation'
  # What is put to the test is the fine-tuned network, trained once.
  assert passes == [None] and capsys.readouterr().out.count('nothing is left to train') == 1
  for key in ('top1', 'top5'):
    assert scores['robustness'][f'finetune/{key}'] == pytest.approx(scores['finetune'][key])
  assert 0 < scores['finetune']['top5'] <= 1


def test_low_shot_fine_tuning_is_a_run_for_each_amount_and_draw(pretrained, tmp_path, monkeypatch):
  ran = []

  def pretrain(config, workdir):
    ran.append((workdir.removeprefix(f'{tmp_path}/'), config.to_dict()))
    if len(ran) == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(loop, 'pretrain', pretrain)
  monkeypatch.setattr(loop, 'judged', lambda config, workdir: {'eval/top1': 0.1 * config.seed})
  fields = {'images_a_class': (2,), 'shares': (0.1,), 'draws': 3, 'total_steps': 7, 'batch_size': 8}
  changes = {f'low_shot_finetune.{name}': value for name, value in fields.items()}
  # The recipe may choose by a validation split; few labels are judged on test images all the same.
  changes |= {'finetune.evaluation.split': 'validation', 'finetune.data.validation': 0.1}
  config = make_config(pretrained, 'low_shot_finetune', seed=1, **changes)
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(config, str(tmp_path))
  evaluate.evaluate(config, str(tmp_path))
  amounts = {'2_images_a_class': (2, 0.0), '10_percent': (0, 0.1)}
  # The run that was cut short is gone on with; those before it aren't touched.
  expected = [f'low_shot_finetune/{name}/draw_{draw}' for name in amounts for draw in range(3)]
  assert [workdir for workdir, _ in ran] == [*expected[:4], *expected[3:]]
  for workdir, run in ran:
    _, name, draw = workdir.split('/')
    assert (run['data']['images_a_class'], run['data']['label_share']) == amounts[name]
    assert run['data']['label_seed'] == run['seed'] == 1 + int(draw[-1])
    assert (run['total_steps'], run['batch_size']) == (7, 8)
    assert run['init_from'] == str(pretrained) and run['evaluation']['split'] == 'test'
  # 0.1, 0.2, 0.3: a deviation of 0.1 and t = 4.302653 with two degrees of freedom.
  for name in amounts:
    assert scores_of(tmp_path)['low_shot_finetune'][name] == pytest.approx(0.2)
    interval = scores_of(tmp_path)['low_shot_finetune'][f'{name}_interval']
    assert interval == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-6)


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


@pytest.mark.parametrize(
  'name, value, words',
  [
    ('robustness.attacks', ('pdg',), "unknown config.robustness.attacks 'pdg'"),
    ('robustness.classifiers', ('fine',), "unknown config.robustness.classifiers 'fine'. Did"),
    ('robustness.classifiers', (), 'a classifier at least'),
    ('robustness.limit', -1, 'limit -1'),
    ('robustness.folders', ('sketch',), 'give each as name=DIR'),
    ('robustness.folders', ('a=tests', 'a=docs'), 'with names of their own'),
    ('robustness.folders', ('a=nowhere',), "a has no folder 'nowhere'"),
    ('robustness.baseline', 'nowhere.json', 'cannot read nowhere.json'),
    ('low_shot_finetune.draws', 0, 'draws 0'),
    ('low_shot_finetune.shares', (1.5,), 'shares between 0 and 1'),
  ],
)
def test_mistakes_of_what_comes_last_are_said_first(pretrained, tmp_path, name, value, words):
  config = make_config(pretrained, 'knn', name.partition('.')[0], **{name: value})
  with pytest.raises(UserError) as refused:
    evaluate.evaluate(config, str(tmp_path))
  assert words in str(refused.value) and '\n' not in str(refused.value)
  assert not (tmp_path / 'results.json').exists()


def test_folders_of_other_classes_are_refused(pretrained, same_images, tmp_path):
  (tmp_path / 'odd' / 'unicorn').mkdir(parents=True)
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / 'odd' / 'unicorn' / '0.png')
  changes = {'robustness.folders': (f'odd={tmp_path / "odd"}',), 'robustness.limit': 20}
  with pytest.raises(UserError, match='odd has 1 of 1 classes that are not among the 10.*unicorn'):
    evaluate.evaluate(make_config(pretrained, 'robustness', **changes), str(tmp_path))


def test_results_of_other_settings_are_not_mixed(pretrained, tmp_path):
  evaluate.evaluate(make_config(pretrained, 'knn'), str(tmp_path))
  # How long it may wait says nothing of a result.
  patient = make_config(pretrained, 'knn', **{'watchdog.seconds': 9.0})
  evaluate.evaluate(patient, str(tmp_path))
  with pytest.raises(UserError, match='with other settings: give another --workdir'):
    evaluate.evaluate(make_config(pretrained, 'knn', seed=1), str(tmp_path))


class Stuck(data.Subset):
  """Images that nobody can read until `free` is set."""

  def __init__(self, source):
    super().__init__(source, np.arange(len(source)))
    self.free = threading.Event()

  def read(self, index):
    assert self.free.wait(60)
    return super().read(index)


def test_an_evaluation_that_waits_for_its_images_says_so(pretrained, tmp_path):
  config = make_config(pretrained, 'knn')
  suite.adopt_run(config)
  said, mesh = io.StringIO(), sharding.make_mesh()
  with Watchdog(0.1, stream=said) as waits, concurrent.futures.ThreadPoolExecutor(1) as pool:
    judged = suite.Suite(config, str(tmp_path), mesh, waits)
    images = Stuck(data.make_source(judged.settings, 'test'))
    with contextlib.closing(judged.batches(images)) as batches:
      first = pool.submit(next, batches)
      end = time.monotonic() + 30
      while 'waiting for batch 1 of the images to judge by: ' not in said.getvalue():
        assert time.monotonic() < end, said.getvalue()
        time.sleep(0.01)
      images.free.set()
      assert first.result()['valid'].any()
    quiet = said.getvalue()
    time.sleep(0.5)
    assert said.getvalue() == quiet  # Closed: nothing is waited for.
