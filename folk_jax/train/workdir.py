"""The folder of a run: whose it is, that one run at a time trains there, and what a resumed run must share."""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from folk_jax import checkpoint
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.train import lock

if TYPE_CHECKING:
  from folk_jax import data

OWNER = 'owner.json'


def check_workdir(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Refuses a workdir that holds another run, or a config.json that is damaged; writes nothing."""
  file = workdir / 'config.json'
  with using(workdir):
    if file.exists():
      config_lib.check_same_run(_config_in(file), config, str(workdir))


def write_config(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Makes the workdir this run's. It keeps the first config.json: a resumed run differs in what is free to."""
  file = workdir / 'config.json'
  if jax.process_index() or file.exists():
    return
  with using(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_text(file, config_lib.to_json(config))


def _config_in(file: epath.Path) -> dict[str, Any]:
  try:
    return checkpoint.read_json(file)
  except UserError as error:
    raise UserError(
      f'cannot use workdir {file.parent}: {error}. Bring {file.name} back from a copy, or give another --workdir.'
    ) from error


@contextlib.contextmanager
def using(workdir: epath.Path) -> Iterator[None]:
  """Says in one line what the file system refuses."""
  try:
    yield
  except OSError as error:
    why = checkpoint.unwritable(error, workdir) or f'{error}. Give a --workdir that can be written.'
    raise UserError(f'cannot use workdir {workdir}: {why}') from error


def identity(source: 'data.Source') -> dict[str, Any]:
  """What a resumed run's data must share with the run's: number of images, and names of classes."""
  names = hashlib.sha256('\n'.join(source.class_names).encode()).hexdigest()
  return {'images': len(source), 'classes': names[:16]}


@contextlib.contextmanager
def held(workdir: str | epath.Path) -> Iterator[Callable[[], None]]:
  """Inside, one run trains in the workdir. Yields what to call before each save, in all processes alike.

  On a disk of this machine the second run is refused, by a lock on `lock`. The kernel lets go of it when the process
  ends, however it ends, and never hands it to the loader's processes: a killed run leaves nothing behind that would
  keep it from being started again.

  On network file systems, in buckets, and wherever locks are not offered, a lock might outlive a lost machine. There
  the newest start owns the workdir, by its name in `owner.json`, and the older run, if it is alive, ends before its
  next save, also where the newer one has ended by then. No clock is compared anywhere.

  In a run of several processes the first one holds it for all.

  Raises:
    UserError: another run holds the workdir, it cannot be written, or (when called) a newer run has taken it.
  """
  workdir = epath.Path(workdir).expanduser()
  with contextlib.ExitStack() as stack:
    refusal = ''
    token = ''
    if jax.process_index() == 0:
      try:
        with using(workdir):
          workdir.mkdir(parents=True, exist_ok=True)
          if not (lock.on_this_machine(workdir) and lock.locked(workdir, stack)):
            token = _owned(workdir, stack)
      except UserError as error:
        refusal = str(error)
    _tell(refusal, f'cannot use workdir {workdir}: process 0 says why')

    def check() -> None:
      taken = ''
      if token and (by := _taken_by(workdir, token)):
        taken = f'another run was started in workdir {workdir} ({by}): this one ends, and saves nothing more'
      _tell(taken, f'another run was started in workdir {workdir}')

    yield check


def _tell(refusal: str, to_the_others: str) -> None:
  """Raises in all processes where the first has a reason to."""
  if jax.process_count() > 1:
    refused = multihost_utils.broadcast_one_to_all(np.asarray(bool(refusal)))
    refusal = refusal or to_the_others * bool(refused)
  if refusal:
    raise UserError(refusal)


def _owned(workdir: epath.Path, stack: contextlib.ExitStack) -> str:
  """Writes a fresh token into the workdir, and takes it away at the end if it is still there."""
  token = secrets.token_hex(8)
  checkpoint.replace_text(workdir / OWNER, json.dumps({'token': token, 'by': lock.me()}))

  def let_go() -> None:
    with contextlib.suppress(
      Exception
    ):  # Of clients of buckets, too: a file that stays is in nobody's way.
      if _owner(workdir)['token'] == token:
        (workdir / OWNER).unlink()

  stack.callback(let_go)
  return token


def _taken_by(workdir: epath.Path, token: str) -> str:
  """Which other run has taken the workdir, for a person; '' where none has, or it can't be told."""
  try:
    owner = _owner(workdir)
  except FileNotFoundError:
    # A run never removes its own token while it trains: another one has written its own, ended and taken that away.
    return 'it has ended since'
  except (
    Exception
  ):  # Clients of buckets have errors of their own. A passing failure of storage ends no run.
    return ''
  return '' if owner['token'] == token else owner['by']


def _owner(workdir: epath.Path) -> dict[str, str]:
  """Who has the workdir. Raises FileNotFoundError where nobody has, and anything else where it can't be told."""
  found = checkpoint.read_json(workdir / OWNER)
  return {'token': str(found['token']), 'by': str(found['by'])}
