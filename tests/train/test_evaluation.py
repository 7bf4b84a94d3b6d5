"""Evaluation during a run: what it reports, and what it does without labels or held-out images."""

import jax
import pytest
from PIL import Image

from folk_jax import config, data
from folk_jax.data.folder import FolderSource
from folk_jax.errors import UserError
from folk_jax.train import sharding
from folk_jax.train.evaluation import Evaluation
from folk_jax.train.guard import RunStopped
from folk_jax.train.run import data_settings, make_run


def evaluate(path, recipe='vit_b.py', classes=0, scale=1.0, **fields):
  recipe = config.load_recipe(f'configs/{recipe}', f'smoke,data=folder,path="{path}"')
  recipe.data.update(fields)
  run = make_run(recipe, images=8, classes=classes)
  mesh = sharding.make_mesh()
  evaluation = Evaluation(recipe, run, data_settings(recipe), mesh)
  state = jax.jit(run.new_state)(jax.random.key(0), {})
  state = state.replace(params=jax.tree.map(lambda weight: scale * weight, state.params))
  scalars = evaluation(state)
  assert evaluation.names(state) == (*scalars,)  # Said beforehand.
  return scalars


def write_images(folder, colours):
  folder.mkdir(parents=True)
  for number, colour in enumerate(colours):
    Image.new('RGB', (40, 36), colour).save(folder / f'{number}.png')


def test_kNN_of_colours_and_reconstruction(tmp_path):
  for split in ('train', 'val'):
    write_images(tmp_path / split / 'blue', [(0, 0, 200 + i) for i in range(25)])
    write_images(tmp_path / split / 'red', [(200 + i, 0, 0) for i in range(25)])
  scalars = evaluate(tmp_path)
  assert scalars['eval/knn_top1_k1'] == scalars['eval/knn_top1'] == 1.0
  assert 0 < scalars['eval/reconstruction'] and 0 < scalars['eval/reconstruction_of_mean']


def test_a_network_that_has_diverged_stops_the_run_in_words(tmp_path):
  for split in ('train', 'val'):
    write_images(tmp_path / split / 'blue', [(0, 0, 200 + i) for i in range(9)])
  with pytest.raises(RunStopped, match='in the evaluation the network gives 9 of 9 .* diverged'):
    evaluate(tmp_path, scale=1e38)


def test_without_labels_only_reconstruction(tmp_path):
  for split in ('train', 'val'):
    write_images(tmp_path / split, [(i, 90, 200) for i in range(9)])
  assert set(evaluate(tmp_path)) == {'eval/reconstruction', 'eval/reconstruction_of_mean'}


def test_an_image_without_label_among_labelled_ones_is_named_and_knn_may_be_left_out(
  tmp_path, monkeypatch
):
  for split in ('train', 'val'):
    for kind in ('blue', 'red'):
      write_images(tmp_path / split / kind, [(0, 0, 200)] * 2)
  label = FolderSource.label
  monkeypatch.setattr(FolderSource, 'label', lambda self, i: -1 if i == 2 else label(self, i))
  with pytest.raises(UserError, match="train/red/0.png' has no label, .*evaluation.knn="):
    evaluate(tmp_path)


def test_without_held_out_images_none_unless_asked_for_by_name(tmp_path):
  write_images(tmp_path / 'flat', [(i, 90, 200) for i in range(9)])
  assert evaluate(tmp_path / 'flat') == {}
  (tmp_path / 'empty' / 'val').mkdir(parents=True)
  write_images(tmp_path / 'empty' / 'train', [(i, 90, 200) for i in range(9)])
  with pytest.raises(UserError, match='no images'):
    evaluate(tmp_path / 'empty')
  with pytest.raises(UserError, match='holdout'):
    evaluate(tmp_path / 'flat', test_split='holdout')


@pytest.mark.parametrize('recipe', ['finetune.py', 'linear.py'])
def test_labels_that_are_needed_are_asked_for_before_the_first_step(tmp_path, recipe):
  for kind in ('blue', 'red'):
    write_images(tmp_path / 'train' / kind, [(0, 0, 200)])
  write_images(tmp_path / 'val', [(0, 0, 200)])
  with pytest.raises(UserError, match="val/0.png' has no label, expected one of the 2 classes"):
    evaluate(tmp_path, recipe, classes=2)


def test_an_epoch_of_few_labels_is_of_those_alone():
  recipe = config.load_recipe('configs/finetune.py', 'smoke')
  recipe.update({'epochs': 4, 'total_steps': 0, 'batch_size': 16})
  recipe.data.update({'limit': 0, 'images_a_class': 4})
  source = data.make_source(data_settings(recipe), 'train')
  # 10 classes of 4: 40 images in batches of 16, four times.
  run = make_run(recipe, len(source), len(source.class_names))
  assert run.total_steps == 10 and run.objective.parts.steps_per_epoch == 2.5


def test_frozen_evaluations_have_periods_of_their_own(tmp_path):
  for split in ('train', 'val'):
    write_images(tmp_path / split / 'blue', [(0, 0, 200 + i) for i in range(25)])
    write_images(tmp_path / split / 'red', [(200 + i, 0, 0) for i in range(25)])
  recipe = config.load_recipe('configs/vit_b.py', f'smoke,data=folder,path="{tmp_path}"')
  recipe.evaluation.update({'knn': (), 'linear_cached_every': 4, 'low_shot_every': 6})
  run = make_run(recipe, images=50, classes=2)
  evaluation = Evaluation(recipe, run, data_settings(recipe), sharding.make_mesh())
  assert [step for step in range(13) if evaluation.due(step)] == [4, 6, 8, 12]
  state = jax.jit(run.new_state)(jax.random.key(0), {})
  found = {step: evaluation(state.replace(step=jax.numpy.int32(step))) for step in (3, 4, 12)}
  few = {'eval/low_shot_1_images_a_class', 'eval/low_shot_10_images_a_class'}
  assert {k for k in found[4] if 'reconstruction' not in k} == {'eval/linear_cached_top1'}
  assert {k for k in found[12] if 'reconstruction' not in k} == {'eval/linear_cached_top1', *few}
  assert all('reconstruction' in key for key in found[3])
  # Blue and red are told apart by any network.
  assert found[12]['eval/linear_cached_top1'] == 1.0
  assert found[12]['eval/low_shot_10_images_a_class'] == 1.0


def test_periods_need_labels(tmp_path):
  for split in ('train', 'val'):
    write_images(tmp_path / split, [(i, 90, 200) for i in range(9)])
  recipe = config.load_recipe('configs/vit_b.py', f'smoke,data=folder,path="{tmp_path}"')
  recipe.evaluation.low_shot_every = 2
  with pytest.raises(UserError, match='low_shot_every need labels'):
    Evaluation(recipe, make_run(recipe, 9), data_settings(recipe), sharding.make_mesh())
