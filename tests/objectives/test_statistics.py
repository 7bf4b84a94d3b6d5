"""Feature statistics on batches whose spread and rank are known, and on eight devices."""

import json

import numpy as np
import pytest

from folk_jax.objectives.statistics import feature_statistics


def statistics(features):
  return {name: float(value) for name, value in feature_statistics(np.float32(features)).items()}


@pytest.mark.parametrize('width', [2, 5, 64])
def test_directions_spread_evenly(width):
  axes = np.concatenate([np.eye(width), -np.eye(width)])
  # Covariance I / D exactly: each deviation 1 / sqrt(D), D equal eigenvalues.
  assert statistics(axes) == pytest.approx({'feature_std': 1.0, 'effective_rank': width}, rel=1e-5)


def test_variance_in_three_of_eight_directions():
  axes = np.concatenate([np.eye(8)[:3], -np.eye(8)[:3]])
  # Three deviations of 1 / sqrt(3) and five zeros, averaged, times sqrt(8).
  expected = {'feature_std': 3 / 3**0.5 / 8 * 8**0.5, 'effective_rank': 3}
  assert statistics(axes) == pytest.approx(expected, rel=1e-5)


def test_unequal_variances_by_hand():
  # Unit vectors (+-0.6, +-0.8, 0) in all signs: variances 0.36 and 0.64, so 1 / (0.36^2 + 0.64^2).
  features = [[a * 0.6, b * 0.8, 0.0] for a in (-1, 1) for b in (-1, 1)]
  expected = {'feature_std': 1.4 / 3 * 3**0.5, 'effective_rank': 1 / (0.36**2 + 0.64**2)}
  assert statistics(features) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('scale', [0.0, 1.0, 1e4])
def test_a_batch_that_collapsed_to_a_point(scale):
  features = np.tile(np.random.default_rng(0).normal(size=(1, 32)), (16, 1)) * scale
  assert statistics(features) == pytest.approx(
    {'feature_std': 0.0, 'effective_rank': 0.0}, abs=1e-4
  )


def test_a_line_has_rank_one():
  rng = np.random.default_rng(0)
  features = np.outer(rng.choice([-1.0, 1.0], 64), rng.normal(size=16))
  assert statistics(features)['effective_rank'] == pytest.approx(1.0, rel=1e-5)


def test_matches_the_eigenvalues_of_numpys_covariance():
  features = (
    np.random.default_rng(0).normal(size=(40, 12)) @ np.diag(np.geomspace(1, 0.1, 12)) + 0.3
  )
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  values = np.linalg.eigvalsh(np.cov(unit.T, bias=True))
  expected = {
    'feature_std': unit.std(axis=0).mean() * 12**0.5,
    'effective_rank': values.sum() ** 2 / np.square(values).sum(),
  }
  assert statistics(features) == pytest.approx(expected, rel=1e-5)


def test_scale_of_images_and_rotation_of_features():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(40, 12)) + 0.5
  rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
  plain = statistics(features)
  assert statistics(features * rng.uniform(0.1, 10, (40, 1))) == pytest.approx(plain, rel=1e-4)
  assert statistics(features @ rotation)['effective_rank'] == pytest.approx(
    plain['effective_rank'], rel=1e-4
  )


_EIGHT_DEVICES = """
import json, re
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from folk_jax.objectives import losses, statistics

def numbers(feature, student, teacher, centre):
  out = statistics.feature_statistics(feature)
  out |= losses.distillation_statistics(student, teacher, centre, 0.1, 0.05)
  loss = lambda s: losses.distillation_loss(s, teacher, centre, 0.1, 0.05).mean()
  out['loss'], gradient = jax.value_and_grad(loss)(student)
  out['centre'] = losses.updated_centre(centre, teacher, 0.9)
  return out, gradient

rng = np.random.default_rng(0)
arrays = [rng.normal(size=s).astype('float32') for s in ((16, 12), (16, 4, 20), (16, 2, 20), (20,))]
alone = jax.jit(numbers)(*arrays)
mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
rows, whole = (NamedSharding(mesh, P(*axes)) for axes in ((('data', 'fsdp'),), ()))
with jax.set_mesh(mesh):
  placed = [jax.device_put(x, s) for x, s in zip(arrays, (rows, rows, rows, whole))]
  compiled = jax.jit(numbers).lower(*placed).compile()
  spread = compiled(*placed)
pattern = r'all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce'
collectives = sorted(set(re.findall(pattern, compiled.as_text())))
gap = lambda a, b: float(abs(np.asarray(a) - np.asarray(b)).max())
difference = jax.tree.map(gap, alone, spread)
print(json.dumps([jax.device_count(), collectives, max(jax.tree.leaves(difference))]))
"""


def test_eight_devices_agree_and_exchange_sums_only(run_with_devices):
  devices, collectives, difference = json.loads(run_with_devices(_EIGHT_DEVICES))
  assert devices == 8
  assert collectives == ['all-reduce']
  # Sums of 16 rows in another order; the largest number, the effective rank, is about 10.
  assert difference < 1e-5
