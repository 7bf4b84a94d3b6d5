"""Configurations: string arguments of recipes, sibling recipes, and checks in words. Imports nothing heavy.

A recipe is a file of `configs/` with `get_config(arg)`; `--config=configs/vit_b.py:smoke,data=folder,path=/images`
hands it the text after the colon. This module is all that a recipe imports, so that it loads in milliseconds.
"""

import difflib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from folk_jax.errors import UserError

# A run may be resumed when only these differ: they change what is logged, kept, evaluated or how the same
# computation is laid out, and neither the data stream nor the optimisation.
FREE_TO_CHANGE = (
  'log_every',
  'eval_every',
  'checkpoint',
  'evaluation',
  'logging',
  'report',
  'guard',
  'watchdog',
  'debug',
  'mesh',
  'accumulate',
  'compilation_cache',
  'data.workers',
  'data.threads',
  'data.prefetch',
  'data.max_bad_share',
  'data.decode_seconds',
  'data.path',  # Where the images lie may change; that they are the same ones the loop checks.
  'model.remat',
  'model.attention',
  'model.scan_unroll',
  'spectral_backend',
  'profile_steps',
)

_SPECTRAL_BACKENDS = ('auto', 'fft', 'matmul')
_AT_LEAST_ONE = (
  'batch_size',
  'accumulate',
  'image_size',
  'log_every',
  'model.width',
  'model.depth',
  'model.heads',
  'model.patch',
  'evaluation.batch_size',
)


def unknown(what: str, found: str, known: Iterable[str]) -> UserError:
  """The error for a name that isn't in a table: suggests the nearest name and lists the known ones."""
  known = sorted(known)
  near = difflib.get_close_matches(found, known, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return UserError(f'unknown {what} {found!r}.{hint} Known: {", ".join(known)}.')


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
  """Parses `'smoke,data=folder,path="/a,b"'` against typed defaults.

  Args:
    arg: the text after the recipe's colon, or None. Items are separated by commas; a bare name sets a boolean; a
      value that holds a comma or an equals sign is quoted with ' or ".
    **defaults: the names the recipe knows; a value is read as the type of its default (bool, int, float or str).

  Returns:
    A ConfigDict with every name of `defaults`.

  Raises:
    UserError: for an unknown name (with the nearest known), a value of the wrong type or an open quote.
  """
  values = dict(defaults)
  for item in _split_items(arg or ''):
    name, equals, text = item.partition('=')
    name = name.strip()
    if name not in defaults:
      raise unknown('recipe argument', name, defaults)
    kind = type(defaults[name])
    if not equals and kind is not bool:
      raise UserError(
        f'recipe argument {name!r} needs a value: write {name}=... ({kind.__name__}).'
      )
    values[name] = _convert(name, text, kind) if equals else True
  return ml_collections.ConfigDict(values)


def _split_items(text: str) -> list[str]:
  """Splits on commas outside quotes; quotes are dropped."""
  items, current, quote = [], '', ''
  for char in text:
    if quote:
      quote, current = ('', current) if char == quote else (quote, current + char)
    elif char in '\'"':
      quote = char
    elif char == ',':
      items.append(current)
      current = ''
    else:
      current += char
  if quote:
    raise UserError(f'recipe argument {text!r} opens a quote ({quote}) and never closes it.')
  items.append(current)
  return [item for item in items if item.strip()]


_BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def _convert(name: str, text: str, kind: type) -> Any:
  try:
    return _BOOLEANS[text.strip().lower()] if kind is bool else kind(text)
  except (KeyError, ValueError):
    message = f'recipe argument {name}={text!r} is not of type {kind.__name__}.'
    raise UserError(message) from None


def load_recipe(path: str, arg: str | None = None) -> ml_collections.ConfigDict:
  """The configuration of the recipe file at `path`, for recipes that are a sibling with a few lines changed."""
  name = os.path.splitext(os.path.basename(path))[0]
  spec = importlib.util.spec_from_file_location(f'folk_jax_recipe_{name}', path)
  if spec is None or not os.path.exists(path):
    raise UserError(f'recipe {path!r} not found: give the path of a file such as configs/vit_b.py.')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


def sibling(recipe_file: str, name: str, arg: str | None) -> ml_collections.ConfigDict:
  """`load_recipe` for the file `name` in the folder of `recipe_file` (a recipe's own `__file__`)."""
  return load_recipe(os.path.join(os.path.dirname(os.path.abspath(recipe_file)), name), arg)


def format_arg(values: Mapping[str, Any]) -> str:
  """The text that `parse_arg` reads as `values`; what is False or empty is left out."""
  items = []
  for name, value in values.items():
    if value is True:
      items.append(name)
    elif value is not False and value != '':
      # A quote of one kind stands in quotes of the other.
      text = str(value).replace("'", "'\"'\"'")
      items.append(f"{name}='{text}'")
  return ','.join(items)


def base_recipe(
  recipe_file: str, arg: str | None, *, models: tuple[str, ...], **more: Any
) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
  """The FOLK recipe that another method's recipe starts from.

  Args:
    recipe_file: the method's recipe, its own `__file__`; the base lies beside it.
    arg: the text after its colon: `model=NAME`, `cifar10` for the small model of that kind, what base recipes take
      (smoke, data, name, path), and `more`.
    models: names that `model` may have, each a recipe beside this one; the first is the default.
    **more: further arguments of the method's recipe, with their defaults.

  Returns:
    The base recipe's configuration, and the arguments.

  Raises:
    UserError: an argument that isn't known, or a model that the method has no recipe for.
  """
  passed_on = {'smoke': False, 'data': '', 'name': '', 'path': ''}
  given = parse_arg(arg, model=models[0], cifar10=False, **passed_on, **more)
  if given.model not in models:
    raise unknown('recipe argument model', given.model, models)
  small = given.cifar10 and given.model.startswith('vit')
  items = {name: given[name] for name in passed_on}
  if given.cifar10 and not small:
    items['cifar10'] = True
  base = 'cifar10.py' if small else f'{given.model}.py'
  return sibling(recipe_file, base, format_arg(items)), given


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks what can be checked without devices or data. Raises `UserError` with the first mistake."""
  flat = flatten(config.to_dict())
  for key in _AT_LEAST_ONE:
    if key in flat and flat[key] < 1:
      raise UserError(f'config.{key} is {flat[key]}; it must be at least 1.')
  for key in ('epochs', 'total_steps', 'eval_every', 'profile_steps'):
    if flat[key] < 0:
      raise UserError(f'config.{key} is {flat[key]}; it must not be negative (0 means unset).')
  for key in ('evaluation.which', 'init_which'):
    if flat[key] not in ('teacher', 'student'):
      raise unknown(f'config.{key}', flat[key], ('teacher', 'student'))
  if config.spectral_backend not in _SPECTRAL_BACKENDS:
    raise unknown('config.spectral_backend', config.spectral_backend, _SPECTRAL_BACKENDS)
  if not config.epochs and not config.total_steps:
    raise UserError('config.epochs and config.total_steps are both 0: set one of them.')
  if 'patch' in config.model:
    _check_patches('image_size', config.image_size, config.model.patch)
    if 'local_views' in config and config.local_views.count:
      _check_patches('local_views.size', config.local_views.size, config.model.patch)
  if 'heads' in config.model and config.model.width % config.model.heads:
    raise UserError(
      f'config.model.width {config.model.width} is not a multiple of config.model.heads {config.model.heads}.'
    )
  if config.batch_size % config.accumulate:
    raise UserError(
      f'config.batch_size {config.batch_size} is not a multiple of config.accumulate {config.accumulate}.'
    )
  if flat.get('checkpoint.best'):
    _check_best(config)
  if config.accumulate > 1 and ('reduce', 'pooled') in config.objective.items():
    raise UserError(
      "config.objective.reduce 'pooled' is one mean over the whole batch and config.accumulate is "
      f"{config.accumulate}: use accumulate 1, or reduce 'per_image'."
    )


def _check_best(config: ml_collections.ConfigDict) -> None:
  if config.evaluation.split != 'validation' or not config.data.validation:
    raise UserError(
      f'config.checkpoint.best {config.checkpoint.best!r} chooses by images that are not for testing, and '
      f'config.evaluation.split is {config.evaluation.split!r} with config.data.validation '
      f"{config.data.validation:g}: set split 'validation' and a share to hold out of the training split, such as 0.1."
    )
  if not config.eval_every:
    raise UserError(
      'config.checkpoint.best chooses among evaluations and config.eval_every is 0, one at the end: give it steps.'
    )


def _check_patches(name: str, size: int, patch: int) -> None:
  if size % patch:
    near = sorted({max(patch, size // patch * patch), (size // patch + 1) * patch})
    sizes = ' or '.join(str(n) for n in near)
    raise UserError(
      f'config.{name} {size} is not a multiple of config.model.patch {patch}: use {sizes}.'
    )


def check_layout(batch_size: int, accumulate: int, devices: int, fsdp: int) -> None:
  """Checks that the devices divide the batch and the mesh. Raises `UserError` that says what would do."""
  if fsdp < 1 or devices % fsdp:
    divisors = ', '.join(str(n) for n in range(1, devices + 1) if devices % n == 0)
    raise UserError(
      f'config.mesh.fsdp {fsdp} does not divide the {devices} devices: use one of {divisors}.'
    )
  unit = devices * accumulate
  if batch_size % unit:
    near = sorted({max(unit, batch_size // unit * unit), (batch_size // unit + 1) * unit})
    sizes = ' or '.join(str(n) for n in near)
    raise UserError(
      f'config.batch_size {batch_size} is not a multiple of devices x accumulate = {devices} x {accumulate} = '
      f'{unit}: use {sizes}.'
    )


def to_json(config: ml_collections.ConfigDict) -> str:
  """The whole configuration as indented JSON, keys sorted, tuples as lists."""
  return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + '\n'


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """`{'a': {'b': 1}}` as `{'a.b': 1}`; lists stay values."""
  flat = {}
  for key, value in config.items():
    path = f'{prefix}{key}'
    flat |= flatten(value, f'{path}.') if isinstance(value, Mapping) else {path: value}
  return flat


def check_same_run(
  saved: Mapping[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> None:
  """Refuses to resume `workdir` when `config` differs from its saved one in what changes the run.

  Raises:
    UserError: names the differing keys with both values (four at the most) and says what to do.
  """
  old, new = flatten(saved), flatten(json.loads(to_json(config)))
  differing = [
    key
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not _is_free(key)
  ]
  if differing:
    shown = '; '.join(f'{k} was {old.get(k)!r}, now {new.get(k)!r}' for k in differing[:4])
    more = f'; and {len(differing) - 4} more' if len(differing) > 4 else ''
    raise UserError(
      f'workdir {workdir} holds a run with another configuration: {shown}{more}. '
      'Give another --workdir, or the settings of the run to resume it.'
    )


def _is_free(key: str) -> bool:
  return any(key == free or key.startswith(free + '.') for free in FREE_TO_CHANGE)
