"""MAE: masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377).

Most patches of a view are dropped. The encoder sees the others, a light decoder rebuilds the dropped ones.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, C channels, P patch, T patches, S visible ones,
D width, L levels (MAE has one), K values of a patch.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from folk_jax.errors import UserError
from folk_jax.models import BackboneOutput, MaskedDecoder, sincos_position
from folk_jax.models.vit import to_patches
from folk_jax.objectives import statistics
from folk_jax.objectives.base import (
  Batch,
  LossOutput,
  Params,
  Parts,
  encode,
  sample_keys,
  statistics_of,
  statistics_state,
)
from folk_jax.objectives.views import (
  DROP_PATH,
  MASK,
  augmented_normalised,
  fold,
  to_float,
  view_keys,
)
from folk_jax.signal import patch_masks
from folk_jax.signal.augment import normalise
from folk_jax.signal.shard import over_batch

# Beside the variance of a patch, as in MAE's code.
_EPSILON = 1e-6


class Hidden(NamedTuple):
  """Views, which of their patches the encoder sees, and what is to be predicted of the others."""

  image_NHWC: jax.Array  # Normalised.
  visible_NS: jax.Array
  masked_NT: jax.Array
  targets: tuple[jax.Array, ...]  # One a level, float32 [N, T, K].


@dataclasses.dataclass(frozen=True)
class MaskedModelling:
  """Drop patches, encode the others, predict something of the dropped ones. A method says what, and from what.

  Attributes:
    parts: backbone, views, normalisation.
    mask_ratio: share of the patches that are dropped, in (0, 1).
    decoder_width, decoder_depth, decoder_heads: of the decoder's blocks.
  """

  backbones: ClassVar[tuple[str, ...]] = ('vit',)
  teacher_parts: ClassVar[tuple[str, ...]] = ('backbone',)

  parts: Parts
  mask_ratio: float
  decoder_width: int
  decoder_depth: int
  decoder_heads: int

  def __post_init__(self):
    patch_masks.visible_count(self._tokens, self.mask_ratio)  # Refuses what hides or shows nothing.
    self._decoder.check()
    if self.parts.backbone.width % 4:
      raise UserError(
        f'config.model.width {self.parts.backbone.width} must be a multiple of 4: positions start as sines and cosines '
        'of rows and columns.'
      )

  def _targets(self, image_NHWC: jax.Array) -> tuple[jax.Array, ...]:
    """What is to be predicted of normalised images: one float32 [N, T, K] a level."""
    raise NotImplementedError

  @property
  def _layers(self) -> tuple[int, ...]:
    """Numbers, from 0, of the blocks that predict the levels; () for one level, predicted by the last."""
    raise NotImplementedError

  @property
  def _weights(self) -> tuple[float, ...]:
    """Of the levels."""
    raise NotImplementedError

  @property
  def _grid(self) -> tuple[int, int]:
    return (self.parts.image_size // self.parts.patch,) * 2

  @property
  def _tokens(self) -> int:
    return self._grid[0] * self._grid[1]

  @functools.cached_property
  def _decoder(self) -> MaskedDecoder:
    image = jax.ShapeDtypeStruct((1, self.parts.image_size, self.parts.image_size, 3), jnp.float32)
    return MaskedDecoder(
      grid=self._grid,
      outputs=tuple(target.shape[-1] for target in jax.eval_shape(self._targets, image)),
      width=self.decoder_width,
      depth=self.decoder_depth,
      heads=self.decoder_heads,
      dtype=self.parts.dtype,
      # The decoder sees four times the encoder's patches: what saves memory there has to here.
      remat=self.parts.backbone.remat,
      attention=self.parts.backbone.attention,
      scan_unroll=self.parts.backbone.scan_unroll,
    )

  def init(self, rng: jax.Array, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Fresh parameters {backbone, decoder}. See `Objective.init`.

    The backbone's positions start as sines and cosines, and are learned from there on (MAE keeps them fixed).
    """
    del batch  # Sizes are the parts'.
    keys = jax.random.split(rng)
    output, backbone, moments = self.parts.init_backbone(keys[0])
    width = output.pooled.shape[-1]
    position_TD = jnp.asarray(sincos_position(self._grid, width))
    position_1TD = jnp.concatenate([jnp.zeros((1, width)), position_TD])[None]
    patches_11SD = output.patches.reshape(1, 1, -1, width)[:, :, :1]
    encoded = ((output.pooled, patches_11SD),) * len(self._decoder.outputs)
    decoder = self._decoder.init(keys[1], encoded, jnp.zeros((1, 1), jnp.int32))['params']
    params = {'backbone': {**backbone, 'pos_embed': position_1TD}, 'decoder': decoder}
    return params, statistics_state(self.parts, moments, runs_teacher=False)

  def loss(
    self,
    params: Params,
    teacher: Params | None,
    extra: Any,
    batch: Batch,
    rng: jax.Array,
    step: jax.Array,
  ) -> LossOutput:
    """The squared error of what the decoder says of the dropped patches. See `Objective.loss`."""
    del teacher, step  # A teacher may be kept to be judged; the loss needs none.
    keys_BV = view_keys(rng, batch['index'], batch['views'].shape[1])

    # 1. The views, the patches that stay visible, and the targets of the others.
    def prepare(view_BVHWC, keys_BV):
      return self._hidden(augmented_normalised(self.parts, view_BVHWC, keys_BV), keys_BV)

    seen = over_batch(prepare, batch['views'], keys_BV)
    # 2. The encoder sees the visible patches alone (section 3).
    drop_keys_N = fold(keys_BV, DROP_PATH).reshape(-1)
    student, extra = encode(
      self.parts,
      'student',
      params,
      extra,
      seen.image_NHWC,
      drop_keys_N,
      visible_NS=seen.visible_NS,
      **self._encoding,
    )
    # 3. The decoder predicts the others; the error is averaged over them.
    error_LN = self._errors(self._predict(params, student, seen), seen)
    error_L = jnp.mean(error_LN, axis=1)
    loss = self._total(error_L)
    metrics = {'loss': loss, 'loss_reconstruction': loss}
    if len(error_L) > 1:
      metrics |= {f'loss_level_{level}': error for level, error in enumerate(error_L, start=1)}
    return LossOutput(
      loss=loss, metrics=metrics | statistics.feature_statistics(student.pooled), extra=extra
    )

  def evaluate(
    self, params: Params, teacher: Params | None, extra: Any, batch: Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """The error on held-out images beside that of predicting zero, the mean. See `Objective.evaluate`."""
    del teacher  # It has no decoder.
    valid_B = batch['valid'].astype(jnp.float32)

    def prepare(image_BHWC, keys_B):
      return self._hidden(normalise(to_float(image_BHWC), self.parts.mean, self.parts.std), keys_B)

    keys_B = sample_keys(rng, batch['index'], 0)
    seen = over_batch(prepare, batch['views'][:, 0], keys_B)
    output, _ = self.parts.encode(
      params['backbone'],
      statistics_of(extra, 'student'),
      seen.image_NHWC,
      visible_NS=seen.visible_NS,
      **self._encoding,
    )
    predictions = self._predict(params, output, seen)
    sums = {'count': jnp.sum(valid_B)}
    for name, guesses in (
      ('', predictions),
      ('_of_mean', tuple(jnp.zeros_like(guess) for guess in predictions)),
    ):
      error_N = self._total(self._errors(guesses, seen))
      sums[f'reconstruction{name}'] = jnp.sum(valid_B * error_N)
    return sums

  def _hidden(self, image_NHWC: jax.Array, keys: jax.Array) -> Hidden:
    mask_keys_N = fold(keys, MASK).reshape(-1)
    visible_NS, masked_NT = patch_masks.random_visible(mask_keys_N, self._tokens, self.mask_ratio)
    return Hidden(image_NHWC, visible_NS, masked_NT, self._targets(image_NHWC))

  @property
  def _encoding(self) -> dict[str, Any]:
    """How the backbone is asked for the levels' features: all of them after the final norm."""
    return {'layers': self._layers, 'normalise_layers': True}

  def _predict(self, params: Params, output: BackboneOutput, seen: Hidden) -> tuple[jax.Array, ...]:
    encoded = tuple(output.layers[layer] for layer in self._layers)
    encoded = encoded or ((output.pooled, output.patches),)
    return self._decoder.apply({'params': params['decoder']}, encoded, seen.visible_NS)

  def _errors(self, guesses: tuple[jax.Array, ...], seen: Hidden) -> jax.Array:
    """Mean squared error over the dropped patches, [L, N]."""
    masked_NT = seen.masked_NT.astype(jnp.float32)
    errors_LNT = jnp.stack(
      [
        jnp.mean(jnp.square(guess_NTK - target_NTK), axis=-1)
        for guess_NTK, target_NTK in zip(guesses, seen.targets, strict=True)
      ]
    )
    return jnp.sum(errors_LNT * masked_NT, axis=-1) / jnp.sum(masked_NT, axis=-1)

  def _total(self, error_L: jax.Array) -> jax.Array:
    """The levels' weighted sum, over the first axis."""
    return jnp.tensordot(jnp.asarray(self._weights, jnp.float32), error_L, axes=1)


@dataclasses.dataclass(frozen=True)
class Mae(MaskedModelling):
  """MAE: the pixels of the dropped patches are rebuilt.

  Attributes:
    normalise_pixels: whether each patch is judged by its own mean and deviation: yes [C].
  """

  normalise_pixels: bool

  def _targets(self, image_NHWC: jax.Array) -> tuple[jax.Array, ...]:
    patches_NhwK = to_patches(image_NHWC, self.parts.patch)
    patch_NTK = patches_NhwK.reshape(len(image_NHWC), self._tokens, -1)
    if self.normalise_pixels:
      mean_NT1 = jnp.mean(patch_NTK, axis=-1, keepdims=True)
      variance_NT1 = jnp.var(patch_NTK, axis=-1, keepdims=True, ddof=1)
      patch_NTK = (patch_NTK - mean_NT1) * jax.lax.rsqrt(variance_NT1 + _EPSILON)
    return (patch_NTK,)

  @property
  def _layers(self) -> tuple[int, ...]:
    return ()

  @property
  def _weights(self) -> tuple[float, ...]:
    return (1.0,)
