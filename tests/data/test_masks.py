"""Images with masks: cut alike, padded with the ignore id, refused in words, carried by the stream."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from folk_jax.data import (
  DataSettings,
  LocalViewSettings,
  MaskSettings,
  ViewSettings,
  eval_batches,
  make_source,
  masks,
  train_batches,
)
from folk_jax.errors import UserError

CLASSES, IGNORE, SIDE = 4, 9, 16
FIELDS = {
  'classes': CLASSES,
  'ignore': IGNORE,
  'height': 24,
  'width': 32,
  'short_side': 0,
  'scale': (0.5, 2.0),
  'category_max_ratio': 1.0,
}


def mask_settings(**fields):
  return MaskSettings(**FIELDS | fields)


def settings(path, masks=FIELDS, **fields):
  given = {'image_size': SIDE, 'views': (ViewSettings(),), 'interpolation': 'bilinear'} | fields
  return DataSettings(source='mask_folder', path=str(path), masks=masks, **given)


def random_pair(image_HWC, mask_HW, rng, size=SIDE, flip=0.5, **fields):
  wanted = mask_settings(**{'classes': 250, 'ignore': 255} | fields)
  return masks.random_pair(image_HWC, mask_HW, size, wanted, flip, cv2.INTER_LINEAR, rng)


def ramps(height=56, width=64):
  """An image whose red is the column and green the row, and a mask that numbers its 8 x 8 blocks."""
  row_HW, column_HW = np.mgrid[:height, :width].astype(np.uint8)
  image_HWC = np.stack([column_HW, row_HW, row_HW], axis=-1)
  return image_HWC, (row_HW // 8 * 16 + column_HW // 8).astype(np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Six pairs of 20 x 28 pixels or a little less, train and val."""
  root = tmp_path_factory.mktemp('pairs')
  rng = np.random.default_rng(0)
  for split, count in (('train', 6), ('val', 3)):
    for kind in ('images', 'masks'):
      (root / split / kind).mkdir(parents=True)
    for number in range(count):
      mask_HW = rng.integers(0, CLASSES, (20 - number, 28), np.uint8)
      mask_HW[0, :3] = IGNORE
      # The image shows its mask: red is the id times 20. PNG, so that it does so exactly.
      image_HWC = np.repeat(20 * mask_HW[..., None], 3, axis=2)
      Image.fromarray(image_HWC).save(root / split / 'images' / f'a{number}.png')
      Image.fromarray(mask_HW).save(root / split / 'masks' / f'a{number}.png')
  return root


@pytest.mark.parametrize('scale', [0.3, 0.5, 0.8, 1.0, 1.7, 2.0])
def test_image_and_mask_are_scaled_cropped_and_flipped_alike(scale):
  image_HWC, mask_HW = ramps()
  rng = np.random.default_rng(3)
  flipped = 0
  for _ in range(20):
    view_SSC, mask_SS = random_pair(image_HWC, mask_HW, rng, scale=(scale, scale))
    down, across = np.divmod(mask_SS.astype(int), 16)
    inside = mask_SS != 255
    assert inside.all()  # 0.3 * 56 is more than the crop's 16.
    for ramp_SS, block_SS in ((view_SSC[..., 0], across), (view_SSC[..., 1], down)):
      # Half a pixel between the mask's pixel and the image's position, half a level of rounding.
      assert np.all(ramp_SS >= 8 * block_SS - 1) and np.all(ramp_SS <= 8 * block_SS + 8)
    flipped += view_SSC[0, 0, 0] > view_SSC[0, -1, 0]
  assert 0 < flipped < 20


def test_a_small_image_is_padded_right_and_below():
  image_HWC, mask_HW = np.full((10, 12, 3), 7, np.uint8), np.ones((10, 12), np.uint8)
  view_SSC, mask_SS = random_pair(
    image_HWC, mask_HW, np.random.default_rng(0), flip=0, scale=(1, 1)
  )
  assert np.all(mask_SS[:10, :12] == 1) and np.all(view_SSC[:10, :12] == 7)
  assert (mask_SS == 255).sum() == 16 * 16 - 120
  assert np.all(view_SSC[mask_SS == 255] == masks.PADDING)


def test_category_max_ratio_redraws_crops_of_one_class():
  image_HWC, mask_HW = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
  mask_HW[:, 28:36] = 1
  mask_HW[32:] = 255  # Doesn't count as a class.

  def shares(ratio):
    rng = np.random.default_rng(0)
    for _ in range(40):
      count = np.bincount(
        random_pair(image_HWC, mask_HW, rng, scale=(1, 1), category_max_ratio=ratio)[1].ravel(),
        minlength=256,
      )[:2]
      yield count.max() / max(count.sum(), 1)

  # By hand: a column lands where the stripe covers a quarter for 13 of 49, rows with labels for 32 or so of 49:
  # one draw in six, so five in six after ten.
  good, plain = (np.mean([0 < s < 0.75 for s in shares(ratio)]) for ratio in (0.75, 1.0))
  assert good > 0.6 and plain < 0.35


def test_the_whole_pair_on_its_canvas():
  rng = np.random.default_rng(0)
  mask_HW = rng.integers(0, CLASSES, (20, 28), np.uint8)
  image_HWC = np.repeat(mask_HW[..., None], 3, axis=2)
  view_HWC, found_HW = masks.whole_pair(image_HWC, mask_HW, mask_settings(), cv2.INTER_LINEAR)
  assert view_HWC.shape == (24, 32, 3) and found_HW.shape == (24, 32)
  np.testing.assert_array_equal(found_HW[:20, :28], mask_HW)
  np.testing.assert_array_equal(view_HWC[:20, :28], image_HWC)
  assert np.all(found_HW[20:] == IGNORE) and np.all(found_HW[:, 28:] == IGNORE)
  # 40 x 40 on 24 x 32: scaled by 24 / 40; a short side of 10: 10 x 14.
  for side, fields, shape in (((40, 40), {}, (24, 24)), ((20, 28), {'short_side': 10}, (10, 14))):
    mask_HW = np.zeros(side, np.uint8)
    image_HWC = np.zeros((*side, 3), np.uint8)
    wanted = mask_settings(**fields)
    _, found_HW = masks.whole_pair(image_HWC, mask_HW, wanted, cv2.INTER_LINEAR)
    inside = np.argwhere(found_HW != IGNORE)
    assert tuple(inside.max(0) + 1) == shape and len(inside) == shape[0] * shape[1]


def test_the_stream_carries_masks(folder):
  wanted = settings(folder, masks=FIELDS | {'scale': (1.0, 1.0)})
  source = make_source(wanted, 'train')
  assert len(source) == 6 and source.label(0) == -1 and source.class_names[1] == 'class 1'

  def first(workers):
    given = settings(folder, masks=FIELDS | {'scale': (1.0, 1.0)}, workers=workers)
    with train_batches(source, given, seed=0, step=2, batch_size=8) as batches:
      return next(batches)

  batch = first(workers=0)
  assert batch['views'].shape == (8, 1, SIDE, SIDE, 3) and batch['mask'].shape == (8, 1, SIDE, SIDE)
  assert batch['mask'].dtype == np.uint8
  labelled = batch['mask'] < CLASSES
  np.testing.assert_array_equal(batch['views'][..., 0][labelled], 20 * batch['mask'][labelled])
  assert len(np.unique(batch['mask'])) == CLASSES + 1
  for name, rows in first(workers=1).items():
    np.testing.assert_array_equal(rows, batch[name])

  test = make_source(wanted, 'test')
  with eval_batches(test, wanted, batch_size=2) as batches:
    first_batch, last = list(batches)
  assert first_batch['mask'].shape == (2, 1, 24, 32)
  np.testing.assert_array_equal(first_batch['mask'][1, 0, :19, :28], test.mask(1))
  assert last['valid'].tolist() == [True, False]
  limited = make_source(settings(folder, limit=2), 'train')
  np.testing.assert_array_equal(limited.mask(1), source.mask(3))


def test_embedded_photographs_come_with_masks():
  """For recipes that are tried without data: the class of a pixel is its photograph."""
  wanted = DataSettings(
    source='embedded',
    image_size=32,
    views=(ViewSettings(),),
    masks=FIELDS | {'classes': 200} | {'ignore': 255, 'height': 72, 'width': 72},
  )
  source = make_source(wanted, 'test')
  with eval_batches(source, wanted, batch_size=40) as batches:
    batch = next(batches)
  for row, mask_HW in enumerate(batch['mask'][:, 0]):
    side = source.box(row)[-1]
    assert np.all(mask_HW[:side, :side] == batch['label'][row])
    assert np.all(mask_HW[side:] == 255) and np.all(mask_HW[:, side:] == 255)


def png(array, mode=None):
  file = io.BytesIO()
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(file, 'PNG')
  return file.getvalue()


def test_masks_that_cannot_be_are_named():
  ids_HW = np.array([[0, 3, IGNORE]], np.uint8)
  np.testing.assert_array_equal(masks.decode_mask(png(ids_HW), 'a', mask_settings()), ids_HW)
  palette = Image.fromarray(ids_HW, 'L')
  palette.putpalette(list(range(255, -1, -1)) * 3)
  file = io.BytesIO()
  palette.save(file, 'PNG')
  np.testing.assert_array_equal(masks.decode_mask(file.getvalue(), 'a', mask_settings()), ids_HW)
  for data, complaint in (
    (
      png(np.array([[0, 4, 5, 5]], np.uint8)),
      r"'m.png' holds id 4 and 1 more; expected 0..3 or .* 9",
    ),
    (png(ids_HW, 'RGB'), "'m.png' has mode RGB"),
    (b'no image', "'m.png' cannot be read"),
  ):
    with pytest.raises(UserError, match=complaint):
      masks.decode_mask(data, 'm.png', mask_settings())


def test_files_that_do_not_pair_up_are_named(tmp_path):
  with pytest.raises(UserError, match='has no mask for b.jpg, c.jpg, d.jpg and 1 more'):
    masks.pair_names('r', ['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg', 'e.jpg'], ['a.png'])
  with pytest.raises(UserError, match="'r' has no image for b.png"):
    masks.pair_names('r', ['a.jpg'], ['b.png', 'a.png'])
  with pytest.raises(UserError, match='holds both a.jpeg and a.jpg'):
    masks.pair_names('r', ['a.jpg', 'a.jpeg'], ['a.png'])
  (tmp_path / 'train' / 'images').mkdir(parents=True)
  with pytest.raises(UserError, match=r"no folder '.*train/masks'"):
    make_source(settings(tmp_path), 'train')


def test_sizes_that_differ_are_named(folder, tmp_path):
  for kind, shape in (('images', (20, 28, 3)), ('masks', (20, 27))):
    (tmp_path / 'train' / kind).mkdir(parents=True)
    Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / 'train' / kind / 'a.png')
  wanted = settings(tmp_path)
  with (
    pytest.raises(UserError, match=r"images/a.png' has 28 x 20 pixels and its mask 27 x 20"),
    train_batches(make_source(wanted, 'train'), wanted, seed=0, step=0, batch_size=1) as batches,
  ):
    next(batches)
  (tmp_path / 'classes.txt').write_text('sky\nroad\n')
  with pytest.raises(UserError, match='names 2 classes and data.masks.classes is 4'):
    make_source(wanted, 'train')
  (tmp_path / 'classes.txt').write_text('sky\nroad\ncar\ntree\n')
  assert make_source(wanted, 'train').class_names == ('sky', 'road', 'car', 'tree')


def test_settings_that_contradict_each_other_are_refused(folder):
  small = LocalViewSettings(1, 8, ViewSettings())
  for fields, complaint in (
    ({'views': (ViewSettings(),) * 2}, 'one view'),
    ({'views': (ViewSettings(randaugment='rand-m9-mstd0.5-inc1'),)}, 'no randaugment'),
    ({'local_views': small}, 'no local views'),
    ({'image_size': 25}, 'canvas of 24 x 32, smaller than image_size 25'),
  ):
    with pytest.raises(UserError, match=complaint):
      settings(folder, **fields)
  with pytest.raises(UserError, match="data.source is 'folder'"):
    DataSettings(source='folder', image_size=8, views=(ViewSettings(),), masks=FIELDS)
  with pytest.raises(UserError, match='data.masks.heigth is unknown; its fields are category_max'):
    settings(folder, masks=FIELDS | {'heigth': 3})
  with pytest.raises(UserError, match='data.masks.scale is missing'):
    settings(folder, masks={name: FIELDS[name] for name in FIELDS if name != 'scale'})
  with pytest.raises(UserError, match='needs config.data.masks'):
    make_source(settings(folder, masks=None), 'train')
  for fields, complaint in (
    ({'classes': 1}, 'classes is 1'),
    ({'ignore': 3}, 'ignore is 3'),
    ({'height': 0}, 'height 0'),
    ({'scale': (0.0, 1.0)}, 'scale is'),
    ({'category_max_ratio': 0.0}, 'category_max_ratio is 0.0'),
  ):
    with pytest.raises(UserError, match=complaint):
      mask_settings(**fields)
