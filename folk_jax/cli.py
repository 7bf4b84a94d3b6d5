"""How every command starts and ends: flags, mistakes said in one line, and the exit status.

A mistake of the user's (`UserError`, an unknown flag or config key, a value that does not parse, a
config file that is not there) is one line `error: ...` on stderr and exit status 2. Anything else
is a defect: traceback and status 1. No jax is imported here: a mistyped flag is answered at once.
"""

import difflib
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections.config_flags import config_flags

from folk_jax.errors import UserError

_HELP_FLAGS = ('help', 'helpshort', 'helpfull', 'helpxml', '?', 'only_check_flags')
# How ml_collections words an error inside get_config: a defect of the recipe, not a typo.
_RECIPE_FAILED = 'Error whilst parsing config file'
_LOOKUP_ERRORS = (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError)


def run(main: Callable[[Sequence[str]], Any]) -> NoReturn:
  """Parses absl flags, calls `main(argv)` and leaves the process with the right exit status.

  Args:
    main: takes argv without its flags (the program's name alone: positional arguments are refused);
      what it returns goes to `sys.exit`.

  Raises:
    SystemExit: 0 done or help printed, 2 a mistake of the user's, 130 interrupted. Every other
      exception passes through, so that Python prints its traceback and exits with 1.
  """
  # jax says at INFO that a machine without a TPU has none.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  try:
    app.run(main, flags_parser=_parse_flags)
  except UserError as error:
    print(f'error: {one_line(str(error))}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)


def one_line(message: str) -> str:
  """Folds line breaks and the indentation around them into single spaces."""
  return re.sub(r'\s*[\r\n]+\s*', ' ', message.strip())


def nearest(name: str, known: Iterable[str]) -> str:
  """Ends an error's line with `; did you mean 'x'?`, or the known names where none is near."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  if close:
    return f'; did you mean {close[0]!r}?'
  return f'; known: {", ".join(known)}' if known else ''


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """The `flags_parser` of `app.run`: as absl's own, but every mistake becomes a `UserError`."""
  try:
    rest = flags.FLAGS(argv)
  except SystemExit:
    # absl leaves with status 1 after printing the help that was asked for.
    if any(arg.lstrip('-').split('=')[0] in _HELP_FLAGS for arg in argv[1:]):
      sys.exit(0)
    raise
  except flags.Error as error:
    if _RECIPE_FAILED in str(error):
      raise
    _explain_overrides(argv)
    raise UserError(_plain(str(error))) from error
  except _LOOKUP_ERRORS:
    _explain_overrides(argv)
    raise
  for name, flag in _config_flags():
    _check_loaded(name, flag.value, _last_value(argv, name) or str(flag.default))
  if len(rest) > 1:
    raise UserError(
      f'unexpected argument {rest[1]!r}: every option is written --name=value; --help lists them'
    )
  return rest


def _config_flags() -> list[tuple[str, flags.Flag]]:
  return [
    (name, flags.FLAGS[name])
    for name in flags.FLAGS
    if config_flags.is_config_flag(flags.FLAGS[name])
  ]


def _last_value(argv: Sequence[str], name: str) -> str | None:
  """The last `--name=value` or `--name value` of argv."""
  found = None
  for position, arg in enumerate(argv[1:], start=1):
    if re.match(rf'--?{name}=', arg):
      found = arg.split('=', 1)[1]
    elif arg in (f'-{name}', f'--{name}') and position + 1 < len(argv):
      found = argv[position + 1]
  return found


def _explain_overrides(argv: Sequence[str]) -> None:
  """Raises a `UserError` where an override such as `--config.a.b=1` is what made parsing fail.

  ml_collections looks overrides up with bare attribute access, so that a typo surfaces as
  an AttributeError or KeyError from its inside. Loading the config once more, outside absl, tells
  such typos from an error of the recipe's own, which keeps its traceback.
  """
  for name, flag in _config_flags():
    overrides = [
      match[1] for arg in argv[1:] if (match := re.match(rf'--?(?:no)?{name}\.([^=]+)', arg))
    ]
    path = _last_value(argv, name) or flag.default
    if not overrides:
      continue
    if not isinstance(path, str):
      raise UserError(f'--{name}.{overrides[0]} needs --{name}=FILE before it')
    config = flag.parser.parse(path)
    _check_loaded(name, config, path)
    for override in overrides:
      _check_override(name, config, override)


def _check_override(name: str, config: Any, override: str) -> None:
  keys = override.split('.')
  node = config
  for depth, key in enumerate(keys):
    written = '.'.join([name, *keys[: depth + 1]])
    above = '.'.join([name, *keys[:depth]])
    if not isinstance(node, Mapping) and not hasattr(node, 'keys'):
      raise UserError(f'--{name}.{override}: {above} is {node!r} and has no keys of its own')
    if key not in node:
      raise UserError(f'unknown config key {written}{_suggest(config, node, above, key, name)}')
    node = node[key]


def _suggest(config: Any, node: Any, above: str, key: str, name: str) -> str:
  """Suggests a key beside the unknown one, else the same key elsewhere in the config."""
  if difflib.get_close_matches(key, list(node.keys()), n=1):
    return nearest(key, node.keys()).replace("'", f"'{above}.", 1)
  everywhere = [path for path in _paths(config, name) if path.rsplit('.', 1)[-1] == key]
  return f'; did you mean {everywhere[0]!r}?' if everywhere else nearest(key, node.keys())


def _paths(node: Any, prefix: str) -> list[str]:
  paths = []
  for key in node.keys():
    path = f'{prefix}.{key}'
    paths.append(path)
    if hasattr(node[key], 'keys'):
      paths += _paths(node[key], path)
  return paths


def _check_loaded(name: str, config: Any, path: str) -> None:
  """Raises where there was no file to read: ml_collections keeps that for the first access."""
  try:
    hasattr(config, 'keys')
  except OSError as error:
    file = pathlib.Path(path.split(':', 1)[0])
    if file.is_file():
      raise UserError(
        f'--{name}={path}: the config file failed: {error.__cause__ or error}'
      ) from error
    siblings = (
      [str(other) for other in sorted(file.parent.glob('*.py'))] if file.parent.is_dir() else []
    )
    known = siblings or [str(other) for other in sorted(pathlib.Path('configs').glob('*.py'))]
    raise UserError(
      f'--{name}={path}: there is no config file {file}{nearest(str(file), known)}'
    ) from error


def _plain(message: str) -> str:
  """Says absl's message about a flag the way the rest of our messages read."""
  missing = re.search(r'Flag (--\S+) must have a value other than None', message)
  if missing:
    return f'{missing[1]} is required; --help lists the flags'
  unsupported = re.search(r'Type .* of field (\S+) is not supported for overriding', message)
  if unsupported:
    return f'--{unsupported[1]} has no type to be read as; set it in the config file'
  if message.startswith(('flag --', 'Unknown', 'Missing', 'Found')):
    return message[0].lower() + message[1:]
  return message
