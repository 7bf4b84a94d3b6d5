"""The checkpoints of a run: saved in the background, kept by policy, resumed from the newest whole one."""

import contextlib
import json
import logging as standard_logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from folk_jax.checkpoint import digests, files, reading, trees
from folk_jax.checkpoint.reading import FORMAT_VERSION, ITEMS, META, STATE, Damaged
from folk_jax.errors import UserError

_ASIDE = '.damaged'
# Orbax gives up a save after so long by the wall clock, which may jump. Of several processes one may be lost in a save,
# and the others wait for it: there it is Orbax's own default. Alone, nobody is waited for but the disk.
_TIMEOUT_SECONDS, _TIMEOUT_SECONDS_ALONE = 1200, 10**9


def _is_worth_saying(record: standard_logging.LogRecord) -> bool:
  """A log filter. Orbax says some twenty INFO lines a save, and logs what it also raises; --verbosity=1 shows them."""
  orbax = '/orbax/' in record.pathname
  said = record.levelno < standard_logging.WARNING or bool(record.exc_info)
  return not (orbax and said) or logging.get_verbosity() >= logging.DEBUG


logging.get_absl_logger().addFilter(_is_worth_saying)


def _hush_abandoned_writes() -> None:
  """Where one write fails, Orbax abandons the others, each of which prints a traceback from TensorStore's threads.

  They come while training goes on, or as late as the end of the process, and say nothing that the failure does not.
  """
  before = sys.unraisablehook
  if getattr(before, 'hushes_abandoned_writes', False):
    return

  def hook(what: Any) -> None:
    abandoned = isinstance(what.exc_value, RuntimeError)
    if not (abandoned and str(what.exc_value) == 'Event loop is closed'):
      before(what)

  hook.hushes_abandoned_writes = True
  sys.unraisablehook = hook
  standard_logging.getLogger('asyncio').addFilter(
    lambda record: not _is_of_an_abandoned_write(record.getMessage())
  )


def _is_of_an_abandoned_write(text: str) -> bool:
  return 'never retrieved' in text and ('OCDBT' in text or bool(files.reason(text)))


class Checkpoints:
  """The checkpoints of one run: a context manager that waits for the last save on every way out.

  In a run of several processes each of them makes this object and calls its methods alike.
  """

  def __init__(
    self,
    directory: str,
    every: int,
    keep: int,
    permanent_every: int = 0,
    asynchronous: bool = True,
    read_only: bool = False,
    before_save: Callable[[], None] | None = None,
  ):
    """Opens, or makes, a directory of checkpoints.

    Args:
      directory: the folder of the steps, local or in object storage (`gs://...`).
      every: steps between saves; 0 saves only where `force` asks for it.
      keep: how many of the latest steps to keep, 1 or more.
      permanent_every: steps that this divides are never deleted; 0 for none.
      asynchronous: write in the background, from a copy of the state in host memory.
      read_only: for `restore` alone: nothing is made, cleared away or moved, also beside a run that writes there.
      before_save: called before every save; what it raises ends the save before it begins.

    Raises:
      UserError: for a number out of range, or a directory that cannot be made.
    """
    numbers = {'every': (every, 0), 'keep': (keep, 1), 'permanent_every': (permanent_every, 0)}
    for name, (value, least) in numbers.items():
      if value < least:
        raise UserError(f'checkpoint.{name} is {value}; expected {least} or more')
    self.directory = reading.absolute(directory)
    self._every, self._asynchronous, self._read_only = every, asynchronous, read_only
    self._before_save = before_save or (lambda: None)
    self._last_saved: int | None = None
    self._bytes, self._failure = 0, ''
    _hush_abandoned_writes()
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if permanent_every:
      policies.append(ocp.checkpoint_managers.EveryNSteps(permanent_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=None
      if read_only
      else ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
      async_options=ocp.AsyncOptions(
        # Made in the background, a folder that cannot be made leaves threads that wait for it, and
        # the process cannot end until they time out, minutes later.
        create_directories_asynchronously=False,
        timeout_secs=_TIMEOUT_SECONDS if jax.process_count() > 1 else _TIMEOUT_SECONDS_ALONE,
        post_finalization_callback=self._write_digests,
      ),
    )
    try:
      self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)
    except (OSError, ImportError) as error:  # ImportError: no client for this kind of bucket
      raise UserError(
        f'cannot keep checkpoints in {self.directory}: {files.brief(error)};'
        ' give a --workdir that can be written'
      ) from error

  def latest_step(self) -> int | None:
    """The newest step, or None where there is none."""
    return max(self.all_steps(), default=None)

  def all_steps(self) -> list[int]:
    """The steps there are, ascending; one that is still being written counts."""
    return sorted(self._manager.all_steps())

  def set_aside(self) -> list[str]:
    """The names under which damaged steps are kept."""
    if not self.directory.is_dir():
      return []
    return sorted(path.name for path in self.directory.iterdir() if _ASIDE in path.name)

  def save(self, step: int, state: Any, meta: Mapping[str, Any], force: bool = False) -> bool:
    """Saves where `every` divides `step`, where a preemption is announced, or where forced.

    The state is copied before this returns, so its buffers may be donated at once. Call it after
    every step: that is how the processes of a preempted run agree on the step they all save.

    Args:
      step: the number of optimiser steps done.
      state: a pytree of arrays.
      meta: JSON-able; `format_version` is added.
      force: save whatever the step. A step that is already there is left as it is.

    Returns:
      Whether a save was begun.

    Raises:
      UserError: the directory cannot be written, or is full, now or in the save before, in the background.
      RuntimeError: any other failure. Both name the step.
    """
    due = force or (self._every and step % self._every == 0)
    if not (due or self._manager.reached_preemption(step)) or step in self.all_steps():
      return False
    meta = {**meta, 'format_version': FORMAT_VERSION}
    json.dumps(meta)  # fails here, before anything is written, rather than in a thread
    self.wait()
    self._before_save()
    self._last_saved, self._bytes = step, trees.size(state)
    items = {STATE: ocp.args.StandardSave(state), META: ocp.args.JsonSave(meta)}
    with self._saving():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    if not self._asynchronous:
      self.wait()
    return True

  def _write_digests(self) -> None:
    """Called by the first process, in a thread, when all have written and the step has not got its name yet."""
    if files.is_remote(self.directory):
      return
    unnamed = [
      path
      for path in self.directory.iterdir()
      if path.name.startswith(f'{self._last_saved}.') and _ASIDE not in path.name
    ]
    # More than one: what another run of the same workdir left, or writes; its files are none of ours.
    if len(unnamed) != 1:
      return
    if jax.process_count() > 1 and self._bytes > digests.MOST_BYTES_OF_SEVERAL:
      logging.info(
        'step %d has no digests: the other processes would wait too long while its %s are read',
        self._last_saved,
        files.megabytes(self._bytes),
      )
      return
    digests.write(unnamed[0], ITEMS)

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a step onto the devices that `abstract_state` names, whatever devices wrote it.

    Without `step` a damaged one is passed over for the one before it, with a warning, and kept
    aside under another name, `<step>.damaged`. Where no whole one is left, nothing is moved.

    Args:
      abstract_state: the state's pytree with, at every leaf, a `jax.ShapeDtypeStruct` that has a
        sharding (or an array).
      step: the latest whole one by default.

    Returns:
      The state, and meta as it was saved, with `format_version`.

    Raises:
      UserError: no such step, none that is whole, a newer format, or other paths, shapes or dtypes.
    """
    self.wait()
    abstract_state = jax.tree_util.tree_map_with_path(trees.abstract, abstract_state)
    steps = self.all_steps()
    if step is not None or not steps or self._read_only:
      return self._restored(reading.choose(self.directory, steps, step), abstract_state)
    damaged: dict[int, str] = {}
    for step in reversed(steps):
      try:
        found = self._restored(step, abstract_state)
      except Damaged as error:
        damaged[step] = error.reason
        continue
      self._put_aside(damaged, f'going on from step {step}')
      return found
    reasons = '; '.join(f'step {step}: {reason}' for step, reason in damaged.items())
    raise UserError(
      f'no whole checkpoint is left in {self.directory} ({reasons}): bring one back from a copy, or start again'
      ' in another --workdir'
    )

  def newest_meta(self) -> tuple[int, dict[str, Any]] | None:
    """The newest step that is whole by its digests, and its meta; None where there is none.

    Those that are not are put aside, with a warning.
    """
    damaged: dict[int, str] = {}
    found = None
    for step in reversed(self.all_steps()):
      try:
        whole = self._agree_that_whole(step)
        found = step, reading.read_meta(self.directory, step, whole)
        break
      except Damaged as error:
        damaged[step] = error.reason
    self._put_aside(damaged, f'going on with step {found[0]}' if found else 'going on without it')
    return found

  def _restored(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    whole = self._agree_that_whole(step)
    try:
      meta = reading.read_meta(self.directory, step, whole)
      tree = reading.read_tree(self.directory, step, whole)
      reading.check_fits(self.directory, step, tree, abstract_state)
      items = {STATE: ocp.args.StandardRestore(abstract_state)}
      with reading.reading(self.directory, step, whole):
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    except Damaged as error:
      if jax.process_count() == 1:
        raise
      # The others may have read it whole, and wait for this one in the first step.
      raise UserError(str(error)) from error
    return restored[STATE], meta

  def _agree_that_whole(self, step: int) -> bool:
    """Whether the first process has compared a step with its digests, in all processes.

    Raises:
      Damaged: in all, where the first finds a step's files not to be what was written.
      UserError: in all, where the first cannot tell.
    """
    whole, refusal = False, None
    if jax.process_index() == 0:
      try:
        whole = reading.check_whole(self.directory, step)
        # The version first: it says what the tree is.
        reading.read_meta(self.directory, step, whole)
        reading.read_tree(self.directory, step, whole)
      except UserError as error:
        refusal = error
    if jax.process_count() > 1:
      mine = [whole, refusal is not None, isinstance(refusal, Damaged)]
      whole, refused, broken = map(bool, multihost_utils.broadcast_one_to_all(np.asarray(mine)))
      if broken and refusal is None:
        refusal = Damaged(self.directory, step, 'as process 0 found', shown=False)
      elif refused and refusal is None:
        refusal = UserError(f'step {step} in {self.directory} cannot be used: process 0 says why')
    if refusal is not None:
      raise refusal
    return whole

  def _put_aside(self, damaged: Mapping[int, str], consequence: str) -> None:
    """Renames steps, so that they are neither read nor counted nor deleted again."""
    if not damaged:
      return
    for step, reason in damaged.items():
      name = f'{step}{_ASIDE}'
      if jax.process_index() == 0:
        taken = len([path for path in self.set_aside() if path.startswith(name)])
        name += f'.{taken + 1}' * bool(taken)
        with self._saving():
          (self.directory / str(step)).rename(self.directory / name)
      logging.warning(
        'step %d in %s is damaged (%s): kept aside as %s, %s',
        step,
        self.directory,
        reason,
        name,
        consequence,
      )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('damaged steps are aside')
    self._manager.reload()

  def delete(self, step: int) -> None:
    """Removes a step, once the save under way is on disk."""
    self.wait()
    with self._saving():
      self._manager.delete(step)

  def wait(self) -> None:
    """Waits until the save under way is on disk; raises what went wrong with it, as `save` does."""
    with self._saving():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of threads and files."""
    with self._saving():
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
    said = self._failure
    try:
      self.close()
    except Exception as error:
      if value is None:
        raise
      if str(error) != said:  # Else it is what ended the run,
        logging.error('%s', error)
      # which goes on its way.

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      what = f'saving step {self._last_saved} in {self.directory} failed: '
      if cause := files.unwritable(error, self.directory, self._need()):
        kind = UserError
      else:
        kind, cause = UserError if isinstance(error, OSError) else RuntimeError, files.brief(error)
      self._failure = what + cause
      raise kind(self._failure) from error

  def _need(self) -> str:
    whole = [step for step in reading.steps_on_disk(self.directory) if step != self._last_saved]
    last = f'step {whole[-1]} is whole' if whole else 'no step is saved yet'
    return f'a checkpoint takes up to {files.megabytes(self._bytes)}; {last}'
