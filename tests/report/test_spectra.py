"""What the filters are said to leave: hand-worked numbers, and masks that are the filters' own."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from folk_jax.errors import UserError
from folk_jax.report import explorer, images, spectra
from folk_jax.signal.filters import FILTERS, Filter


def of(name: str, portions=(0.25,), ranking: str = 'shared') -> Filter:
  return Filter(name, tuple(portions), 0.5, ranking, 16.0, clamp=False)


def waves(height: int = 8, width: int = 8) -> np.ndarray:
  """1/2 + cos(2 pi x / W) / 4 + cos(2 pi 2 y / H) / 8, the same in all channels: float32 [H, W, 3].

  A wave of amplitude a has two coefficients of a H W / 2, the mean one of H W / 2: energies as 1/4 to 2 (1/8)^2 to
  2 (1/16)^2, which is 32 to 4 to 1.
  """
  y_H1, x_W = np.arange(height)[:, None], np.arange(width)
  image_HW = 0.5 + np.cos(2 * np.pi * x_W / width) / 4 + np.cos(4 * np.pi * y_H1 / height) / 8
  return np.repeat(image_HW[..., None], 3, axis=-1).astype(np.float32)


def test_energies_and_counts_by_hand():
  # Three of the 64 coefficients: the mean and the stronger wave.
  com, rcom = spectra.under_filter(waves(), of('com_rcom', (3 / 64,)))
  assert (com.keep, rcom.keep) == (True, False)
  assert (com.coefficients, rcom.coefficients) == (3, 61)
  # float32 transforms of values of order 1.
  assert com.energy == pytest.approx(36 / 37, abs=1e-6)
  assert com.energy_without_mean == pytest.approx(4 / 5, abs=1e-6)
  assert rcom.energy == pytest.approx(1 / 37, abs=1e-6)
  assert rcom.energy_without_mean == pytest.approx(1 / 5, abs=1e-6)
  assert [com.name, rcom.name] == ['Com 4.6875 %', 'RCom 4.6875 %']


def test_a_constant_image_has_no_energy_beside_its_mean():
  constant = np.full((8, 8, 3), 0.7, np.float32)
  assert spectra.energies(constant, constant) == (1.0, 0.0)
  assert spectra.energies(constant, np.zeros_like(constant)) == (0.0, 0.0)


@pytest.mark.parametrize(
  ('name', 'ranking', 'shape'),
  [
    ('com_rcom', 'shared', (8, 8)),
    ('com_rcom', 'per_channel', (7, 9)),
    ('random_block', 'shared', (8, 8)),
    ('radial', 'shared', (7, 9)),
  ],
)
def test_the_mask_drawn_is_the_filters(name, ranking, shape):
  """The full spectrum of what a filter leaves: all that its mask keeps is there, and all else is gone."""
  image_HWC = np.random.default_rng(0).random((*shape, 3), np.float32)
  for left in spectra.under_filter(image_HWC, of(name, ranking=ranking)):
    original, found = (
      np.fft.fftshift(np.fft.fft2(pixels, axes=(0, 1)), axes=(0, 1))
      for pixels in (image_HWC, left.image_HWC)
    )
    # Sums of at most 63 float32 numbers below 1.
    np.testing.assert_allclose(found, np.where(left.kept_HWM, original, 0), atol=2e-5)
    assert left.coefficients == left.kept_HWM.sum((0, 1)).mean()


def test_kept_is_yellow_and_removed_grey():
  image_HWC = np.random.default_rng(0).random((16, 16, 3), np.float32)
  for left in spectra.under_filter(image_HWC, of('com_rcom', (0.1,))):
    drawn_HW3 = images.mask(left.kept_HWM, image_HWC).astype(int)
    yellow_HW = drawn_HW3[..., 0] - drawn_HW3[..., 2] > 50
    grey_HW = (drawn_HW3[..., 0] == drawn_HW3[..., 1]) & (drawn_HW3[..., 1] == drawn_HW3[..., 2])
    np.testing.assert_array_equal(yellow_HW, left.kept_HWM[..., 0])
    np.testing.assert_array_equal(grey_HW, ~left.kept_HWM[..., 0])


@pytest.mark.parametrize('name', sorted(FILTERS))
def test_what_is_kept_and_what_is_removed_share_the_energy(name):
  """Kept and removed are orthogonal, in Fourier coefficients as in Haar's, so that their energies add up to all."""
  image_HWC = np.random.default_rng(1).random((16, 16, 3), np.float32)
  found = list(spectra.under_filter(image_HWC, of(name)))
  assert len(found) == (2 if FILTERS[name].keep is None else 1)
  if len(found) == 2:
    assert sum(left.energy for left in found) == pytest.approx(1, abs=1e-5)
    assert sum(left.coefficients for left in found) == 256


def test_an_image_without_its_mean_is_shown_on_grey():
  image_HWC = waves()
  np.testing.assert_array_equal(images.shown(image_HWC - image_HWC.mean(), image_HWC)[0, 0], 223)
  np.testing.assert_array_equal(images.shown(image_HWC, image_HWC), images.to_uint8(image_HWC))


@pytest.fixture
def photo(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
  file = tmp_path / '<b>&"photo".png'
  Image.fromarray(pixels).save(file)
  return file


def test_a_photograph_under_every_filter(photo, tmp_path, read_page):
  out = explorer.explore(str(photo), str(tmp_path / 'page.html'), portions=(0.1, 0.3), size=16)
  text = pathlib.Path(out).read_text()
  page = read_page(text)
  assert page.sections == ['com-1', 'others-1']
  assert '<b>&"' not in text and '<b>&"photo".png' in page.text
  for name in set(FILTERS) - {'com', 'rcom', 'low_pass', 'high_pass'}:
    assert name in page.text
  for name in ('Com 10 %', 'RCom 10 %', 'Com 30 %', 'RCom 30 %'):
    assert name in page.text
  assert all(image['src'].startswith('data:image/') for image in page.of('img'))


def test_a_sheet_is_a_picture_of_all(photo, tmp_path):
  out = explorer.explore(str(photo), str(tmp_path / 'sheet.png'), portions=(0.1,), size=16)
  with Image.open(out) as sheet:
    assert sheet.format == 'PNG' and min(sheet.size) > 1000


def test_filters_are_chosen_by_name(photo, tmp_path, read_page):
  chosen = {'portions': (0.1,), 'size': 16, 'filters': ['com_rcom']}
  with Image.open(explorer.explore(str(photo), str(tmp_path / 'row.jpg'), **chosen)) as sheet:
    assert sheet.format == 'JPEG' and sheet.size[1] < sheet.size[0]
  out = explorer.explore(str(photo), str(tmp_path / 'a.html'), **chosen | {'filters': ['gabor']})
  page = read_page(pathlib.Path(out).read_text())
  assert page.sections == ['others-1'] and 'wavelet_random' not in page.text


def test_a_folder_has_sections_for_each(photo, tmp_path, read_page):
  Image.new('RGB', (16, 16), 'red').save(photo.parent / 'red.jpg')
  (photo.parent / 'notes.txt').write_text('no image')
  page = read_page(
    pathlib.Path(
      explorer.explore(
        str(photo.parent), str(tmp_path / 'a.html'), size=16, filters=('com_rcom', 'radial')
      )
    ).read_text()
  )
  assert page.sections == ['com-1', 'others-1', 'com-2', 'others-2']


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'portions': (0.0,)}, 'portions'),
    ({'portions': ()}, 'portions'),
    ({'size': 4}, '--size=4'),
    ({'out': 'page.pdf'}, '.html'),
    ({'filters': ['radial', 'low_pass']}, 'low_pass is unknown; give some of com_rcom'),
    ({'path': 'absent.png'}, 'cannot be read'),
    ({'path': 'text.png'}, 'no image'),
    ({'path': 'empty'}, 'holds no image'),
  ],
)
def test_mistakes_are_said_in_one_line(options, said, photo, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'text.png').write_text('hello')
  (tmp_path / 'empty').mkdir()
  arguments = {'path': str(photo), 'out': 'page.html', 'size': 16} | options
  with pytest.raises(UserError, match=re.escape(said)) as raised:
    explorer.explore(**arguments)
  assert '\n' not in str(raised.value)
  assert not (tmp_path / 'page.html').exists()
