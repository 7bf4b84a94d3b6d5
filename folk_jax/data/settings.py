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
class MaskSettings:
  """What masks hold and how pairs are cut.

  Attributes:
    classes: K; classes are numbered from 0.
    ignore: id in [K, 255] of pixels that don't count.
    height, width: of the canvas in pixels on which whole images are evaluated, with padding to the right and below;
      larger images are scaled down to it.
    short_side: pixels to which an image's short side is brought before anything else; 0 keeps its own.
    scale: range of the random factor of training, drawn uniformly; above 0.
    category_max_ratio: a crop of which one class covers this share or more is drawn anew, ten times at most; 1 for
      none, 0.75 in UPerNet's common recipe.
  """

  classes: int
  ignore: int
  height: int
  width: int
  short_side: int = 0
  scale: tuple[float, float] = (0.5, 2.0)
  category_max_ratio: float = 1.0

  def __post_init__(self):
    object.__setattr__(self, 'scale', tuple(self.scale))
    if not 2 <= self.classes <= 255:
      raise UserError(f'data.masks.classes is {self.classes}; give 2 to 255')
    if not self.classes <= self.ignore <= 255:
      raise UserError(
        f'data.masks.ignore is {self.ignore}; give an id from {self.classes} (the number of classes) to 255'
      )
    if min(self.height, self.width) < 1 or self.short_side < 0:
      raise UserError(
        f'data.masks has height {self.height}, width {self.width} and short_side {self.short_side}; give pixels, and '
        '0 as short_side to keep an image its size'
      )
    if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
      raise UserError(f'data.masks.scale is {self.scale}; give two numbers with 0 < low <= high')
    if not 0 < self.category_max_ratio <= 1:
      raise UserError(
        f'data.masks.category_max_ratio is {self.category_max_ratio}; give a share in (0, 1]'
      )


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Where images come from and how they are cut.

  Attributes:
    source: 'embedded', 'folder', 'mask_folder', 'tfds', 'array_record' or 'synthetic'.
    image_size: side of every view in pixels.
    views: how each random view is cut, one entry a view.
    local_views: small crops beside them, or None.
    masks: what masks hold and how pairs are cut (a mapping of all fields of `MaskSettings` will do), or None.
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
    decode_seconds: a sample that takes longer to decode counts as failed; 0 for no limit.
    validation: share of the training split that is held out of it, evenly spread, as a split of its own; in [0, 1).
    limit: use this many samples, evenly spread over the data set; 0 uses all.
    images_a_class: train on so many images of each class, drawn at random; 0 for all.
    label_share: train on this share of each class's images, 1 of each at least; 0 for all.
    label_seed: of either draw, 0 or more; with one seed, a draw holds every smaller one.
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
  decode_seconds: float = 60.0
  limit: int = 0
  validation: float = 0.0
  images_a_class: int = 0
  label_share: float = 0.0
  label_seed: int = 0
  local_views: LocalViewSettings | None = None
  masks: MaskSettings | None = None

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
    leasts = {'threads': 1, 'prefetch': 1} | dict.fromkeys(
      ('workers', 'limit', 'images_a_class', 'label_seed'), 0
    )
    for field, least in leasts.items():
      value = getattr(self, field)
      if value < least:
        raise UserError(f'data.{field} is {value}; give {least} or more')
    if not 0 <= self.validation < 1:
      raise UserError(f'data.validation is {self.validation}; give a share in [0, 1)')
    self._check_labels()
    if not 0 <= self.max_bad_share <= 1:
      raise UserError(f'data.max_bad_share is {self.max_bad_share}; give a share in [0, 1]')
    if not self.decode_seconds >= 0:
      raise UserError(
        f'data.decode_seconds is {self.decode_seconds}; give seconds, or 0 for no limit'
      )
    if self.masks is not None:
      self._check_masks()

  def _check_labels(self) -> None:
    if not 0 <= self.label_share <= 1:
      raise UserError(
        f'data.label_share is {self.label_share}; give a share in (0, 1], or 0 for all'
      )
    if self.images_a_class and self.label_share:
      raise UserError(
        f'data.images_a_class is {self.images_a_class} and data.label_share {self.label_share:g}; set one of them, '
        'and the other to 0'
      )
    if (self.images_a_class or self.label_share) and self.masks is not None:
      raise UserError(
        'data.images_a_class and data.label_share draw by the class of an image, and with data.masks there is none; '
        'set both to 0 (data.limit takes fewer images)'
      )

  def _check_masks(self) -> None:
    if not isinstance(self.masks, MaskSettings):
      known = {field.name for field in dataclasses.fields(MaskSettings)}
      if wrong := sorted(set(self.masks) ^ known):
        state = 'unknown' if wrong[0] in self.masks else 'missing'
        raise UserError(
          f'data.masks.{wrong[0]} is {state}; its fields are {", ".join(sorted(known))}'
        )
      object.__setattr__(self, 'masks', MaskSettings(**self.masks))
    if self.source not in ('mask_folder', 'embedded'):
      raise UserError(
        f"data.masks is set and data.source is '{self.source}'; masks come from 'mask_folder'"
      )
    if len(self.views) != 1 or self.local_views or self.views[0].randaugment:
      raise UserError(
        'data.masks takes one view, no local views and no randaugment, which would bend images without their masks'
      )
    if min(self.masks.height, self.masks.width) < self.image_size:
      raise UserError(
        f'data.masks has a canvas of {self.masks.height} x {self.masks.width}, smaller than image_size '
        f'{self.image_size}; give at least that'
      )

  @property
  def short_side(self) -> int:
    """Length in pixels of an evaluation image's short side before its centre is cut out."""
    return self.test_resize or int(self.image_size * 256 / 224)
