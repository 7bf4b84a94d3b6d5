"""The settings of the data room, as one frozen dataclass with every field checked."""

import dataclasses

from folk_jax.data.views import INTERPOLATIONS, ViewSettings
from folk_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LocalViewSettings:
  """Small crops beside the views, all cut in one way (DINO, arXiv 2104.14294, section 3.1).

  Attributes:
    count: how many an image, at least 1.
    size: their side in pixels.
    view: how each is cut.
  """

  count: int
  size: int
  view: ViewSettings

  def __post_init__(self):
    if self.count < 1 or self.size < 1:
      raise UserError(
        f'local_views has count {self.count} and size {self.size}; give 1 or more of each, or count 0'
      )


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Where images come from and how they are cut.

  Attributes:
    source: 'embedded', 'folder', 'tfds', 'array_record' or 'synthetic'.
    image_size: side of every view in pixels.
    views: how each random view is cut, one entry a view.
    local_views: small crops beside them, or None.
    name: the TFDS data set, perhaps with config and version ('imagenet2012',
      'oxford_iiit_pet:4.*.*').
    path: the folder of images, of array records, or TFDS's data_dir (or one prepared set's own
      folder).
    train_split: name of the training split; for TFDS also a sub-split such as 'train[:90%]'.
    test_split: name of the evaluation split; '' takes the first there is of 'validation', 'val' and
      'test'.
    interpolation: 'bicubic' or 'bilinear'.
    test_resize: short side in pixels before the centre crop; 0 means image_size * 256 / 224.
    workers: decoding processes; 0 decodes in threads of this process.
    threads: decoding threads in each process.
    prefetch: batches that each process holds ready.
    max_bad_share: share of the data set that may fail to decode before the run stops, in [0, 1].
    limit: use this many samples, evenly spread over the data set; 0 uses all.
  """

  source: str
  image_size: int
  views: tuple[ViewSettings, ...] = (ViewSettings(), ViewSettings())
  name: str = ''
  path: str = ''
  train_split: str = 'train'
  test_split: str = ''
  interpolation: str = 'bicubic'
  test_resize: int = 0
  workers: int = 0
  threads: int = 4
  prefetch: int = 4
  max_bad_share: float = 0.01
  limit: int = 0
  local_views: LocalViewSettings | None = None

  def __post_init__(self):
    object.__setattr__(self, 'views', tuple(self.views))
    if self.image_size < 1:
      raise UserError(
        f'image_size is {self.image_size}; give the side of a view in pixels, 1 or more'
      )
    if not self.views:
      raise UserError('data.views is empty; give at least one view')
    if self.interpolation not in INTERPOLATIONS:
      known = ', '.join(INTERPOLATIONS)
      raise UserError(f"data.interpolation is '{self.interpolation}'; known: {known}")
    if self.test_resize and self.test_resize < self.image_size:
      raise UserError(
        f'data.test_resize is {self.test_resize}, smaller than image_size {self.image_size}; '
        'give at least that, or 0'
      )
    for field, least in (('workers', 0), ('threads', 1), ('prefetch', 1), ('limit', 0)):
      value = getattr(self, field)
      if value < least:
        raise UserError(f'data.{field} is {value}; give {least} or more')
    if not 0 <= self.max_bad_share <= 1:
      raise UserError(f'data.max_bad_share is {self.max_bad_share}; give a share in [0, 1]')

  @property
  def short_side(self) -> int:
    """Length in pixels of an evaluation image's short side before its centre is cut out."""
    return self.test_resize or int(self.image_size * 256 / 224)
