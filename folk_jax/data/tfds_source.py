"""Any TFDS data set in ArrayRecord form, read without TensorFlow; prepared on the way where that is
possible.
"""

import difflib
import os
import re
import threading
from typing import Any

from absl import logging

from folk_jax.data.settings import DataSettings
from folk_jax.data.sources import TEST_SPLITS, MissingSplit, Source
from folk_jax.errors import UserError


class TfdsSource(Source):
  """One split of a TFDS data set; images stay encoded until they are decoded like any other
  file's.
  """

  def __init__(self, settings: DataSettings, split: str):
    builder = prepared_builder(settings.name, settings.path)
    self._directory = os.fspath(builder.data_path)
    self._split = _choose_split(builder, settings, split)
    self._image_key, self._label_key = _choose_features(builder)
    if self._label_key:
      self.class_names = tuple(builder.info.features[self._label_key].names)
    self._title = f'{builder.info.full_name}/{self._split}'
    self._close()
    self._length = len(self._records())
    for path in self._shards():
      if not os.path.isfile(path):
        raise UserError(f"shard '{path}' is missing; copy it there or prepare the data set again")

  def _close(self) -> None:
    self._opened: Any = None
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key not in ('_opened', '_lock')}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._close()

  def _records(self) -> Any:
    """Opens the data source once in each process."""
    if self._opened is None:
      with self._lock:
        if self._opened is None:
          tfds = _import_tfds()
          builder = tfds.builder_from_directory(self._directory)
          # Segmentation masks and the like stay encoded too: nobody asks for them.
          decoders = {key: tfds.decode.SkipDecoding() for key in _image_features(builder)}
          try:
            self._opened = builder.as_data_source(split=self._split, decoders=decoders)
          except ValueError as error:
            raise UserError(
              f"split '{self._split}' of '{self._directory}': {error}".splitlines()[0]
            ) from error
    return self._opened

  def _shards(self) -> list[str]:
    """The files of the split, by what array_record keeps to itself; none where it keeps that elsewhere."""
    instructions = getattr(self._records().data_source, '_read_instructions', ())
    return [os.fspath(instruction.filename) for instruction in instructions]

  def __len__(self) -> int:
    return self._length

  def read(self, index: int) -> tuple[bytes, int]:
    records = self._records()
    try:
      record = records[index]
      return record[self._image_key], int(record[self._label_key]) if self._label_key else -1
    except Exception as error:  # array_record's, protobuf's and TFDS's own, of many kinds.
      where = getattr(records.data_source, '_reader_idx_and_position', None)
      shard, position = where(index) if where else (0, index)
      files = self._shards()
      in_shard = (
        f"record {position} of '{os.path.basename(files[shard])}'" if files else 'the record'
      )
      reason = f'{type(error).__name__}: {error}'.splitlines()[0]
      raise OSError(f'{in_shard} cannot be read: {reason}') from error

  def name(self, index: int) -> str:
    return f'{self._title}[{index}]'


def prepared_builder(name: str, path: str) -> Any:
  """Finds a TFDS data set, and prepares it as ArrayRecord where it is missing and can be made.

  Args:
    name: the data set, perhaps with config and version; may be empty where `path` is one prepared
      set's own folder.
    path: TFDS's data_dir, or the folder of one prepared set; '' means TFDS's default
      (~/tensorflow_datasets).

  Returns:
    The builder, prepared.

  Raises:
    UserError: unknown, missing and not to be made here, or prepared in a format without random
      access.
  """
  tfds = _import_tfds()
  if path and os.path.isfile(os.path.join(path, 'dataset_info.json')):
    builder = tfds.builder_from_directory(path)
  elif not name:
    raise UserError(
      "data.name is empty; source 'tfds' needs a data set's name (:data=tfds,name=cifar10), or "
      'as data.path the folder that holds its dataset_info.json'
    )
  else:
    builder = _named_builder(tfds, name, path)
  if not _is_prepared(builder):
    builder = _prepare(tfds, builder, name, path)
  found = builder.info.file_format
  if found is None or found.value != 'array_record':
    form = found.value if found else 'unknown'
    raise UserError(
      f"TFDS set at '{builder.data_path}' is prepared as {form}, which has no random access "
      f'without TensorFlow; in another data_dir, {_how_to_prepare(name or builder.name, "DIR")}'
    )
  return builder


def _is_prepared(builder: Any) -> bool:
  """TFDS warns that a set that is not prepared is not; our own line says that, with the cure."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    return builder.is_prepared()
  finally:
    logging.set_verbosity(verbosity)


def _import_tfds() -> Any:
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f"data.source 'tfds' needs tensorflow-datasets ({error}); run: "
      'pip install tensorflow-datasets'
    ) from error
  return tfds


def _how_to_prepare(name: str, path: str) -> str:
  out = f' --out={path}' if path else ''
  how = f'run: launch/prepare_data.sh --from=tfds --name={name}{out}'
  if re.split('[/:]', name)[0] == 'imagenet2012':
    how += (
      '; or, without TensorFlow, launch/prepare_data.sh --from=imagenet_tars --source=TARS '
      '--out=DIR and :data=array_record,path=DIR'
    )
  return how


def _named_builder(tfds: Any, name: str, path: str) -> Any:
  base = re.split('[/:]', name)[0]
  known = tfds.list_builders(with_community_datasets=False)
  # A set that only its files know (one's own builder, prepared elsewhere) is found by its folder.
  if base not in known and not (path and os.path.isdir(os.path.join(path, base))):
    near = difflib.get_close_matches(base, known, n=3)
    hint = f'did you mean {" or ".join(near)}?' if near else 'see tensorflow.org/datasets/catalog'
    where = f" and there is no '{base}' under '{path}'" if path else ''
    raise UserError(
      f"unknown TFDS set '{name}': it is none of the {len(known)} that TFDS knows{where}; {hint}"
    )
  try:
    return tfds.builder(name, data_dir=path or None)
  except (ValueError, AssertionError, tfds.core.DatasetNotFoundError) as error:
    raise UserError(f"TFDS set '{name}': {error}".splitlines()[0]) from error


def _prepare(tfds: Any, builder: Any, name: str, path: str) -> Any:
  """Downloads a set and prepares it as ArrayRecord; words what stands in the way."""
  missing = f"TFDS set '{name}' is not prepared at '{builder.data_dir}'"
  try:
    # TFDS writes nothing without it, and says so only after it has made folders and printed a page.
    import importlib_resources  # noqa: F401

    builder = tfds.builder(name, data_dir=path or None, file_format='array_record')
    builder.download_and_prepare()
    return builder
  except ImportError as error:
    raise UserError(
      f'{missing}, and preparing it needs TensorFlow ({error}): '
      f"pip install 'folk_jax[prepare]', then {_how_to_prepare(name, path)}"
    ) from error
  except AssertionError as error:  # TFDS's way to ask for files that must be fetched by hand
    raise UserError(f'{missing}: {error}'.replace('\n', ' ')) from error
  except OSError as error:
    raise UserError(
      f'{missing}, and the download failed ({error}); {_how_to_prepare(name, path)}'
    ) from error


def _choose_split(builder: Any, settings: DataSettings, split: str) -> str:
  known = list(builder.info.splits)
  wanted = settings.train_split if split == 'train' else settings.test_split
  if not wanted:
    wanted = next((name for name in TEST_SPLITS if name in known), '')
  if re.split(r'[\[+]', wanted)[0] not in known:
    raise MissingSplit(
      f"TFDS set '{builder.info.full_name}' has no split '{wanted or ' / '.join(TEST_SPLITS)}'; "
      f'known: {", ".join(known)}; set data.{split}_split'
    )
  return wanted


def _image_features(builder: Any) -> list[str]:
  tfds = _import_tfds()
  features = builder.info.features
  return [key for key in features if isinstance(features[key], tfds.features.Image)]


def _choose_features(builder: Any) -> tuple[str, str]:
  """Returns the keys of the image and of the class label ('' where there is none)."""
  tfds = _import_tfds()
  features = builder.info.features
  images = _image_features(builder)
  labels = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
  if not images:
    raise UserError(
      f"TFDS set '{builder.info.full_name}' has no image feature; it has {', '.join(features)}"
    )
  image = 'image' if 'image' in images else images[0]
  label = 'label' if 'label' in labels else (labels[0] if labels else '')
  return image, label
