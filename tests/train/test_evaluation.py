"""Evaluation during a run: what it reports, and what it does without labels or held-out images."""

import jax
import pytest
from PIL import Image

from folk_jax import config
from folk_jax.errors import UserError
from folk_jax.train import sharding
from folk_jax.train.evaluation import Evaluation
from folk_jax.train.run import data_settings, make_run


def evaluate(path, **data):
  recipe = config.load_recipe('configs/vit_b.py', f'smoke,data=folder,path="{path}"')
  recipe.data.update(data)
  run = make_run(recipe, images=8)
  mesh = sharding.make_mesh()
  evaluation = Evaluation(recipe, run, data_settings(recipe), mesh)
  return evaluation(jax.jit(run.new_state)(jax.random.key(0), {}))


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


def test_without_labels_only_reconstruction(tmp_path):
  for split in ('train', 'val'):
    write_images(tmp_path / split, [(i, 90, 200) for i in range(9)])
  assert set(evaluate(tmp_path)) == {'eval/reconstruction', 'eval/reconstruction_of_mean'}


def test_without_held_out_images_none_unless_asked_for_by_name(tmp_path):
  write_images(tmp_path / 'flat', [(i, 90, 200) for i in range(9)])
  assert evaluate(tmp_path / 'flat') == {}
  (tmp_path / 'empty' / 'val').mkdir(parents=True)
  write_images(tmp_path / 'empty' / 'train', [(i, 90, 200) for i in range(9)])
  with pytest.raises(UserError, match='no images'):
    evaluate(tmp_path / 'empty')
  with pytest.raises(UserError, match='holdout'):
    evaluate(tmp_path / 'flat', test_split='holdout')
