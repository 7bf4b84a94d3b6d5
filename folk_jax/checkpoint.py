"""Checkpoints, on disk or in a bucket: saved while training goes on, resumed on any devices.

The only user of Orbax. A checkpoint is `<directory>/<step>/` with two items: `state` (any pytree of
arrays) and `meta` (a small JSON dict with `format_version`). A step appears under its name when it
is whole: a save cut short by a kill leaves a temporary folder, which is ignored, and which the next
run clears away.
"""

import contextlib
import gc
import json
import logging as standard_logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from folk_jax.errors import UserError

FORMAT_VERSION = 1

_STATE, _META = 'state', 'meta'
_SHOWN_MISMATCHES = 3
_SHOWN_STEPS = 10
_ABANDONED_READS_SECONDS = 0.3


def _is_worth_saying(record: standard_logging.LogRecord) -> bool:
  """A log filter: Orbax says some twenty INFO lines a save; --verbosity=1 shows them."""
  orbax = '/orbax/' in record.pathname and record.levelno < standard_logging.WARNING
  return not orbax or logging.get_verbosity() >= logging.DEBUG


logging.get_absl_logger().addFilter(_is_worth_saying)


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
  ):
    """Opens, or makes, a directory of checkpoints.

    Args:
      directory: the folder of the steps, local or in object storage (`gs://...`).
      every: steps between saves; 0 saves only where `force` asks for it.
      keep: how many of the latest steps to keep, 1 or more.
      permanent_every: steps that this divides are never deleted; 0 for none.
      asynchronous: write in the background, from a copy of the state in host memory.

    Raises:
      UserError: for a number out of range, or a directory that cannot be made.
    """
    numbers = {'every': (every, 0), 'keep': (keep, 1), 'permanent_every': (permanent_every, 0)}
    for name, (value, least) in numbers.items():
      if value < least:
        raise UserError(f'checkpoint.{name} is {value}; expected {least} or more')
    self.directory = _path(directory)
    self._every = every
    self._last_saved = None
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if permanent_every:
      policies.append(ocp.checkpoint_managers.EveryNSteps(permanent_every))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
      enable_async_checkpointing=asynchronous,
      # Made in the background, a folder that cannot be made leaves threads that wait for it, and
      # the process cannot end until they time out, minutes later.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    try:
      self._manager = ocp.CheckpointManager(
        self.directory, options=options, item_names=(_STATE, _META)
      )
    except (OSError, ImportError) as error:  # ImportError: no client for this kind of bucket
      raise UserError(
        f'cannot keep checkpoints in {self.directory}: {_brief(error)};'
        ' give a --workdir that can be written'
      ) from error

  def latest_step(self) -> int | None:
    """The newest step, or None where there is none."""
    return max(self.all_steps(), default=None)

  def all_steps(self) -> list[int]:
    """The steps there are, ascending; one that is still being written counts."""
    return sorted(self._manager.all_steps())

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
      UserError: the directory cannot be written, now or by the save before, in the background.
      RuntimeError: any other failure. Both name the step.
    """
    due = force or (self._every and step % self._every == 0)
    if not (due or self._manager.reached_preemption(step)) or step in self.all_steps():
      return False
    meta = {**meta, 'format_version': FORMAT_VERSION}
    json.dumps(meta)  # fails here, before anything is written, rather than in a thread
    self.wait()
    self._last_saved = step
    items = {_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave(meta)}
    with self._saving():
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    return True

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a step onto the devices that `abstract_state` names, whatever devices wrote it.

    Args:
      abstract_state: the state's pytree with, at every leaf, a `jax.ShapeDtypeStruct` that has a
        sharding (or an array).
      step: the latest by default.

    Returns:
      The state, and meta as it was saved, with `format_version`.

    Raises:
      UserError: no such step, another format, unreadable, or other paths, shapes or dtypes.
    """
    self.wait()
    abstract_state = jax.tree_util.tree_map_with_path(_abstract, abstract_state)
    step = _choose(self.directory, self.all_steps(), step)
    meta = _read_meta(self.directory, step)
    _check_fits(self.directory, step, _read_tree(self.directory, step), abstract_state)
    items = {_STATE: ocp.args.StandardRestore(abstract_state)}
    with _reading(self.directory, step):
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return restored[_STATE], meta

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
    try:
      self.close()
    except Exception as error:
      if value is None:
        raise
      logging.error('%s', error)  # and what ended the run goes on its way

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      kind = UserError if isinstance(error, OSError) else RuntimeError
      raise kind(
        f'saving step {self._last_saved} in {self.directory} failed: {_brief(error)}'
      ) from error


def read_subtree(
  directory: str, under: tuple[str, ...], step: int | None = None
) -> tuple[Any, dict[str, Any], int]:
  """Reads one node of a saved state as NumPy arrays, on any machine, and nothing else of it.

  Args:
    directory: the folder of the steps, `<workdir>/checkpoints`.
    under: the way down to the node: names of fields and keys, positions in tuples as text, and
      `'**'` for any number of levels: `('opt_state', '**', 'teacher', 'backbone')`.
    step: the latest by default.

  Returns:
    The node (a nested dict of arrays, shapes and dtypes as saved), the step's meta, and the step.

  Raises:
    UserError: no such step, another format, unreadable, or not exactly one node that matches.
  """
  path = _path(directory)
  step = _choose(path, _steps_on_disk(path), step)
  meta = _read_meta(path, step)
  tree = _read_tree(path, step)
  matches = _matches(tree, tuple(under))
  if len(matches) != 1:
    there = ', '.join('/'.join(keys) for keys in matches) or _upper_levels(tree)
    raise UserError(
      f'step {step} in {path}: {len(matches)} nodes match {"/".join(under)}, expected one;'
      f' there are: {there}'
    )
  ((keys, node),) = matches.items()
  # Orbax cannot leave out a part of a list: the whole tree is asked for, with placeholders at all
  # other leaves, which it does not read.
  item = _with_node(jax.tree.map(lambda _: ocp.PLACEHOLDER, tree), keys, node)
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  with _reading(path, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(
      path / str(step) / _STATE, args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
    )
  for key in keys:
    restored = dict(_children(restored))[key]
  return restored, meta, step


def _path(directory: str) -> epath.Path:
  """An absolute path, as Orbax asks for; a bucket's address is one already."""
  path = epath.Path(directory)
  return path if '://' in str(directory) else path.expanduser().absolute()


def _steps_on_disk(path: epath.Path) -> list[int]:
  try:
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []
  except (OSError, ImportError) as error:
    raise UserError(f'cannot read {path}: {_brief(error)}') from error


def _choose(path: epath.Path, steps: list[int], step: int | None) -> int:
  if not steps:
    raise UserError(f'no checkpoint in {path}; expected a folder <step>/ that a run has saved')
  if step is None:
    return steps[-1]
  if step not in steps:
    shown = ['...'] * (len(steps) > _SHOWN_STEPS) + [str(one) for one in steps[-_SHOWN_STEPS:]]
    raise UserError(f'no checkpoint of step {step} in {path}; there are: {", ".join(shown)}')
  return step


def _read_meta(path: epath.Path, step: int) -> dict[str, Any]:
  with _reading(path, step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    meta = checkpointer.restore(path / str(step) / _META)
  version = meta.get('format_version')
  if version != FORMAT_VERSION:
    raise UserError(
      f'step {step} in {path} has format {version}; this version of folk_jax reads format'
      f' {FORMAT_VERSION}: use the version that wrote it'
    )
  return meta


def _read_tree(path: epath.Path, step: int) -> Any:
  """The state's tree of array metadata: named tuples and dataclasses as dicts, tuples as lists."""
  with _reading(path, step), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return handler.metadata(path / str(step) / _STATE).tree


@contextlib.contextmanager
def _reading(path: epath.Path, step: int) -> Iterator[None]:
  """Turns what Orbax and TensorStore raise on damaged files into one line that names the step.

  Missing and cut files are found, and damage to indices, which carry checksums. The data of large
  arrays do not: a flipped bit there is for the file system to find.

  Where one array fails, Orbax abandons the reads of all the others. Each of them would print a
  traceback of its own, from TensorStore's threads, the event loop or the garbage collector: they
  are given a moment to end, unheard.
  """
  hooks = sys.excepthook, sys.unraisablehook
  sys.excepthook, sys.unraisablehook = lambda *_: None, lambda _: None
  event_loop_log = standard_logging.getLogger('asyncio')
  event_loop_log.addFilter(_nothing)
  try:
    yield
  except jax.errors.JaxRuntimeError:
    raise  # a device out of memory, not a damaged file
  except Exception as error:
    reason = _brief(error)
    for link in (error, error.__cause__, error.__context__):
      if link is not None:
        traceback.clear_frames(link.__traceback__)  # they hold on to the abandoned reads
    time.sleep(_ABANDONED_READS_SECONDS)
    gc.collect()
    raise UserError(
      f'step {step} in {path} cannot be read, it is damaged or incomplete ({reason});'
      f' remove {path / str(step)} to go on from the step before it'
    ) from error
  finally:
    sys.excepthook, sys.unraisablehook = hooks
    event_loop_log.removeFilter(_nothing)


def _nothing(_: standard_logging.LogRecord) -> bool:
  return False


def _brief(error: BaseException, length: int = 160) -> str:
  words = ' '.join(str(error).split()) or type(error).__name__
  return words if len(words) <= length else words[:length] + '...'


def _abstract(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    raise ValueError(f'{".".join(_names(path))} has no sharding: restore needs one at every leaf')
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """A jax key path as Orbax names it: fields, keys and positions alike as text."""
  return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _check_fits(path: epath.Path, step: int, saved: Any, abstract_state: Any) -> None:
  """Raises with the first differences; Orbax would cast dtypes and pass over some of the rest."""
  found, wanted = (
    {_names(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (saved, abstract_state)
  )
  mismatches = []
  for keys in wanted | found:
    there, here = _described(found.get(keys)), _described(wanted.get(keys))
    if there != here:
      mismatches.append(f'{".".join(keys)}: found {there}, expected {here}')
  if mismatches:
    more = len(mismatches) - _SHOWN_MISMATCHES
    raise UserError(
      f'step {step} in {path} does not fit this configuration:'
      f' {"; ".join(mismatches[:_SHOWN_MISMATCHES])}{f"; and {more} more" if more > 0 else ""};'
      ' use the configuration it was trained with'
    )


def _described(leaf: Any) -> str:
  return 'nothing' if leaf is None else f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _children(node: Any) -> list[tuple[str, Any]]:
  if isinstance(node, Mapping):
    return [(str(key), child) for key, child in node.items()]
  if isinstance(node, list | tuple):
    return [(str(position), child) for position, child in enumerate(node)]
  return []


def _matches(node: Any, under: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
  """Every node that the pattern reaches, by its keys."""
  if not under:
    return {(): node}
  deep = under[0] == '**'
  found = _matches(node, under[1:]) if deep else {}
  for key, child in _children(node):
    if deep or key == under[0]:
      below = _matches(child, under if deep else under[1:])
      found |= {(key, *keys): match for keys, match in below.items()}
  return found


def _with_node(tree: Any, keys: tuple[str, ...], node: Any) -> Any:
  """The tree with another node at `keys`."""
  if not keys:
    return node
  children = {
    key: _with_node(child, keys[1:], node) if key == keys[0] else child
    for key, child in _children(tree)
  }
  return children if isinstance(tree, Mapping) else list(children.values())


def _upper_levels(tree: Any) -> str:
  """The two upper levels in words: `params (backbone, projection), step`."""
  below = {key: ', '.join(name for name, _ in _children(child)) for key, child in _children(tree)}
  return ', '.join(f'{key} ({names})' if names else key for key, names in below.items())
