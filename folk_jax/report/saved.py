"""What lies in a run's folder beside its checkpoints, read without trust: mistakes in it are said in one line."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from folk_jax import checkpoint
from folk_jax.data import DataSettings, ViewSettings
from folk_jax.errors import UserError
from folk_jax.evals import results as results_lib
from folk_jax.signal.augment import Augmentation

_NUMBER, _LIST = (int, float), (list,)
# Fields that every page takes, and what they are.
_FIELDS: dict[str, tuple[type, ...]] = {
  'batch_size': (int,),
  'data.mean': _LIST,
  'data.name': (str,),
  'data.path': (str,),
  'data.source': (str,),
  'data.std': _LIST,
  'epochs': _NUMBER,
  'evaluation.feature': (str,),
  'image_size': (int,),
  'model.depth': (int,),
  'model.dtype': (str,),
  'model.name': (str,),
  'model.width': (int,),
  'objective.name': (str,),
  'teacher.enabled': (bool,),
  'total_steps': (int,),
  'views': (dict,),
}
_AT_LEAST_ONE = 'batch_size', 'image_size', 'model.depth', 'model.width', 'model.patch'
_FILTER = {'clamp': (bool,), 'com_probability': _NUMBER, 'filter': (str,), 'portions': _LIST}
_FILTER |= {'radius': _NUMBER, 'ranking': (str,)}
_DECODER = {f'decoder_{name}': (int,) for name in ('depth', 'heads', 'width')}
_DECODER |= {'mask_ratio': _NUMBER}
# Those that the pictures of a method take.
_OF_OBJECTIVE: dict[str, dict[str, tuple[type, ...]]] = {
  'folk': _FILTER,
  'mfm': _FILTER,
  'super_resolution': {'factor': (int,)},
  'deblur': {'kernel_sizes': _LIST, 'sigma': _NUMBER},
  'denoise': {'sigma': _NUMBER},
  'ibot': {'mask_ratio': _NUMBER, 'mask_ratio_spread': _NUMBER},
  'mae': _DECODER | {'normalise_pixels': (bool,)},
  'wavelet_mim': _DECODER | {'layers': _LIST, 'wavelet': (str,)},
}
_OF_MODEL: dict[str, dict[str, tuple[type, ...]]] = {'vit': {'patch': (int,)}}


def read_config(folder: epath.Path) -> ml_collections.ConfigDict:
  """A run's configuration, with tuples for lists, as a recipe has them.

  Raises:
    UserError: no run there; or a file that is damaged, with the field that is missing or of another type.
  """
  file = folder / 'config.json'
  try:
    found = checkpoint.read_json(file)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(
      f'{folder} holds no run: there is no {file.name} in it; give the --workdir of a run'
    ) from error
  except OSError as error:
    raise UserError(f'{file} cannot be read: {error.strerror or error}') from error
  for field, kinds in _FIELDS.items():
    _check(file, found, field, kinds)
  for part, tables in (('objective', _OF_OBJECTIVE), ('model', _OF_MODEL)):
    for field, kinds in tables.get(found[part]['name'], {}).items():
      _check(file, found, f'{part}.{field}', kinds)
  _check_views(file, found)
  known = {field.name for field in dataclasses.fields(DataSettings)} | {'mean', 'std'}
  for name in found['data']:
    if name not in known:
      raise UserError(f'{file} is damaged: data.{name} is no field of the data')
  return ml_collections.ConfigDict(_with_tuples(found))


def _check(file: epath.Path, found: Mapping[str, Any], field: str, kinds: tuple[type, ...]) -> None:
  """Raises where a file has no such field, or another thing there."""
  value: Any = found
  for name in field.split('.'):
    if not isinstance(value, dict) or name not in value:
      raise UserError(f'{file} is damaged: it lacks the field {field}')
    value = value[name]
  if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
    expected = ' or '.join(kind.__name__ for kind in kinds)
    raise UserError(f'{file} is damaged: {field} is a {type(value).__name__}, expected {expected}')
  if field in _AT_LEAST_ONE and value < 1:
    raise UserError(f'{file} is damaged: {field} is {value}, expected at least 1')


def _check_views(file: epath.Path, found: Mapping[str, Any]) -> None:
  parts = [f'views.{name}' for name in found['views'] if '.' not in name]
  if 'local_views' in found:
    _check(file, found, 'local_views.count', (int,))
    if found['local_views']['count']:
      _check(file, found, 'local_views.size', (int,))
      parts.append('local_views')
  for part in parts:
    for kind in (Augmentation, ViewSettings):
      for field in dataclasses.fields(kind):
        _check(file, found, f'{part}.{field.name}', (object, bool))


def _with_tuples(node: Any) -> Any:
  """JSON has lists where a recipe has tuples."""
  if isinstance(node, dict):
    return {key: _with_tuples(value) for key, value in node.items()}
  return tuple(map(_with_tuples, node)) if isinstance(node, list) else node


def read_results(
  folder: epath.Path, more: Sequence[str], notices: list[str]
) -> dict[str, Mapping[str, Any]]:
  """results.json of a folder and of the folders in it, where there are any; and those that are asked for.

  Raises:
    UserError: one that is asked for cannot be read. Others of that name may be somebody else's: `notices` has them.
  """
  nearby = [folder / 'results.json']
  if folder.is_dir():
    nearby += sorted(one / 'results.json' for one in folder.iterdir() if one.is_dir())
  found = {}
  for file in nearby:
    if file.exists():
      try:
        found[str(file.relative_to(folder))] = results_lib.read(file)
      except UserError as error:
        notices.append(f'An evaluation is left out: {error}')
  for name in more:
    path = epath.Path(name).expanduser()
    found[name] = results_lib.read(path / 'results.json' if path.is_dir() else path)
  return found


def read_machine(folder: epath.Path) -> dict[str, Any]:
  """What the run wrote of its machine, {} where it didn't."""
  try:
    return checkpoint.read_json(folder / 'machine.json')
  except (OSError, UserError):
    return {}
