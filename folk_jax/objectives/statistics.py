"""What a batch of features says about collapse. Shape letters: B images, D features."""

import chex
import jax
from jax import numpy as jnp

# Unit vectors that differ by less than rounding have variances about 1e-14 in sum; anything real is
# far above 1e-10.
_NO_SPREAD = 1e-10


def feature_statistics(feature_BD: jax.Array) -> dict[str, jax.Array]:
  """How far the features of a batch spread and over how many directions. No gradient.

  The features are L2-normalised first, so that their scale does not matter. Both numbers come from
  sums over images of size D and D x D: on a sharded batch that is an all-reduce, and no image's
  features leave their device.

  Args:
    feature_BD: features, [B, D], any float dtype, at least two rows for the numbers to mean
      anything.

  Returns:
    float32 scalars:
    `feature_std`: standard deviation of each dimension over the batch, averaged over dimensions,
      times sqrt(D): 1 for directions spread evenly over the sphere, 0 where all images share one
      feature.
    `effective_rank`: participation ratio of the eigenvalues of the covariance, (sum l)^2 / sum l^2:
      n where the variance lies evenly in n directions, at most min(B - 1, D), 0 where there is no
      variance.

  Source: SimSiam, https://arxiv.org/abs/2011.10566, section 4.1 (standard deviation). The
  participation ratio: Gao et al., "A theory of multineuronal dimensionality, dynamics and
  measurement", bioRxiv 214262. It stands in for the entropy-based effective rank (Roy and Vetterli,
  EUSIPCO 2007), because trace and Frobenius norm need no eigenvalues, which a TPU finds slowly.
  """
  chex.assert_rank(feature_BD, 2)
  feature_BD = jax.lax.stop_gradient(feature_BD).astype(jnp.float32)
  norm_B1 = jnp.linalg.norm(feature_BD, axis=1, keepdims=True)
  unit_BD = feature_BD / jnp.maximum(norm_B1, 1e-12)
  batch, width = feature_BD.shape

  # Centred before the product: mean(x x^T) - mean(x) mean(x)^T cancels where features lie close.
  centred_BD = unit_BD - unit_BD.mean(axis=0)
  covariance_DD = (
    jnp.einsum('bd,be->de', centred_BD, centred_BD, precision=jax.lax.Precision.HIGHEST) / batch
  )
  variance_D = jnp.diagonal(covariance_DD)
  trace = variance_D.sum()
  squares = jnp.maximum(jnp.square(covariance_DD).sum(), _NO_SPREAD**2)
  return {
    'feature_std': jnp.sqrt(variance_D).mean() * width**0.5,
    'effective_rank': jnp.square(trace) / squares,
  }
