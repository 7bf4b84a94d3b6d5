"""Small files read without trust and written whole, and what a full or read-only disk is called."""

import errno
import json
import os
import shutil
from typing import Any

from etils import epath

from folk_jax.errors import UserError

# A configuration is some kilobytes; beyond this nobody wrote it by hand, or by this package.
JSON_BYTES = 4 << 20
_JSON_LEVELS = 64

# What the operating system, TensorStore or a library in between says where nothing more is written, and the cure.
_FULL = 'the disk is full', 'free some'
_REFUSED = 'it cannot be written', 'make it writable'
_REASONS = {
  errno.ENOSPC: ('No space left on device', *_FULL),
  errno.EDQUOT: ('Disk quota exceeded', 'a quota is used up', 'free some'),
  errno.EFBIG: ('File too large', 'no file may grow so large', 'raise the limit (ulimit -f)'),
  errno.EROFS: ('Read-only file system', *_REFUSED),
  errno.EACCES: ('Permission denied', *_REFUSED),
  errno.EPERM: ('Operation not permitted', *_REFUSED),
}


def is_remote(path: Any) -> bool:
  """Whether a path is an address in object storage."""
  return '://' in str(path)


def read_json(file: Any, most: int = JSON_BYTES) -> dict[str, Any]:
  """The JSON object that a small file holds.

  Args:
    file: a path.
    most: bytes; a larger file is refused unread.

  Raises:
    UserError: it holds something else, nests too deep, or is too large.
    OSError: it cannot be read, FileNotFoundError where it is not there.
  """
  file = epath.Path(file)
  size = file.stat().length
  if size > most:
    raise UserError(
      f'{file} is damaged: it has {size} bytes, and a file of its kind at most {most}'
    )
  try:
    found = json.loads(file.read_bytes().decode('utf-8'))
  except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, endless numbers
    raise UserError(f'{file} is damaged: {brief(error)}') from error
  if not isinstance(found, dict):
    raise UserError(f'{file} is damaged: it holds a {type(found).__name__}, expected a JSON object')
  if not _flat_enough(found):
    raise UserError(f'{file} is damaged: it nests deeper than {_JSON_LEVELS} levels')
  return found


def replace_text(path: Any, text: str) -> None:
  """Writes a small file, and its folder where it is missing, so that a kill leaves the old file or the new one.

  On disks a machine that is lost leaves one of them, too.

  Raises:
    OSError: it cannot be written.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.parent / f'{path.name}.tmp'
  if is_remote(path):
    fresh.write_text(text)
  else:
    with open(fresh, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
  fresh.replace(path)


def _flat_enough(found: Any) -> bool:
  """Whether whoever walks through it, level by level, comes to an end."""
  level = [found]
  for _ in range(_JSON_LEVELS):
    level = [
      child
      for node in level
      if isinstance(node, dict | list)
      for child in (node.values() if isinstance(node, dict) else node)
    ]
  return not level


def unwritable(error: BaseException, folder: Any, need: str = '') -> str:
  """Why a folder takes no more, with its free space and the cure, in words; '' where that is not what went wrong.

  Args:
    error: what a write raised, itself or among its causes.
    folder: where the write went.
    need: what is known about how much is needed, in words.
  """
  chain, seen = [error], set()
  while chain:
    link = chain.pop()
    if link is None or id(link) in seen:
      continue
    seen.add(id(link))
    if found := reason(str(link), getattr(link, 'errno', None)):
      words, kind, cure = found
      facts = '; '.join(filter(None, (words, _free(folder), need)))
      return f'{kind} ({facts}): {cure} and start the same command again'
    chain += [link.__cause__, link.__context__]
  return ''


def reason(text: str, number: int | None = None) -> tuple[str, str, str] | None:
  """The system's words, ours and the cure, for what a text, or an error's number, says about writing; or None."""
  for code, found in _REASONS.items():
    if number == code or found[0].lower() in text.lower():
      return found
  return None


def _free(folder: Any) -> str:
  path = epath.Path(folder)
  if is_remote(path):
    return ''
  while not path.exists() and path != path.parent:
    path = path.parent
  try:
    return f'{megabytes(shutil.disk_usage(path).free)} are free'
  except OSError:
    return ''


def megabytes(size: float) -> str:
  """A number of bytes for a person."""
  return f'{size / 1e9:.1f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def brief(error: BaseException, length: int = 160) -> str:
  """What an error says, on one line and not without end."""
  words = ' '.join(str(error).split()) or type(error).__name__
  return words if len(words) <= length else words[:length] + '...'
