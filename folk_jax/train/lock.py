"""One run at a time in a workdir on a disk of this machine: a lock that ends with its process."""

import contextlib
import fcntl
import os
import pathlib
import socket

from etils import epath

from folk_jax.errors import UserError

LOCK = 'lock'
# Kinds of file system on disks (or memory) of one machine. Any other may be shared by several.
_LOCAL = frozenset(
  'apfs bcachefs btrfs ext2 ext3 ext4 f2fs overlay ramfs reiserfs tmpfs xfs zfs'.split()
)
# Locks are a process's: a second run in the same one would be given the first one's.
_held: set[str] = set()


def me() -> str:
  """This process, for a person."""
  return f'process {os.getpid()} on {socket.gethostname()}'


def locked(workdir: epath.Path, stack: contextlib.ExitStack) -> bool:
  """Takes the lock until the stack ends; False where the file system has none. Raises `UserError` if it is taken."""
  file = os.path.realpath(os.fspath(workdir / LOCK))
  if file in _held:
    raise _taken(workdir, me())
  while True:
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
      fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      holder = os.pread(opened, 200, 0).decode('utf-8', 'replace').strip()
      os.close(opened)
      raise _taken(workdir, holder or 'another process') from None
    except OSError:
      os.close(opened)
      return False
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(opened), os.stat(file)):
        break
    os.close(
      opened
    )  # Its holder has just ended and removed it: what was locked is no file any more.
  _held.add(file)

  def let_go() -> None:
    _held.discard(file)
    with contextlib.suppress(OSError):
      os.unlink(file)  # Still locked: nobody else has it.
    os.close(opened)

  stack.callback(let_go)
  with contextlib.suppress(OSError):  # A full disk: the name is for people.
    os.ftruncate(opened, 0)
    os.pwrite(opened, me().encode(), 0)
  return True


def _taken(workdir: epath.Path, holder: str) -> UserError:
  return UserError(
    f'another run trains in workdir {workdir} ({holder}): wait for it, end it, or give another --workdir'
  )


def on_this_machine(workdir: epath.Path, mounts: str = '/proc/self/mounts') -> bool:
  """Whether the workdir is on a disk of this machine alone, by the kind of its file system."""
  if '://' in str(workdir):
    return False
  try:
    lines = pathlib.Path(mounts).read_text(encoding='utf-8', errors='replace').splitlines()
  except OSError:
    return True  # No Linux: locks are what there is.
  here = pathlib.Path(os.path.realpath(workdir))
  kinds = {}
  for line in lines:
    _, point, kind, *_ = line.split(' ')
    point = pathlib.Path(point.replace('\\040', ' '))
    if here == point or point in here.parents:
      kinds[len(point.parts)] = kind  # Of two on the same point the later one is seen.
  return bool(kinds) and kinds[max(kinds)] in _LOCAL
