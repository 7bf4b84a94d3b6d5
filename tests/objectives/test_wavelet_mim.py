"""Wavelet MIM: its targets and loss by NumPy, and which layer predicts which level.

Shape letters: B images, N = B views, H, W pixels, C channels, T patches, S visible ones, K coefficients of a patch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.objectives import make_objective
from folk_jax.signal.augment import IMAGENET_MEAN, IMAGENET_STD, Augmentation

SIZE, PATCH, GRID, TOKENS, VISIBLE = 16, 4, 4, 16, 4
RNG, STEP = jax.random.key(7), jnp.int32(3)
FIELDS = {
  'mask_ratio': 0.75,
  'wavelet': 'haar',
  'layers': (1, 2),
  'level_weights': (0.25, 1.0),
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


@pytest.fixture(scope='module')
def objective(parts):
  return make_objective('wavelet_mim', parts, FIELDS)


def make_batch(size=6):
  rng = np.random.default_rng(0)
  return {
    'views': rng.integers(0, 256, (size, 1, SIZE, SIZE, 3), dtype=np.uint8),
    'label': np.zeros(size, np.int32),
    'index': rng.permutation(1000)[:size].astype(np.int32),
    'valid': np.ones(size, bool),
  }


BATCH = make_batch()
IMAGE_NHWC = (BATCH['views'][:, 0] / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)


@dataclasses.dataclass
class Recorder:
  """Stands in for the backbone: notes what it is asked; each layer answers random features of its own."""

  width: int = 24
  depth: int = 2
  remat: str = 'none'
  attention: str = 'xla'
  scan_unroll: int = 1
  seeds: jax.typing.ArrayLike = (1, 2)
  asked: dict = dataclasses.field(default_factory=dict)

  def apply(self, variables, image_NHWC, sample_keys, **options):
    del variables, sample_keys
    self.asked = options
    n, count = options['visible_NS'].shape

    def features(layer):
      values = jax.random.normal(jax.random.key(self.seeds[layer]), (n, 1, 1 + count, 24))
      return values[:, 0, 0], values[:, :, 1:]

    chosen = {layer: features(layer) for layer in options['layers']}
    return models.BackboneOutput(*features(self.depth - 1), chosen)


class Spied:
  """The objective with a recorder for its backbone, compiled: what it asks, what it makes of the answer."""

  def __init__(self, objective):
    self.recorder = Recorder()
    parts = dataclasses.replace(objective.parts, backbone=self.recorder)
    spied = dataclasses.replace(objective, parts=parts)

    def loss(params, batch, seeds):
      self.recorder.seeds = seeds
      output = spied.loss(params, None, {}, batch, RNG, STEP)
      return self.recorder.asked.pop('visible_NS'), output

    self._loss = jax.jit(loss)
    self.evaluate = jax.jit(lambda params, batch: spied.evaluate(params, None, {}, batch, RNG))

  def loss(self, params, batch=BATCH, seeds=(1, 2)):
    """The numbers of the visible patches, and the loss; `seeds` of the layers' features."""
    visible_NS, output = self._loss(params, batch, jnp.asarray(seeds))
    return np.asarray(visible_NS), output


@pytest.fixture(scope='module')
def spied(objective):
  return Spied(objective)


@pytest.fixture(scope='module')
def params(objective):
  return jax.jit(lambda key: objective.init(key, None)[0])(jax.random.key(0))


@pytest.fixture(scope='module')
def constant(params):
  """Parameters whose prediction of a level is the same for every patch, and these values."""
  rng = np.random.default_rng(1)
  guesses, decoder = [], params['decoder']
  for level in range(2):
    head = decoder[f'head_{level}']
    guesses.append(rng.normal(size=head['bias'].shape).astype(np.float32))
    head = {'kernel': np.zeros_like(head['kernel']), 'bias': guesses[-1]}
    decoder = decoder | {f'head_{level}': head}
  return params | {'decoder': decoder}, guesses


def haar(image_NHWC):
  """One level: approximation, and details [N, 3, H/2, W/2, C] over horizontal, vertical and diagonal."""
  a, b = image_NHWC[:, 0::2, 0::2], image_NHWC[:, 0::2, 1::2]
  c, d = image_NHWC[:, 1::2, 0::2], image_NHWC[:, 1::2, 1::2]
  details = np.stack([a + b - c - d, a - b + c - d, a - b - c + d], axis=1) / 2
  return (a + b + c + d) / 2, details


def standardised(x):
  """In each image by the mean and variance over all else."""
  axes = tuple(range(1, x.ndim))
  centred = x - x.mean(axes, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-6)


def by_patch(bands):
  """[N, M, h, w, C] to [N, T, K], a patch's values ordered (band, row, column, channel)."""
  side = bands.shape[2] // GRID
  corners = [(i * side, j * side) for i in range(GRID) for j in range(GRID)]
  cut = [bands[:, :, i : i + side, j : j + side].reshape(len(bands), -1) for i, j in corners]
  return np.stack(cut, axis=1)


def numpy_targets():
  """Finest level first: details 8 x 8, then details and approximation 4 x 4."""
  low, fine = haar(IMAGE_NHWC)
  low, coarse = haar(low)
  bands = np.concatenate([standardised(coarse), standardised(low)[:, None]], axis=1)
  return by_patch(standardised(fine)), by_patch(bands)


def dropped(visible_NS):
  masked_NT = np.ones((len(visible_NS), TOKENS), bool)
  np.put_along_axis(masked_NT, visible_NS, False, axis=1)
  return masked_NT


def test_the_loss_is_the_weighted_squared_error_of_the_levels(spied, constant):
  params, guesses = constant
  visible_NS, output = spied.loss(params)
  errors = []
  for level, (target_NTK, guess_K) in enumerate(zip(numpy_targets(), guesses, strict=True), 1):
    errors.append(((target_NTK - guess_K) ** 2)[dropped(visible_NS)].mean())
    # Sums of some 10^3 float32 terms of like size, of coefficients that are sums themselves.
    np.testing.assert_allclose(output.metrics[f'loss_level_{level}'], errors[-1], rtol=1e-5)
  expected = 0.25 * errors[0] + 1.0 * errors[1]
  np.testing.assert_allclose(output.loss, expected, rtol=1e-5)
  assert output.metrics['loss'] == output.metrics['loss_reconstruction'] == output.loss


def test_each_level_is_predicted_from_its_own_layer(parts, spied, params):
  _, plain = spied.loss(params)
  assert spied.recorder.asked == {'layers': (0, 1), 'normalise_layers': True}
  _, other = spied.loss(params, seeds=(3, 2))
  assert other.metrics['loss_level_1'] != plain.metrics['loss_level_1']
  # Within rounding: attention's sums over another batch.
  np.testing.assert_allclose(
    other.metrics['loss_level_2'], plain.metrics['loss_level_2'], rtol=1e-6
  )
  crossed = Spied(make_objective('wavelet_mim', parts, FIELDS | {'layers': (2, 1)}))
  _, other = crossed.loss(params, seeds=(2, 1))
  assert crossed.recorder.asked['layers'] == (1, 0)
  np.testing.assert_allclose(other.loss, plain.loss, rtol=1e-6)


def test_a_flat_image_has_targets_zero(spied, constant):
  """Details of a flat image are zero, which standardising must not turn into something else."""
  params = constant[0]
  heads = {f'head_{i}': jax.tree.map(np.zeros_like, params['decoder'][f'head_{i}']) for i in (0, 1)}
  params = params | {'decoder': params['decoder'] | heads}
  _, output = spied.loss(params, BATCH | {'views': np.full_like(BATCH['views'], 200)})
  # Details are a rounding away from zero, and 1 on average where they were standardised.
  assert output.metrics['loss_level_1'] < 1e-8
  # The approximation, one of four bands, differs between the channels and so has variance 1.
  np.testing.assert_allclose(output.metrics['loss_level_2'], 0.25, rtol=1e-5)


def test_dropped_pixels_do_not_reach_the_encoder(objective, spied, constant):
  params, _ = constant
  visible_NS, _ = spied.loss(params)
  where_NHW = dropped(visible_NS).reshape(-1, GRID, GRID).repeat(PATCH, 1).repeat(PATCH, 2)
  other = np.where(where_NHW[:, None, :, :, None], 255 - BATCH['views'], BATCH['views'])
  compiled = jax.jit(lambda batch: objective.loss(params, None, {}, batch, RNG, STEP))
  plain, changed = compiled(BATCH), compiled(BATCH | {'views': other})
  assert changed.loss != plain.loss
  for name in ('feature_std', 'effective_rank'):
    assert changed.metrics[name] == plain.metrics[name]


def test_draws_belong_to_the_sample_and_not_to_its_place(spied, params):
  order = np.array([3, 1, 0, 5, 4, 2])
  shuffled = {key: value[order] for key, value in BATCH.items()}
  visible_NS, _ = spied.loss(params)
  assert len(np.unique(visible_NS, axis=0)) > 3
  np.testing.assert_array_equal(spied.loss(params, shuffled)[0], visible_NS[order])


def test_held_out_reconstruction_beside_the_mean(spied, constant):
  params, guesses = constant
  batch = BATCH | {'valid': np.array([True, False, True, True, True, True])}
  # Nothing is augmented here, so the loss's masks are those of the evaluation.
  visible_NS, _ = spied.loss(params)
  masked_NT = dropped(visible_NS) & batch['valid'][:, None]
  expected = {'count': 5.0, 'reconstruction': 0.0, 'reconstruction_of_mean': 0.0}
  for target_NTK, guess_K, weight in zip(numpy_targets(), guesses, (0.25, 1.0), strict=True):
    for name, guess in (('reconstruction', guess_K), ('reconstruction_of_mean', 0.0)):
      error_NT = ((target_NTK - guess) ** 2).mean(-1)
      expected[name] += weight * error_NT[masked_NT].sum() / (TOKENS - VISIBLE)
  spied.recorder.seeds = (1, 2)
  found = {name: float(value) for name, value in spied.evaluate(params, batch).items()}
  assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'layers': (2,)}, 'must have an entry a level'),
    ({'layers': (), 'level_weights': ()}, 'must have an entry a level'),
    ({'layers': (1, 1, 2), 'level_weights': (1, 1, 1)}, '4 must be a multiple of 8'),
    ({'layers': (0, 2)}, 'must lie in 1 to config.model.depth, 2'),
    ({'layers': (1, 3)}, 'must lie in 1 to config.model.depth, 2'),
    ({'layers': (1, 1)}, 'must name the last layer, 2'),
    ({'level_weights': (0.0, 0.0)}, 'one must be positive'),
    ({'level_weights': (-1.0, 1.0)}, 'must not be negative'),
    ({'wavelet': 'har'}, "wavelet 'har' is unknown"),
    ({'decoder_heads': 3}, 'a decoder of width 16 with 3 heads'),
    ({'levels': 2}, 'config.objective.levels is unknown'),
  ],
)
def test_bad_fields_are_refused_in_words(parts, fields, words):
  with pytest.raises(UserError) as refused:
    make_objective('wavelet_mim', parts, FIELDS | fields)
  assert words in str(refused.value) and '\n' not in str(refused.value)
