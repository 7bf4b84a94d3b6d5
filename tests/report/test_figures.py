"""What sections say, by hand: reconstructions of each kind of filter, scores by step, neighbours."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from folk_jax.report import figures, of_run, rebuild

FILTERED = {'com_probability': 0.5, 'ranking': 'shared', 'radius': 4.0, 'clamp': False}
FILTERED |= {'name': 'folk', 'portions': (0.1,)}


@pytest.fixture
def image_NHWC():
  return np.random.default_rng(0).random((1, 16, 16, 3), np.float32)


@pytest.fixture
def answers(monkeypatch):
  """Students answer 0.25 everywhere."""
  monkeypatch.setattr(rebuild, '_answer', lambda network, params, seen: jnp.full_like(seen, 0.25))


def rebuilt(settings, image_NHWC):
  return rebuild.rebuild(None, {'reconstruction': {}}, settings, image_NHWC)


def test_what_a_fourier_filter_removed_is_what_it_did_not_leave(image_NHWC, answers):
  com, rcom = rebuilt(FILTERED | {'filter': 'com_rcom'}, image_NHWC)
  for one in (com, rcom):
    # Float32 transforms of 256 numbers in [0, 1].
    np.testing.assert_allclose(one.seen_NHWC + one.target_NHWC, image_NHWC, atol=2e-5)
    np.testing.assert_allclose(one.seen_NHWC + one.answer_NHWC, one.rebuilt_NHWC, atol=2e-5)
  # A constant has no coefficient but the mean, which RCom removes and Com keeps.
  np.testing.assert_allclose(com.answer_NHWC, 0, atol=2e-5)
  np.testing.assert_allclose(rcom.answer_NHWC, 0.25, atol=2e-5)


def test_wavelets_have_no_mask_and_their_whole_answer_is_called_so(image_NHWC, answers):
  found = rebuilt(FILTERED | {'filter': 'wavelet'}, image_NHWC)
  assert len(found) == 2
  for one in found:
    assert one.target_NHWC is None and one.answer_NHWC is None
    np.testing.assert_array_equal(one.rebuilt_NHWC, np.full_like(image_NHWC, 0.25))
  # Kept and removed bands add up to the image: float32 sums of at most 256 numbers in [0, 1].
  np.testing.assert_allclose(found[0].seen_NHWC + found[1].seen_NHWC, image_NHWC, atol=2e-5)
  photo = figures.Photo((255 * image_NHWC[0]).astype(np.uint8), '')
  (card, _) = figures.rebuilt_section([photo], found, None, None).body
  assert 'Student&#x27;s answer' in card
  assert 'What was removed' not in card and 'Put together' not in card


@pytest.mark.parametrize('own', [True, False])
def test_what_mae_borrows_is_said_where_it_borrows(own, image_NHWC, monkeypatch):
  masked_Nhw = np.ones((1, 2, 2), bool)
  said_NTK = jnp.zeros((1, 4, 192))
  monkeypatch.setattr(rebuild, '_decoded', lambda *arguments: (masked_Nhw, [said_NTK]))
  network = types.SimpleNamespace(
    mean=(0.5,) * 3, std=(0.25,) * 3, backbone=types.SimpleNamespace(stride=8)
  )
  settings = {'name': 'mae', 'mask_ratio': 0.75, 'normalise_pixels': own}
  (one,) = rebuild.rebuild(network, {'decoder': {}}, settings, image_NHWC)
  # An answer of 0 is the patch's own mean, or the mean of all images.
  mean = image_NHWC[0, :8, :8].mean() if own else 0.5
  np.testing.assert_allclose(one.rebuilt_NHWC[0, :8, :8], mean, atol=1e-5)
  photo = figures.Photo((255 * image_NHWC[0]).astype(np.uint8), '')
  section = figures.rebuilt_section([photo], [one], None, None)
  assert ('those of the original' in section.intro) == own


def cells(section, read_page) -> list[str]:
  return read_page(section.body[0]).text


def test_scores_stand_under_their_steps(read_page):
  lines = [{'step': step, 'eval/knn_top1': step / 1000} for step in (0, 100, 250)]
  lines[1]['eval/linear_top1'] = 0.5
  lines[2]['eval/late'] = 0.75
  lines.insert(0, {'step': 0, 'train/loss': 1.0})
  text = cells(figures.evaluation_section(lines, {}), read_page)
  assert 'step 0 step 250 change' in text
  assert 'knn top1 0 0.25 0.25' in text
  assert 'linear top1 (step 100) 0.5' in text
  assert 'late 0.75' in text


def test_change_is_of_the_steps_that_are_said(read_page):
  lines = [{'step': 0, 'eval/a': 0}, {'step': 10, 'eval/b': 1}, {'step': 20, 'eval/b': 4}]
  lines.append({'step': 30, 'eval/a': 0})
  text = cells(figures.evaluation_section(lines, {}), read_page)
  assert 'b (step 10) 1 (step 20) 4 3' in text


def test_the_best_checkpoint_is_called_so_and_has_its_own_error():
  weights = of_run.Weights('', 20, {}, {}, {}, {})
  (notice,) = of_run._notices(40, 40, weights, True)
  assert notice == 'Pictures are of the best checkpoint, step 20.'
  (notice,) = of_run._notices(40, 40, weights, False)
  assert notice == 'Pictures are of the newest checkpoint, step 20.'
  names = 'eval/reconstruction', 'eval/reconstruction_of_mean'
  lines = [{'step': step, names[0]: step / 100, names[1]: 1.0} for step in (0, 20, 40)]
  lines += [{'step': 20, 'train/loss': 1.0}, {'step': 30, 'train/loss': 1.0}]
  assert of_run._errors(lines, 20) == (0.2, 1.0)
  assert of_run._errors(lines, 30) == (None, None)


@pytest.mark.parametrize('stand_in', [False, True])
def test_neighbours_are_counted_where_they_are_the_runs(stand_in, read_page):
  cat, dog = (figures.Photo(np.zeros((8, 8, 3), np.uint8), name) for name in ('cat', 'dog'))
  rows = [figures.Neighbours(cat, [cat, dog], [0.9, 0.8])]
  section = figures.neighbours_section(rows, 8, 'student', 'pooled', stand_in)
  text = read_page(section.body[0]).text
  assert ('1 of 2 have the class of their query' in text) == (not stand_in)
  assert ('✓' in text) == (not stand_in)
  assert ('held-out' in text) == (not stand_in)
  assert ('training images' in section.intro) == (not stand_in)
