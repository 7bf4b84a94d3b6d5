"""What `folk_jax.data.prepare` is to write: the splits, shards and samples of a folder or of the
ImageNet tars.
"""

import dataclasses
import functools
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator

import numpy as np

from folk_jax.data import decode, tars
from folk_jax.data.folder import FolderSource
from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import TEST_SPLITS
from folk_jax.errors import UserError

TRAIN_TAR = 'ILSVRC2012_img_train.tar'
VAL_TAR = 'ILSVRC2012_img_val.tar'
DEVKIT_TAR = 'ILSVRC2012_devkit_t12.tar.gz'
_DEVKIT = 'ILSVRC2012_devkit_t12/data/'
_IMAGES_PER_CLASS = 1300
_MAX_CLASS_BYTES = 1 << 34


@dataclasses.dataclass(frozen=True)
class Sample:
  """One image file: its bytes, its label (-1 unknown), what messages call it, and its share of the
  progress bar.
  """

  data: bytes
  label: int
  name: str
  weight: int


@dataclasses.dataclass(frozen=True)
class Shard:
  """Samples that one file will hold, read when `samples` is called; `weight` is their part of the
  progress bar.
  """

  samples: Callable[[], Iterator[Sample]]
  weight: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """One split of a data set. Equal fingerprints mean equal shards, so that a resumed run may keep
  them.
  """

  split: str
  class_names: tuple[str, ...]
  shards: tuple[Shard, ...]
  unit: str
  fingerprint: str


def _fingerprint(*parts: object) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def plan_folder(root: str, shard_samples: int) -> list[Plan]:
  """Plans every split that `data.source=folder` finds under a folder.

  Args:
    root: the folder.
    shard_samples: images in a shard.

  Returns:
    A plan for 'train', and one for each of 'validation', 'val' and 'test' that is there.

  Raises:
    UserError: no such folder, no images, a class in one split that training lacks.
  """
  # The settings ask for an image size, which a plan has no use for.
  settings = DataSettings(source='folder', path=root, image_size=1)
  sources = {'train': FolderSource(settings, 'train')}
  for name in TEST_SPLITS:
    if os.path.isdir(os.path.join(root, name)) and os.path.isdir(os.path.join(root, 'train')):
      sources[name] = FolderSource(dataclasses.replace(settings, test_split=name), 'test')
  plans = []
  for split, source in sources.items():
    starts = range(0, len(source), shard_samples)
    ranges = [range(start, min(start + shard_samples, len(source))) for start in starts]
    shards = tuple(Shard(functools.partial(_from_folder, source, r), len(r)) for r in ranges)
    listing = hashlib.sha256(
      '\n'.join(source.name(i) for i in range(len(source))).encode('utf-8', 'replace')
    )
    fingerprint = _fingerprint('folder', listing.hexdigest(), shard_samples)
    plans.append(Plan(split, sources['train'].class_names, shards, 'img', fingerprint))
  return plans


def _from_folder(source: FolderSource, indices: range) -> Iterator[Sample]:
  for index in indices:
    try:
      data, label = source.read(index)
    except OSError as error:
      raise UserError(
        f"'{source.name(index)}' cannot be read ({error}); mend or remove it"
      ) from error
    yield Sample(data, label, source.name(index), 1)


def plan_imagenet_tars(root: str, shard_samples: int) -> list[Plan]:
  """Plans ImageNet-1K from its original tars, without unpacking them.

  Args:
    root: the folder of ILSVRC2012_img_train.tar and, for 'validation', ILSVRC2012_img_val.tar and
      the devkit tar.
    shard_samples: images in a shard, about: a training shard holds whole classes.

  Returns:
    A plan for 'train' and, where the tar is there, for 'validation'. Classes are the WordNet ids,
    sorted.

  Raises:
    UserError: no training tar, a validation tar without the devkit, a tar that cannot be read.
  """
  train_tar, val_tar = os.path.join(root, TRAIN_TAR), os.path.join(root, VAL_TAR)
  if not os.path.isfile(train_tar):
    raise UserError(f"no {TRAIN_TAR} in '{root}'; download it from image-net.org into that folder")
  # A class is a tar of some hundred megabytes.
  members = sorted(_members(train_tar, _MAX_CLASS_BYTES), key=lambda member: member.name)
  wnids = tuple(os.path.splitext(os.path.basename(member.name))[0] for member in members)
  per_shard = max(1, shard_samples // _IMAGES_PER_CLASS)
  shards = []
  for start in range(0, len(members), per_shard):
    chosen = list(enumerate(members))[start : start + per_shard]
    weight = sum(member.size for _, member in chosen)
    shards.append(Shard(functools.partial(_from_class_tars, train_tar, chosen), weight))
  sizes = [(member.name, member.size) for member in members]
  plans = [Plan('train', wnids, tuple(shards), 'B', _fingerprint('tars', sizes, per_shard))]
  if os.path.isfile(val_tar):
    labels = _validation_labels(root, wnids)
    members = sorted(_members(val_tar), key=lambda member: member.name)
    if len(members) != len(labels):
      raise UserError(
        f"'{val_tar}' holds {len(members)} images, the devkit {len(labels)} labels; download "
        'both again'
      )
    chunks = [
      slice(start, start + shard_samples) for start in range(0, len(members), shard_samples)
    ]
    shards = [
      Shard(
        functools.partial(_from_flat_tar, val_tar, members[chunk], labels[chunk]),
        sum(member.size for member in members[chunk]),
      )
      for chunk in chunks
    ]
    sizes = [(member.name, member.size) for member in members]
    plans.append(
      Plan(
        'validation', wnids, tuple(shards), 'B', _fingerprint('tars', sizes, labels, shard_samples)
      )
    )
  return plans


def _members(path: str, most: int = decode.MAX_BYTES) -> list[tarfile.TarInfo]:
  with tars.reading(path), tarfile.open(path, 'r:') as tar:  # Not compressed: any part is at hand.
    return list(tars.files(tar, path, most))


def _from_class_tars(path: str, chosen: list[tuple[int, tarfile.TarInfo]]) -> Iterator[Sample]:
  with tars.reading(path), tarfile.open(path, 'r:') as outer:
    for label, member in chosen:
      what = f'{path}: {member.name}'
      with tars.reading(what), tarfile.open(fileobj=outer.extractfile(member), mode='r:') as inner:
        for file in tars.files(inner, what):
          yield Sample(tars.read(inner, file), label, file.name, file.size)


def _from_flat_tar(
  path: str, members: list[tarfile.TarInfo], labels: list[int]
) -> Iterator[Sample]:
  with tars.reading(path), tarfile.open(path, 'r:') as tar:
    for member, label in zip(members, labels, strict=True):
      yield Sample(tars.read(tar, member), label, member.name, member.size)


def _validation_labels(root: str, wnids: tuple[str, ...]) -> list[int]:
  """Returns the validation images' classes, in the images' order, as positions in `wnids`."""
  path = os.path.join(root, DEVKIT_TAR)
  if not os.path.isfile(path):
    raise UserError(
      f"{VAL_TAR} needs {DEVKIT_TAR} beside it for its labels; download it into '{root}'"
    )
  from scipy import io as scipy_io

  try:
    truth, meta = tars.read_compressed(
      path, (_DEVKIT + 'ILSVRC2012_validation_ground_truth.txt', _DEVKIT + 'meta.mat')
    )
  except (tarfile.TarError, OSError, EOFError, KeyError) as error:
    raise UserError(
      f"'{path}' is not the ILSVRC2012 devkit ({error}); download it again"
    ) from error
  synsets = np.atleast_1d(scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)['synsets'])
  wnid_of = {int(row['ILSVRC2012_ID']): str(row['WNID']) for row in synsets}
  label_of = {wnid: label for label, wnid in enumerate(wnids)}
  try:
    return [label_of[wnid_of[int(number)]] for number in truth.split()]
  except KeyError as error:
    raise UserError(
      f"the devkit's class {error} is not in {TRAIN_TAR}, which holds {len(wnids)} classes"
    ) from error
