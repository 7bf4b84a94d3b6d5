"""The keys of samples: each (step, sample, view) its own, whatever the place in the batch."""

import jax
import jax.numpy as jnp
import numpy as np

from folk_jax.objectives.base import sample_keys


def test_sample_keys_differ_by_rng_index_and_view():
  index_B = jnp.array([5, 0, 17, 2**31 - 1])
  keys = {
    (seed, view): np.asarray(jax.random.key_data(sample_keys(jax.random.key(seed), index_B, view)))
    for seed in (0, 1)
    for view in (0, 1)
  }
  assert len({tuple(row) for rows in keys.values() for row in rows}) == 16
  order = np.array([3, 1, 0, 2])
  permuted = jax.random.key_data(sample_keys(jax.random.key(0), index_B[order], 1))
  np.testing.assert_array_equal(permuted, keys[0, 1][order])
