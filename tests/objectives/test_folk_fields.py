"""FOLK's fields: what a weight of zero leaves out, and which values are refused."""

import jax
import jax.numpy as jnp
import pytest

from folk_jax.errors import UserError
from folk_jax.objectives import make_objective
from folk_jax.signal.augment import Augmentation


@pytest.mark.parametrize(
  'fields, parts, names, states',
  [
    ({}, ('backbone', 'projection'), {'backbone', 'projection', 'reconstruction'}, {'centre'}),
    (
      {'patch_weight': 1.0},
      ('backbone', 'projection'),
      {'backbone', 'projection', 'reconstruction'},
      {'centre', 'patch_centre'},
    ),
    ({'distillation_weight': 0.0}, ('backbone',), {'backbone', 'reconstruction'}, set()),
    (
      {'reconstruction_weight': 0.0},
      ('backbone', 'projection'),
      {'backbone', 'projection'},
      {'centre'},
    ),
  ],
)
def test_a_weight_of_zero_leaves_its_part_out(make_folk, fields, parts, names, states):
  objective = make_folk(**fields)
  params, extra = jax.eval_shape(lambda key: objective.init(key, None), jax.random.key(0))
  assert objective.teacher_parts == parts
  assert set(params) == names and set(extra) == states
  teacher = {name: params[name] for name in parts}
  batch = {
    'views': jax.ShapeDtypeStruct((4, 2, 16, 16, 3), jnp.uint8),
    'index': jax.ShapeDtypeStruct((4,), jnp.int32),
  }
  output = jax.eval_shape(
    objective.loss, params, teacher, extra, batch, jax.random.key(0), jnp.int32(0)
  )
  losses = {name for name in output.metrics if name.startswith('loss_')}
  weights = {
    'loss_reconstruction': objective.reconstruction_weight,
    'loss_distillation': objective.distillation_weight,
    'loss_patch': objective.patch_weight,
  }
  assert losses == {name for name, weight in weights.items() if weight}
  assert jax.tree.map(jnp.shape, output.extra) == jax.tree.map(jnp.shape, extra)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'portions': ()}, 'portions () must be numbers between 0 and 1'),
    ({'portions': (0.01, 1.0)}, 'portions (0.01, 1.0) must be'),
    ({'com_probability': 1.5}, 'com_probability 1.5 must be between 0 and 1'),
    ({'ranking': 'sum'}, "unknown config.objective.ranking 'sum'. Known: shared, per_channel."),
    ({'reduce': 'mean'}, "unknown config.objective.reduce 'mean'. Known: per_image, pooled."),
    ({'gamma': 0.0}, 'gamma 0.0 must be positive'),
    ({'teacher_temperature': 0.0}, 'teacher_temperature 0.0 must be positive'),
    ({'teacher_temperature_epochs': -1.0}, 'teacher_temperature_epochs -1.0 must not be negative'),
    ({'centre_momentum': 1.1}, 'centre_momentum 1.1 must be between 0 and 1'),
    ({'patch_weight': -1.0}, 'must not be negative'),
    ({'reconstruction_weight': 0.0, 'distillation_weight': 0.0}, 'one must be positive'),
    ({'has_teacher': False}, 'config.teacher.enabled is False'),
    ({'augmentations': (Augmentation(),)}, 'needs two views'),
    ({'potions': (0.1,)}, "config.objective.potions is unknown: objective 'folk' has the fields"),
  ],
)
def test_bad_fields_are_refused_in_words(make_folk, fields, words):
  with pytest.raises(UserError) as refused:
    make_folk(**fields)
  assert words in str(refused.value) and '\n' not in str(refused.value)


def test_a_missing_field_and_an_unknown_objective_are_refused(make_folk, folk_fields):
  parts = make_folk().parts
  with pytest.raises(UserError, match='config.objective.gamma is missing'):
    make_objective('folk', parts, {k: v for k, v in folk_fields.items() if k != 'gamma'})
  with pytest.raises(
    UserError, match="unknown objective 'fork' .*Did you mean 'folk'.*Known: deblur, .*folk"
  ):
    make_objective('fork', parts, folk_fields)
