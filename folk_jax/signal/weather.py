"""Fog and snow of `corruptions`, of one image each.

Shape letters: H rows, W columns, C channels; n rows and columns of a coarse map.
"""

import jax
import jax.numpy as jnp
from jax import lax

from folk_jax.signal import blurs
from folk_jax.signal.augment import luma


def fog(image_HWC: jax.Array, key: jax.Array, strength: float, decay: float) -> jax.Array:
  """Adds `strength` times a map of clouds, then scales back to the image's own maximum.

  Args:
    image_HWC: float32 in [0, 1].
    key: typed PRNG key.
    strength: of the clouds.
    decay: by what factor their detail falls from one scale to the next.

  Returns:
    float32 [H, W, C], at least 0.
  """
  height, width, _ = image_HWC.shape
  side = 1 << (max(height, width) - 1).bit_length()
  clouds_HW = plasma(key, side, decay)[:height, :width]
  top = jnp.max(image_HWC)
  return (image_HWC + strength * clouds_HW[..., None]) * top / (top + strength)


def plasma(key: jax.Array, side: int, decay: float) -> jax.Array:
  """A fractal height map by the diamond-square algorithm, on a torus.

  Each round doubles the map: square centres first, from their four corners, then the middles of the
  edges, from the two centres and two corners around each; all are means of four plus noise.

  Args:
    key: typed PRNG key.
    side: a power of two.
    decay: the noise is uniform in plus or minus a^2, and a, 100 at first, falls by this factor.

  Returns:
    float32 [side, side] from 0 to 1.
  """
  corner_nn, amplitude = jnp.zeros((1, 1), jnp.float32), 100.0
  # All rounds' noise in one draw, round after round: a draw for each takes XLA seconds to compile.
  draws = jax.random.uniform(key, (side * side - 1,), minval=-1.0, maxval=1.0)
  while (n := corner_nn.shape[0]) < side:
    noise_3nn = amplitude**2 * draws[n * n - 1 : 4 * n * n - 1].reshape(3, n, n)
    below = corner_nn + jnp.roll(corner_nn, -1, 0)
    # Without the barriers XLA computes each map anew wherever it is read, round within round: compiling
    # takes exponentially long.
    centre_nn = lax.optimization_barrier((below + jnp.roll(below, -1, 1)) / 4 + noise_3nn[0])
    right_nn = corner_nn + jnp.roll(corner_nn, -1, 1) + centre_nn + jnp.roll(centre_nn, 1, 0)
    down_nn = corner_nn + jnp.roll(corner_nn, -1, 0) + centre_nn + jnp.roll(centre_nn, 1, 1)
    even = jnp.stack([corner_nn, right_nn / 4 + noise_3nn[1]], axis=-1)
    odd = jnp.stack([down_nn / 4 + noise_3nn[2], centre_nn], axis=-1)
    corner_nn = lax.optimization_barrier(jnp.stack([even, odd], axis=1).reshape(2 * n, 2 * n))
    amplitude /= decay
  map_nn = corner_nn - jnp.min(corner_nn)
  return map_nn / jnp.max(map_nn)


def snow(
  image_HWC: jax.Array,
  key: jax.Array,
  mean: float,
  deviation: float,
  size: float,
  threshold: float,
  radius: int,
  sigma: float,
  shade: float,
) -> jax.Array:
  """Whitens the image and adds falling flakes, twice: as drawn and turned by half a circle.

  Args:
    image_HWC: float32 in [0, 1].
    key: typed PRNG key.
    mean: of the Gaussian noise that the flakes are the peaks of.
    deviation: of that noise.
    size: by which factor the noise is enlarged.
    threshold: noise below it is no flake.
    radius: of the motion blur, whose angle is uniform in [-135, -45] degrees.
    sigma: of the motion blur.
    shade: share of the image that is not whitened.

  Returns:
    float32 [H, W, C], at least 0.
  """
  height, width, _ = image_HWC.shape
  noise_key, angle_key = jax.random.split(key)
  layer_HW1 = mean + deviation * jax.random.normal(noise_key, (height, width, 1))
  layer_HW1 = blurs.along_both(
    layer_HW1, blurs.zoom_matrix(height, size), blurs.zoom_matrix(width, size)
  )
  layer_HW1 = jnp.where(layer_HW1 < threshold, 0, jnp.clip(layer_HW1, 0, 1))
  angle = jax.random.uniform(angle_key, minval=-135.0, maxval=-45.0)
  layer_HW1 = blurs.motion(layer_HW1, angle, radius, sigma)
  grey_HW1 = jnp.moveaxis(luma(jnp.moveaxis(image_HWC, -1, 0)[None])[0], 0, -1)
  white_HWC = jnp.maximum(image_HWC, 1.5 * grey_HW1 + 0.5)
  image_HWC = shade * image_HWC + (1 - shade) * white_HWC
  return image_HWC + layer_HW1 + jnp.flip(layer_HW1, (0, 1))
