"""What evaluations share: the run that is adopted, even parts of a test set, folders of other images."""

import json

import numpy as np
import pytest
from PIL import Image

from folk_jax import config as config_lib
from folk_jax import data
from folk_jax.errors import UserError
from folk_jax.suite import adopt_run, class_folder, stratified
from folk_jax.train.run import data_settings


def run_of(workdir, recipe, arg='smoke', **changes):
  """A workdir that holds no more than a run's configuration, and an evaluation's."""
  run = config_lib.load_recipe(f'configs/{recipe}', arg)
  run.update_from_flattened_dict(changes)
  (workdir / 'config.json').write_text(config_lib.to_json(run))
  config = config_lib.load_recipe('configs/evaluate.py')
  config.checkpoint = str(workdir)
  return run, config


@pytest.mark.parametrize(
  'depth, features', [(2, ('pooled', 'concat')), (4, ('pooled', 'concat', 'last4'))]
)
def test_the_sweep_leaves_out_features_that_a_shallow_model_lacks(tmp_path, depth, features):
  run, config = run_of(tmp_path, 'vit_b.py', **{'model.depth': depth})
  assert config.linear.objective.features == ('pooled', 'concat', 'last4')
  adopt_run(config)
  assert config.linear.objective.features == features
  for part in (config, config.linear, config.finetune):
    assert part.model.to_dict() == run.model.to_dict()
    assert part.image_size == run.image_size and part.data.source == 'embedded'


@pytest.mark.parametrize(
  'recipe, given, judged',
  [
    ('vit_b.py', '', 'pooled'),
    ('mfm.py', '', 'mean_patch'),
    ('mfm.py', 'concat', 'concat'),
  ],
)
def test_a_run_is_judged_by_its_own_feature_unless_told_otherwise(tmp_path, recipe, given, judged):
  run, config = run_of(tmp_path, recipe)
  config.evaluation.feature = given
  adopt_run(config)
  assert config.evaluation.feature == judged
  # A run from before the field existed.
  file = tmp_path / 'config.json'
  old = json.loads(file.read_text())
  del old['evaluation']['feature']
  file.write_text(json.dumps(old))
  config.evaluation.feature = ''
  adopt_run(config)
  assert config.evaluation.feature == 'pooled'


def test_a_file_of_weights_is_judged_by_the_class_token(tmp_path):
  config = config_lib.load_recipe('configs/evaluate.py', 'data=embedded')
  config.checkpoint = str(tmp_path / 'weights.safetensors')
  adopt_run(config)
  assert config.evaluation.feature == 'pooled'


def test_a_resnet_needs_the_recipes_of_one(tmp_path):
  run, config = run_of(tmp_path, 'resnet50.py')
  with pytest.raises(
    UserError, match='is of a resnet and the recipe trains a vit: give model=resnet50'
  ):
    adopt_run(config)
  config = config_lib.load_recipe('configs/evaluate.py', 'model=resnet50')
  config.checkpoint = str(tmp_path)
  adopt_run(config)
  assert config.linear.objective.features == ('pooled',)
  assert config.finetune.model.to_dict() == run.model.to_dict()


def test_a_run_on_few_labels_is_judged_on_all_images(tmp_path):
  _, config = run_of(tmp_path, 'vit_b.py', **{'data.images_a_class': 3, 'data.limit': 9})
  adopt_run(config)
  assert config.data.images_a_class == 0 and config.data.limit == 0
  # A run from before a field existed.
  file = tmp_path / 'config.json'
  old = json.loads(file.read_text())
  del old['data']['images_a_class'], old['data']['validation']
  file.write_text(json.dumps(old))
  adopt_run(config)
  assert config.finetune.data.images_a_class == 0 and config.data.validation == 0


def test_what_fine_tuning_chooses_by_is_its_own_affair(tmp_path):
  _, config = run_of(tmp_path, 'vit_b.py')
  config.finetune.data.validation = 0.2
  adopt_run(config)
  assert config.finetune.data.validation == 0.2 and config.data.validation == 0


def test_the_best_step_of_a_run_is_of_the_run(tmp_path):
  run, config = run_of(tmp_path, 'vit_b.py')
  (tmp_path / 'best').mkdir()
  config.checkpoint = str(tmp_path / 'best')
  adopt_run(config)
  assert config.model.to_dict() == run.model.to_dict()
  (tmp_path / 'other').mkdir()
  config.checkpoint = str(tmp_path / 'other')
  with pytest.raises(UserError, match='is no workdir'):
    adopt_run(config)


class Labelled(data.Source):
  def __init__(self, labels):
    self._labels = np.asarray(labels)

  def __len__(self):
    return len(self._labels)

  def label(self, index):
    return int(self._labels[index])

  def read(self, index):
    return np.full((1, 1, 3), index, np.uint8), self.label(index)


def test_a_part_holds_each_class_in_proportion_and_is_spread_over_it():
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 1, 2], [100, 50, 10])
  for order in (np.arange(160), rng.permutation(160)):
    source = Labelled(labels[order])
    part = stratified(source, 16)
    assert np.bincount([part.label(i) for i in range(16)]).tolist() == [10, 5, 1]
    numbers = np.array([part.read(i)[0][0, 0, 0] for i in range(16)])
    assert np.all(np.diff(numbers.astype(int)) > 0)
    for label in (0, 1):
      places = np.searchsorted(
        np.flatnonzero(labels[order] == label), numbers[[part.label(i) == label for i in range(16)]]
      )
      assert set(np.diff(places)) == {10}
  assert stratified(source, 0) is source and stratified(source, 160) is source
  assert len(stratified(source, 159)) == 159


def settings():
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.data.images_a_class = 1  # Of the run's data, not of these.
  return data_settings(config)


def test_folders_of_other_images(tmp_path):
  for name, count in (('cat', 2), ('ant', 3), ('.hidden', 1)):
    (tmp_path / name).mkdir()
    for number in range(count):
      Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / f'{number}.png')
  source = class_folder(settings(), str(tmp_path), 'here')
  assert source.class_names == ('ant', 'cat')
  assert [source.label(i) for i in range(len(source))] == [0, 0, 0, 1, 1]
  with pytest.raises(UserError, match=r"here: there is no folder '.*nowhere'"):
    class_folder(settings(), str(tmp_path / 'nowhere'), 'here')
  with pytest.raises(
    UserError, match='here: .* has images and no class folders; expected .*/<class>/<image>'
  ):
    class_folder(settings(), str(tmp_path / 'cat'), 'here')
