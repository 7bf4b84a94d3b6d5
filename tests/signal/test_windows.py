"""Sliding windows and confusion matrices: laws, numbers by hand, slow NumPy twins.

Shape letters: B images, H, W pixels, C channels, K classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.errors import UserError
from folk_jax.signal import windows


def test_starts_by_hand():
  assert windows.starts(480, 192, 128) == (0, 128, 256, 288)
  assert windows.starts(512, 512, 341) == (0,)
  assert windows.starts(683, 512, 341) == (0, 171)
  assert windows.starts(384, 192, 192) == (0, 192)


@pytest.mark.parametrize('stride', range(1, 6))
def test_windows_cover_every_pixel_and_none_lies_outside(stride):
  for size in range(5, 25):
    covered = np.zeros(size, int)
    for start in windows.starts(size, 5, stride):
      assert 0 <= start <= size - 5
      covered[start : start + 5] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize(('window', 'stride'), [(5, 0), (5, 6), (11, 5)])
def test_windows_that_leave_gaps_are_refused(window, stride):
  with pytest.raises(UserError, match='do not cover a side of 10'):
    windows.starts(10, window, stride)


@pytest.fixture(scope='module')
def image():
  return np.float32(np.random.default_rng(0).normal(size=(2, 11, 14, 3)))


def test_what_sees_only_its_own_pixel_comes_back(image):
  found = jax.jit(lambda x: windows.slide(lambda window: 2 * window, x, 5, 3))(image)
  # A sum of at most four equal terms, divided by their number.
  np.testing.assert_allclose(found, 2 * image, rtol=3e-7)


def test_scores_of_overlapping_windows_are_averaged(image):
  def predict(window):
    return jnp.cumsum(jnp.cumsum(window, axis=1), axis=2)  # Depends on where the window begins.

  found = jax.jit(lambda x: windows.slide(predict, x, 5, 4))(image)
  total, count = np.zeros(image.shape), np.zeros(image.shape)
  for top in (0, 4, 6):
    for left in (0, 4, 8, 9):
      here = np.s_[:, top : top + 5, left : left + 5]
      total[here] += image[here].astype(np.float64).cumsum(1).cumsum(2)
      count[here] += 1
  # Sums of 25 float32 numbers of order 1.
  np.testing.assert_allclose(found, total / count, atol=1e-5)


def test_confusion_is_the_twin_exactly():
  rng = np.random.default_rng(1)
  classes, ignore = 5, 7
  guess_BHW = rng.integers(0, classes, (4, 9, 6))
  truth_BHW = rng.choice([*range(classes), ignore, 255], (4, 9, 6)).astype(np.uint8)
  valid_B = np.array([True, True, False, True])
  twin_KK = np.zeros((classes, classes), int)
  for b, row, column in np.ndindex(guess_BHW.shape):
    if valid_B[b] and truth_BHW[b, row, column] < classes:
      twin_KK[truth_BHW[b, row, column], guess_BHW[b, row, column]] += 1
  found_KK = jax.jit(windows.confusion, static_argnums=3)(guess_BHW, truth_BHW, valid_B, classes)
  assert found_KK.dtype == jnp.int32
  np.testing.assert_array_equal(found_KK, twin_KK)


def test_scores_by_hand():
  # Class 0: 3 of 4 found, 1 guessed wrongly: 3 / 5. Class 1: 4 of 6, 1 wrong: 4 / 7. Class 2 is not there but guessed
  # once: 0. Class 3 is neither: it doesn't count.
  confusion_KK = np.array([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
  iou_K = windows.intersection_over_union(confusion_KK)
  np.testing.assert_allclose(iou_K, [3 / 5, 4 / 7, 0, np.nan])
  assert windows.scores(confusion_KK) == pytest.approx(
    {
      'miou': (3 / 5 + 4 / 7) / 3,
      'pixel_accuracy': 0.7,
      'mean_accuracy': (3 / 4 + 4 / 6) / 2,
      'constant_miou': 0.6 / 2,
      'constant_pixel_accuracy': 0.6,
    }
  )
  assert set(windows.scores(np.zeros((2, 2))).values()) == {0.0}


def test_the_constant_guess_is_what_its_own_confusion_scores():
  confusion_KK = np.random.default_rng(2).integers(1, 50, (4, 4))
  truth_K = confusion_KK.sum(1)
  guesses = [np.zeros((4, 4)) for _ in range(4)]
  for k, guess_KK in enumerate(guesses):
    guess_KK[:, k] = truth_K
  best = max(windows.scores(guess_KK)['miou'] for guess_KK in guesses)
  assert windows.scores(confusion_KK)['constant_miou'] == pytest.approx(best)


def test_eight_devices_equal_one(run_with_devices):
  printed = run_with_devices("""
    import jax, numpy as np
    import jax.numpy as jnp
    from folk_jax.signal import windows
    from folk_jax.train import sharding

    rng = np.random.default_rng(0)
    image_BHWC = np.float32(rng.normal(size=(8, 6, 7, 4)))
    truth_BHW = rng.integers(0, 6, (8, 6, 7))
    valid_B = np.arange(8) < 7

    def count(image_BHWC, truth_BHW, valid_B):
      guess_BHW = jnp.argmax(windows.slide(jnp.sin, image_BHWC, 4, 2), axis=-1)
      return windows.confusion(guess_BHW, truth_BHW, valid_B, 4)

    alone = jax.jit(count)(image_BHWC, truth_BHW, valid_B)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
      rows = [sharding.put(x, mesh) for x in (image_BHWC, truth_BHW, valid_B)]
      print(len(mesh.devices.ravel()), np.array_equal(jax.jit(count)(*rows), alone), int(alone.sum()))
  """)
  devices, equal, pixels = printed.split()
  assert devices == '8' and equal == 'True' and 100 < int(pixels) < 7 * 42
