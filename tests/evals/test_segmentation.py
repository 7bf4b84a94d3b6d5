"""The report on whole images: counted as a NumPy twin counts, padding and ignored pixels left out."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.evals import segmentation

CLASSES, IGNORE = 4, 9


@dataclasses.dataclass(frozen=True)
class Red:
  """A network that reads the class from the red channel."""

  classes: int = CLASSES

  def predict(self, params, extra, image_BHWC):
    return (image_BHWC[..., 0] * params['factor']).astype(jnp.int32) % self.classes


def batches(count=3):
  rng = np.random.default_rng(0)
  for number in range(count):
    mask = rng.choice([*range(CLASSES - 1), IGNORE], (2, 1, 5, 6)).astype(np.uint8)
    red = np.where(rng.random(mask.shape) < 0.7, mask, rng.integers(0, CLASSES - 1, mask.shape))
    yield {
      'views': np.repeat(red[..., None], 3, axis=-1).astype(np.uint8),
      'mask': mask,
      'valid': np.array([True, number < count - 1]),
    }


def test_the_report_is_the_twins():
  twin_KK, images, seen = np.zeros((CLASSES, CLASSES), int), 0, []
  for batch in batches():
    for b in np.flatnonzero(batch['valid']):
      images += 1
      for true, guess in zip(
        batch['mask'][b].ravel(), batch['views'][b, ..., 0].ravel(), strict=True
      ):
        if true != IGNORE:
          twin_KK[true, guess % CLASSES] += 1
  found = segmentation.evaluate(
    Red(),
    {'factor': np.int32(1)},
    {},
    batches(),
    keep=lambda batch, guess_BHW: seen.append((batch['views'][:, 0, ..., 0], guess_BHW)),
  )
  np.testing.assert_array_equal(found.confusion_KK, twin_KK)
  assert found.confusion_KK.dtype == np.int64 and found.images == images == 5
  for red_BHW, guess_BHW in seen:
    np.testing.assert_array_equal(guess_BHW, red_BHW % CLASSES)
  both_K, true_K, guessed_K = np.diag(twin_KK), twin_KK.sum(1), twin_KK.sum(0)
  rows = found.rows(['sky', 'road', 'car', 'tree'])
  assert [row['name'] for row in rows] == ['sky', 'road', 'car', 'tree']
  for k, row in enumerate(rows[:3]):
    assert row['iou'] == pytest.approx(both_K[k] / (true_K[k] + guessed_K[k] - both_K[k]))
    assert row['recall'] == pytest.approx(both_K[k] / true_K[k])
    assert row['share'] == pytest.approx(true_K[k] / twin_KK.sum())
  assert rows[3]['share'] == 0 and np.isnan(rows[3]['recall'])
  there = [row['iou'] for row in rows if not np.isnan(row['iou'])]
  assert found.scores['miou'] == pytest.approx(np.mean(there))


def test_names_and_images_are_needed():
  report = segmentation.Report(np.eye(2, dtype=np.int64), 1)
  assert report.rows()[1]['name'] == 'class 1'
  with pytest.raises(ValueError, match='3 names for 2 classes'):
    report.rows(['a', 'b', 'c'])
  with pytest.raises(ValueError, match='no valid image'):
    segmentation.evaluate(Red(), {'factor': np.int32(1)}, {}, [])
