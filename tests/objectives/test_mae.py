"""MAE: which patches the encoder is given, and the loss on the others by NumPy.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, C channels, T patches, S visible ones, K values
of a patch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.objectives import make_objective
from folk_jax.signal.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation

SIZE, PATCH, TOKENS, VISIBLE = 16, 4, 16, 4
RNG, STEP = jax.random.key(7), jnp.int32(3)
FIELDS = {
  'mask_ratio': 0.75,
  'normalise_pixels': True,
  'decoder_width': 16,
  'decoder_depth': 1,
  'decoder_heads': 2,
}


@pytest.fixture(scope='module')
def parts(make_folk):
  """One view, no augmentation, no teacher, sixteen patches."""
  backbone = models.make_backbone('vit', SIZE, width=24, depth=2, heads=2, patch=PATCH)
  return dataclasses.replace(
    make_folk().parts,
    backbone=backbone,
    patch=PATCH,
    augmentations=(Augmentation(),),
    projection=None,
    has_teacher=False,
  )


def make_batch(size=6, views=1):
  rng = np.random.default_rng(0)
  return {
    'views': rng.integers(0, 256, (size, views, SIZE, SIZE, 3), dtype=np.uint8),
    'label': np.zeros(size, np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }


BATCH = make_batch()


@dataclasses.dataclass
class Recorder:
  """Stands in for the backbone: notes what it is given; answers ones in the right shape."""

  width: int = 24
  depth: int = 2
  remat: str = 'none'
  attention: str = 'xla'
  scan_unroll: int = 1
  given: tuple = ()

  def apply(self, variables, image_NHWC, sample_keys, visible_NS, **options):
    del variables, sample_keys, options
    self.given = (image_NHWC, visible_NS)
    n, count = visible_NS.shape
    return models.BackboneOutput(jnp.ones((n, 24)), jnp.ones((n, 1, count, 24)), {})


class Spied:
  """The objective with a recorder for its backbone, and with heads that predict the same K values for every patch."""

  def __init__(self, parts, views=1, **fields):
    parts = dataclasses.replace(parts, augmentations=(Augmentation(),) * views)
    self.objective = make_objective('mae', parts, FIELDS | fields)
    self.params, self.guess_K = constant_head(self.objective)
    recorder = Recorder()
    spied = dataclasses.replace(self.objective, parts=dataclasses.replace(parts, backbone=recorder))

    def loss(batch, rng):
      output = spied.loss(self.params, None, {}, batch, rng, STEP)
      return *recorder.given, output

    self._loss = jax.jit(loss)
    self.evaluate = jax.jit(lambda batch: spied.evaluate(self.params, None, {}, batch, RNG))

  def loss(self, batch=BATCH, rng=RNG):
    """The images and the numbers of the patches that the encoder is given, and the loss."""
    image_NHWC, visible_NS, output = self._loss(batch, rng)
    return np.asarray(image_NHWC), np.asarray(visible_NS), output


@pytest.fixture(scope='module')
def spied(parts):
  return functools.cache(functools.partial(Spied, parts))


def constant_head(objective):
  """Parameters whose prediction is the same K values for every patch, and these values."""
  params, _ = jax.jit(lambda key: objective.init(key, None))(jax.random.key(0))
  head = params['decoder']['head_0']
  guess_K = np.random.default_rng(1).normal(size=head['bias'].shape).astype(np.float32)
  head = {'kernel': np.zeros_like(head['kernel']), 'bias': guess_K}
  return params | {'decoder': params['decoder'] | {'head_0': head}}, guess_K


def to_patches(image_NHWC):
  """[N, T, K] by slices; inside a patch (row, column, channel)."""
  corners = [(i, j) for i in range(0, SIZE, PATCH) for j in range(0, SIZE, PATCH)]
  cut = [image_NHWC[:, i : i + PATCH, j : j + PATCH].reshape(-1, PATCH**2 * 3) for i, j in corners]
  return np.stack(cut, axis=1)


def normalised(view):
  return (view.reshape(-1, SIZE, SIZE, 3) / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)


def standardised(patch_NTK):
  """By each patch's mean and its deviation with n - 1, as torch has it."""
  centred_NTK = patch_NTK - patch_NTK.mean(-1, keepdims=True)
  return centred_NTK / np.sqrt(patch_NTK.var(-1, ddof=1, keepdims=True) + 1e-6)


def dropped(visible_NS):
  masked_NT = np.ones((len(visible_NS), TOKENS), bool)
  np.put_along_axis(masked_NT, visible_NS, False, axis=1)
  return masked_NT


def repainted(batch, patches_NT, seed=2):
  """Other pixels in these patches."""
  grid = SIZE // PATCH
  where_NHW = patches_NT.reshape(-1, grid, grid).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
  other = np.random.default_rng(seed).integers(0, 256, batch['views'].shape, dtype=np.uint8)
  return batch | {'views': np.where(where_NHW[:, None, :, :, None], other, batch['views'])}


@pytest.mark.parametrize('views, normalise_pixels', [(1, True), (2, False)])
def test_the_loss_is_the_squared_error_on_the_dropped_patches(spied, views, normalise_pixels):
  case = spied(views, normalise_pixels=normalise_pixels)
  batch = make_batch(views=views)
  image_NHWC, visible_NS, output = case.loss(batch)
  assert visible_NS.shape == (6 * views, VISIBLE)
  np.testing.assert_allclose(image_NHWC, normalised(batch['views']), atol=1e-6)

  target_NTK = to_patches(normalised(batch['views']))
  if normalise_pixels:
    target_NTK = standardised(target_NTK)
  expected = ((target_NTK - case.guess_K) ** 2)[dropped(visible_NS)].mean()
  # Sums of some 10^4 float32 terms of like size.
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  assert output.metrics['loss_reconstruction'] == output.metrics['loss'] == output.loss


def test_each_part_sees_its_patches_alone(spied):
  """Dropped pixels reach the target and never the encoder; visible ones the encoder and not the target."""
  case = spied(1, normalise_pixels=True)
  masked_NT = dropped(case.loss()[1])
  compiled = jax.jit(lambda batch: case.objective.loss(case.params, None, {}, batch, RNG, STEP))
  plain = compiled(BATCH)
  other_target = compiled(repainted(BATCH, masked_NT))
  other_input = compiled(repainted(BATCH, ~masked_NT))
  features = ('feature_std', 'effective_rank')
  assert all(other_target.metrics[name] == plain.metrics[name] for name in features)
  assert other_target.loss != plain.loss
  assert all(other_input.metrics[name] != plain.metrics[name] for name in features)
  assert other_input.loss == plain.loss


def test_draws_belong_to_the_sample_and_not_to_its_place(spied):
  case = spied(1, normalise_pixels=True)
  order = np.array([3, 1, 0, 5, 4, 2])
  shuffled = {key: value[order] for key, value in BATCH.items()}
  _, visible_NS, _ = case.loss()
  np.testing.assert_array_equal(case.loss(shuffled)[1], visible_NS[order])
  assert len(np.unique(visible_NS, axis=0)) > 3
  assert np.any(case.loss(rng=jax.random.key(8))[1] != visible_NS)
  _, visible_NS, _ = spied(2, normalise_pixels=False).loss(make_batch(views=2))
  assert np.any(visible_NS[::2] != visible_NS[1::2])


def test_positions_start_as_sines_and_cosines(spied):
  position_1TD = spied(1, normalise_pixels=True).params['backbone']['pos_embed']
  np.testing.assert_array_equal(position_1TD[0, 1:], models.sincos_position((4, 4), 24))
  assert not np.any(position_1TD[0, 0])


def test_held_out_reconstruction_beside_the_mean(spied):
  case = spied(1, normalise_pixels=True)
  batch = BATCH | {'valid': np.array([True, False, True, True, True, True])}
  # Nothing is augmented here, so the loss's masks are those of the evaluation.
  _, visible_NS, _ = case.loss()
  target_NTK = standardised(to_patches(normalised(BATCH['views'])))
  masked_NT = dropped(visible_NS) & batch['valid'][:, None]
  count = TOKENS - VISIBLE
  expected = {
    'count': 5.0,
    'reconstruction': ((target_NTK - case.guess_K) ** 2).mean(-1)[masked_NT].sum() / count,
    'reconstruction_of_mean': (target_NTK**2).mean(-1)[masked_NT].sum() / count,
  }
  found = {name: float(value) for name, value in case.evaluate(batch).items()}
  assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'mask_ratio': 0.99}, 'leaves 0 of 16 patches visible'),
    ({'mask_ratio': 0.0}, 'leaves 16 of 16 patches visible'),
    ({'decoder_heads': 3}, 'a decoder of width 16 with 3 heads'),
    ({'decoder_depth': 0}, 'a decoder of 0 blocks'),
    ({'mask_ration': 0.75}, 'config.objective.mask_ration is unknown'),
  ],
)
def test_bad_fields_are_refused_in_words(parts, fields, words):
  with pytest.raises(UserError) as refused:
    make_objective('mae', parts, FIELDS | fields)
  assert words in str(refused.value) and '\n' not in str(refused.value)


def test_a_width_without_sines_and_cosines_is_refused(parts):
  backbone = dataclasses.replace(parts.backbone, width=18)
  with pytest.raises(UserError, match='config.model.width 18 must be a multiple of 4'):
    make_objective('mae', dataclasses.replace(parts, backbone=backbone), FIELDS)
