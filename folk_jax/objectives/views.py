"""From a batch's uint8 views to augmented float images, with one key a sample, view and purpose.

Shape letters: B images, V views, N = B*V views in a row, H, W pixels, C channels.
"""

import jax
import jax.numpy as jnp

from folk_jax.objectives.base import Parts, sample_keys
from folk_jax.signal.augment import Augmentation, augment, normalise

# What a view's key is folded with, so that no two kinds of draw share bits.
AUGMENT, FILTER, DROP_PATH, MASK, CORRUPT = range(5)


def view_keys(rng: jax.Array, index_B: jax.Array, views: int) -> jax.Array:
  """Keys [B, V]: one a sample and view, whatever its place in the batch. See `base.sample_keys`."""
  return jnp.stack([sample_keys(rng, index_B, view) for view in range(views)], axis=1)


def fold(keys: jax.Array, purpose: int) -> jax.Array:
  """The keys for one purpose; any shape."""
  return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys.reshape(-1)).reshape(
    keys.shape
  )


def to_float(image: jax.Array) -> jax.Array:
  """uint8 to float32 in [0, 1]."""
  return image.astype(jnp.float32) / 255.0


def augmented(parts: Parts, view_BVHWC: jax.Array, keys_BV: jax.Array) -> jax.Array:
  """uint8 views to float32 in [0, 1], each by its own settings: [B, V, H, W, C] -> [N, H, W, C], rows ordered (b, v).

  On a mesh, call it through `signal.shard.over_batch`.
  """
  return _augmented(parts.augmentations, view_BVHWC, keys_BV)


def augmented_local(parts: Parts, view_BLhwC: jax.Array, keys_BL: jax.Array) -> jax.Array:
  """As `augmented`, for the local views; normalised."""
  settings = (parts.local_views.augmentation,) * parts.local_views.count
  return normalise(_augmented(settings, view_BLhwC, keys_BL), parts.mean, parts.std)


def augmented_normalised(parts: Parts, view_BVHWC: jax.Array, keys_BV: jax.Array) -> jax.Array:
  """As `augmented`, normalised by the data's mean and deviation: what a backbone takes."""
  return normalise(augmented(parts, view_BVHWC, keys_BV), parts.mean, parts.std)


@jax.named_scope('augment')
def _augmented(
  settings: tuple[Augmentation, ...], view_BVHWC: jax.Array, keys_BV: jax.Array
) -> jax.Array:
  image_BVHWC = jnp.stack(
    [
      augment(to_float(view_BVHWC[:, v]), fold(keys_BV[:, v], AUGMENT), each)
      for v, each in enumerate(settings)
    ],
    axis=1,
  )
  return image_BVHWC.reshape(-1, *image_BVHWC.shape[2:])
