"""Tars that others made, read without unpacking: nothing is ever written where a tar says, and nothing it only claims
to hold is allocated.
"""

import contextlib
import tarfile
from collections.abc import Iterator

from folk_jax.data.decode import MAX_BYTES
from folk_jax.errors import UserError

# Of a compressed tar: more than this, unpacked, is no development kit.
_MAX_UNPACKED = 1 << 30


@contextlib.contextmanager
def reading(what: str, cure: str = 'download it again') -> Iterator[None]:
  """Says in one line what is wrong with the tar `what`."""
  try:
    yield
  except (tarfile.TarError, OSError, EOFError, ValueError) as error:
    raise UserError(f"'{what}' cannot be read as a tar ({error}); {cure}") from error


def files(tar: tarfile.TarFile, what: str, most: int = MAX_BYTES) -> Iterator[tarfile.TarInfo]:
  """The files of a tar, in its order; folders are passed over.

  Raises:
    UserError: a link, a device, a name that leads out of the folder, a file with holes or with more than `most` bytes.
  """
  for member in tar:
    if member.isdir():
      continue
    wrong = _wrong_with(member, most)
    if wrong:
      raise UserError(
        f"'{what}' holds '{member.name}', {wrong}: not as it was published; download it again"
      )
    yield member


def _wrong_with(member: tarfile.TarInfo, most: int) -> str:
  parts = member.name.replace('\\', '/').split('/')
  if member.name.startswith('/') or '..' in parts:
    return 'whose name leads out of its folder'
  if member.issym() or member.islnk():
    return f"a link to '{member.linkname}'"
  if not member.isreg():
    return 'which is a device or a pipe'
  if member.issparse():  # A few bytes may claim any size.
    return f'a file with holes of {member.size} bytes'
  if member.size > most:
    return f'of {member.size} bytes, more than {most}'
  return ''


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  """A file's bytes; tarfile.ReadError where there are fewer than it claims."""
  data = tar.extractfile(member).read()
  if len(data) != member.size:
    raise tarfile.ReadError(f'{member.name} has {len(data)} bytes of {member.size}')
  return data


def read_compressed(path: str, names: tuple[str, ...]) -> list[bytes]:
  """Named files of a small compressed tar, whatever the tar holds besides.

  Raises:
    UserError: as `files`, and for a tar that unpacks to more than a gigabyte.
    KeyError: for a name that is not there.
    tarfile.TarError, OSError, EOFError: for what is no tar.
  """
  found = {}
  with tarfile.open(path) as tar:
    for member in files(tar, path, _MAX_UNPACKED):
      if member.offset_data + member.size > _MAX_UNPACKED:
        raise UserError(f"'{path}' unpacks to over {_MAX_UNPACKED} bytes; download it again")
      if member.name in names:
        found[member.name] = read(tar, member)
  return [found[name] for name in names]
