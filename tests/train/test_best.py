"""The best checkpoint: what takes its place, how a resumed run knows it, and who reads it."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from folk_jax import checkpoint, export
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.interop import timm
from folk_jax.train import best, initial, loop
from folk_jax.train.evaluation import Evaluation

REPORTED = ('eval/top1', 'eval/loss', 'eval/knn_top1')


def about(**evaluation):
  return {'config': {'evaluation': {'split': 'validation', 'batch_size': 8} | evaluation}}


def offer_all(workdir, scores, metric='eval/top1', start=1, **evaluation):
  """Offers a score a step; returns the steps that were saved."""
  name, saved = metric.removeprefix('-'), []
  with best.Best(metric, str(workdir), about(**evaluation), True) as kept:
    for step, score in enumerate(scores, start):
      state = {'step': np.int32(step), 'weights': np.full(3, 10.0 * step)}
      saved += [step] if kept.offer(step, {name: score}, state) else []
    line = kept.line()
  return saved, line


def on_disk(workdir):
  """The steps in best/, and the weights and meta of the newest."""
  directory = workdir / 'best'
  node, meta, _ = checkpoint.read_subtree(str(directory), ('weights',))
  steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())
  return steps, node[0], meta


def test_only_what_exceeds_the_best_so_far_takes_its_place(tmp_path):
  saved, line = offer_all(tmp_path, [float('nan'), 0.2, 0.5, 0.5, float('inf'), 0.4, 0.625])
  assert saved == [2, 3, 7]
  steps, weights, meta = on_disk(tmp_path)
  assert (steps, weights) == ([7], 70.0)
  assert meta['best'] == {'metric': 'eval/top1', 'value': 0.625} and meta['step'] == 7
  assert line == f'best top1: 0.625 at step 7, kept in {tmp_path / "best"}'


def test_a_resumed_run_exceeds_what_stands_on_disk(tmp_path):
  offer_all(tmp_path, [0.1, 0.5, 0.3])
  # Killed after step 3, resumed after step 1: the same steps give the same numbers.
  assert offer_all(tmp_path, [0.5, 0.3, 0.5], start=2)[0] == []
  assert on_disk(tmp_path)[:2] == ([2], 20.0)
  # How many images go at a time changes no number.
  assert offer_all(tmp_path, [0.4, 0.5 + 1e-12], start=5, batch_size=4)[0] == [6]
  assert on_disk(tmp_path)[:2] == ([6], 60.0)


def test_steps_done_again_with_a_better_outcome_replace_those_ahead(tmp_path):
  offer_all(tmp_path, [0.1, 0.2, 0.3, 0.4])
  assert offer_all(tmp_path, [0.35, 0.45, 0.46], start=2)[0] == [3, 4]
  assert on_disk(tmp_path)[:2] == ([4], 40.0)


@pytest.mark.parametrize('change', [{'metric': 'eval/knn_top1'}, {'split': 'other'}])
def test_a_best_by_another_measure_counts_for_nothing(tmp_path, change):
  offer_all(tmp_path, [0.1, 0.2, 0.9])
  saved, _ = offer_all(tmp_path, [0.3, 0.2], start=2, **change)
  assert saved == [2]
  assert on_disk(tmp_path)[:2] == ([2], 20.0)


def test_a_minus_keeps_the_lowest(tmp_path):
  assert offer_all(tmp_path, [2.0, 3.0, 1.0, 1.0], metric='-eval/loss')[0] == [1, 3]
  assert on_disk(tmp_path)[2]['best'] == {'metric': '-eval/loss', 'value': 1.0}


def test_without_a_metric_there_is_none(tmp_path):
  with best.Best('', str(tmp_path), about(), True) as kept:
    assert not kept.offer(1, {'eval/top1': 1.0}, {})
    kept.wait()
    assert kept.line() == ''
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'metric, words',
  [
    ('eval/top5', "'eval/top5' is not among .*: eval/knn_top1, eval/loss, eval/top1."),
    ('top1', 'is not among'),
    ('eval/loss', 'better where it is lower: write -eval/loss'),
  ],
)
def test_numbers_that_cannot_choose_are_refused(metric, words):
  with pytest.raises(UserError, match=words):
    best.check_metric(metric, REPORTED)


@pytest.mark.parametrize('metric', ['', 'eval/top1', '-eval/loss'])
def test_numbers_that_can_choose_pass(metric):
  best.check_metric(metric, REPORTED)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'evaluation.split': 'test'}, "not for testing, .*split is 'test'"),
    ({'data.validation': 0.0}, 'config.data.validation 0'),
    ({'eval_every': 0}, 'eval_every is 0'),
  ],
)
def test_test_images_never_choose(changes, words):
  config = make_config()
  config_lib.validate(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=words):
    config_lib.validate(config)


SCORES = {1: 0.25, 2: 0.5, 3: 0.375, 4: 0.625, 5: 0.5, 6: 0.25}


def make_config(**changes):
  """Six steps of fine-tuning on three images a class."""
  config = config_lib.load_recipe('configs/finetune.py', 'smoke')
  config.update_from_flattened_dict(
    {
      'image_size': 16,
      'total_steps': 6,
      'model.width': 24,
      'model.depth': 1,
      'model.heads': 2,
      'objective.mixup': 0.0,
      'objective.cutmix': 0.0,
      'objective.erasing': 0.0,
      'views.view_1.randaugment': '',
      'data.test_resize': 0,
      'data.validation': 0.2,
      'data.images_a_class': 3,
      'evaluation.split': 'validation',
      'eval_every': 1,
      'checkpoint.every': 3,
      'checkpoint.best': 'eval/top1',
      'logging.tensorboard': False,
      'compilation_cache': '',
    }
    | changes
  )
  return config


class Killed(Exception):
  """What ends a run in the middle."""


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two workdirs of one run with scripted scores: uninterrupted, and killed after the best's save at step 4."""
  folder = tmp_path_factory.mktemp('best')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      Evaluation, '__call__', lambda self, state, due: {'eval/top1': SCORES[int(state.step)]}
    )
    patch.setattr(Evaluation, 'names', lambda self, state: ('eval/top1',))
    # The three starts are of one configuration: they share one compiled step.
    compiled, compile_step = [], loop.compile_step

    def compile_once(run, state, mesh):
      compiled.extend([] if compiled else [compile_step(run, state, mesh)])
      return compiled[0]

    patch.setattr(loop, 'compile_step', compile_once)
    loop.pretrain(make_config(), str(folder / 'whole'))
    offer = best.Best.offer

    def offer_and_die(self, step, scalars, state):
      saved = offer(self, step, scalars, state)
      if step == 4:
        self.wait()
        raise Killed
      return saved

    patch.setattr(best.Best, 'offer', offer_and_die)
    with pytest.raises(Killed):
      loop.pretrain(make_config(), str(folder / 'killed'))
    assert [path.name for path in (folder / 'killed' / 'checkpoints').glob('[0-9]*')] == ['3']
    patch.setattr(best.Best, 'offer', offer)
    loop.pretrain(make_config(), str(folder / 'killed'))
  return folder / 'whole', folder / 'killed'


@pytest.mark.slow
def test_a_killed_and_resumed_run_keeps_the_same_best(runs):
  (whole, whole_meta, step), (resumed, resumed_meta, _) = (
    checkpoint.read_subtree(str(workdir / 'best'), ()) for workdir in runs
  )
  assert step == 4 and whole_meta == resumed_meta
  assert whole_meta['best'] == {'metric': 'eval/top1', 'value': 0.625}
  assert int(whole['step']) == 4
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.slow
def test_last_and_best_are_each_read_by_who_asks_for_them(runs):
  workdir, trees = runs[0], {}
  for name in ('best', 'checkpoints'):
    trees[name], _, step = checkpoint.read_subtree(str(workdir / name), ('params',))
    assert step == {'best': 4, 'checkpoints': 6}[name]
  for path, name in ((workdir / 'best', 'best'), (workdir, 'checkpoints')):
    loaded = initial.load(str(path), trees[name], image_size=16, patch=8)
    jax.tree.map(np.testing.assert_array_equal, loaded, trees[name])
    out = export.export(str(workdir), which='student', best=name == 'best')
    assert out.endswith(f'student_{step_of(name)}.safetensors')
    written = safetensors.numpy.load_file(out)
    for key, value in timm.to_timm(trees[name]['backbone']).items():
      np.testing.assert_array_equal(written[key], value)
  config = make_config()
  measured = {name: loop.judged(config, str(workdir), best=name == 'best') for name in trees}
  assert measured['best'] != measured['checkpoints']


def step_of(name):
  return {'best': 4, 'checkpoints': 6}[name]


def test_a_run_that_kept_no_best_says_so(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(make_config().to_dict()))
  for read in (
    lambda: initial.load(str(tmp_path / 'best'), {}, image_size=16, patch=8),
    lambda: loop.judged(make_config(), str(tmp_path), best=True),
  ):
    with pytest.raises(UserError, match='has no best checkpoint: its run must have set'):
      read()
  with pytest.raises(UserError, match='no checkpoint in .*best'):
    export.export(str(tmp_path), which='student', best=True)
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


# Two processes, of which the second finds other scores: it would save another step, and wait there for the first.
TWO_PROCESSES = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from folk_jax.train import best, sharding

workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f'127.0.0.1:{port}', 2, index)
mesh = sharding.make_mesh()
scores = ([0.1, 0.5, 0.3], [0.1, 0.0, 0.9])[index]
about = {'config': {'evaluation': {}}}
for resumed in range(2):
  with jax.set_mesh(mesh), best.Best('eval/top1', workdir, about, True) as kept:
    for step, score in enumerate(scores, 1):
      state = {
        'step': jax.device_put(np.int32(step), sharding.replicated(mesh)),
        'weights': sharding.put(np.full(2, 10.0 * step, np.float32), mesh),
      }
      saved = kept.offer(step, {'eval/top1': score}, state)
      assert saved == (step < 3 and not resumed), (step, resumed)
"""


@pytest.mark.slow
def test_two_processes_decide_as_the_first(tmp_path):
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  both = [
    subprocess.Popen(
      [sys.executable, '-c', TWO_PROCESSES, str(tmp_path), str(port), str(index)],
      env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for process in both:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
  assert on_disk(tmp_path)[:2] == ([2], 20.0)
