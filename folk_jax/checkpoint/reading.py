"""Checkpoints read back: which steps there are, what they say of themselves, and parts of them on any machine."""

import contextlib
import gc
import logging as standard_logging
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from folk_jax.checkpoint import digests, files, trees
from folk_jax.errors import UserError

# 0: meta without a version, as before there were versions; its tree is checked as any other's.
# 1: `state` as Orbax's OCDBT of named arrays, `meta` as JSON with `format_version`; digests beside them or none.
FORMAT_VERSION = 1

STATE, META = ITEMS = ('state', 'meta')
_META_FILE = 'metadata'
_SHOWN_STEPS = 10
_ABANDONED_READS_SECONDS = 0.3
# A part of a state may be so many times as large as the whole is on disk, where it is compressed: states begin as
# zeros. Beyond it shapes are made up.
_UNPACKED_TIMES, _UNPACKED_BYTES = 64, 1 << 30
# Where storage or memory fails, the checkpoint may be whole. TensorStore raises ValueError, with its code first and the
# number of the system's error last: any but 2, no such file.
_PASSING = re.compile(
  'UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|CANCELLED'
  r"|Cannot allocate memory|os_error_code='(?!2')\d+'"
)


class Damaged(UserError):
  """A step that is not whole.

  Attributes:
    reason: what is wrong with it, in words.
  """

  def __init__(self, path: Any, step: int, reason: str, shown: bool = True):
    """Says what is wrong, and the cure.

    Args:
      path: the folder of the steps.
      step: its number.
      reason: as the attribute.
      shown: by its digests or its format; else a read failed, in a way that damage explains best, and nobody is told
        to remove anything.
    """
    if shown:
      words = f'it is damaged or incomplete ({reason}); remove {path / str(step)} to go on from the step before it'
    else:
      words = f'it seems to be damaged or incomplete ({reason})'
    super().__init__(f'step {step} in {path} cannot be read, {words}')
    self.reason = reason


def read_subtree(
  directory: str, under: tuple[str, ...], step: int | None = None
) -> tuple[Any, dict[str, Any], int]:
  """Reads one node of a saved state as NumPy arrays, on any machine, and nothing else of it.

  Args:
    directory: the folder of the steps, `<workdir>/checkpoints`.
    under: the way down to the node: names of fields and keys, positions in tuples as text, and
      `'**'` for any number of levels: `('opt_state', '**', 'teacher', 'backbone')`.
    step: the latest by default. A damaged one is refused: another would be another answer.

  Returns:
    The node (a nested dict of arrays, shapes and dtypes as saved), the step's meta, and the step.

  Raises:
    Damaged: a step that is not whole.
    UserError: no such step, a newer format, unreadable, or not exactly one node that matches.
  """
  path = absolute(directory)
  step = choose(path, steps_on_disk(path), step)
  # Once is enough: the files are the same for all.
  whole = jax.process_index() == 0 and check_whole(path, step)
  meta = read_meta(path, step, whole)
  tree = read_tree(path, step, whole)
  matches = trees.matches(tree, tuple(under))
  if len(matches) != 1:
    there = ', '.join('/'.join(keys) for keys in matches) or trees.upper_levels(tree)
    raise UserError(
      f'step {step} in {path}: {len(matches)} nodes match {"/".join(under)}, expected one;'
      f' there are: {there}'
    )
  ((keys, node),) = matches.items()
  with reading(path, step, whole):
    _check_size(path, step, node)
  # Orbax cannot leave out a part of a list: the whole tree is asked for, with placeholders at all
  # other leaves, which it does not read.
  item = trees.with_node(jax.tree.map(lambda _: ocp.PLACEHOLDER, tree), keys, node)
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  with reading(path, step, whole), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(
      path / str(step) / STATE, args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
    )
  for key in keys:
    restored = dict(trees.children(restored))[key]
  return restored, meta, step


def absolute(directory: str) -> epath.Path:
  """An absolute path, as Orbax asks for; a bucket's address is one already."""
  path = epath.Path(directory)
  return path if files.is_remote(directory) else path.expanduser().absolute()


def steps_on_disk(path: epath.Path) -> list[int]:
  """The steps in a folder, ascending; those alone that are whole as far as their names tell."""
  try:
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []
  except (OSError, ImportError) as error:
    raise UserError(f'cannot read {path}: {files.brief(error)}') from error


def choose(path: epath.Path, steps: list[int], step: int | None) -> int:
  """The step asked for, by default the latest. Raises `UserError` where it is not there."""
  if not steps:
    raise UserError(f'no checkpoint in {path}; expected a folder <step>/ that a run has saved')
  if step is None:
    return steps[-1]
  if step not in steps:
    shown = ['...'] * (len(steps) > _SHOWN_STEPS) + [str(one) for one in steps[-_SHOWN_STEPS:]]
    raise UserError(f'no checkpoint of step {step} in {path}; there are: {", ".join(shown)}')
  return step


# Steps that were found whole, by their files' sizes and times: an evaluation reads several parts of one.
_found_whole: dict[str, list[tuple[str, int, int]]] = {}


def check_whole(path: epath.Path, step: int) -> bool:
  """Compares a step's files with its digests: whether it has any, and they are those of its files.

  Raises:
    Damaged: they are not.
    UserError: what may pass.
  """
  folder = path / str(step)
  with reading(path, step):
    if not digests.exist(folder):
      return False
    state = digests.status(folder, ITEMS)
    if _found_whole.get(str(folder)) == state:
      return True
    problem = digests.problem(folder, ITEMS)
  if problem:
    raise Damaged(path, step, problem)
  _found_whole[str(folder)] = state
  return True


def read_meta(path: epath.Path, step: int, whole: bool = False) -> dict[str, Any]:
  """What a step says of itself, `format_version` included: 0 where it was written before there were versions.

  Raises:
    Damaged: it is no JSON of ours, or (unless `whole`, as `reading` takes it) it can't be read.
    UserError: a newer format, or a failure that may pass.
  """
  with reading(path, step, whole):
    try:
      meta = {'format_version': 0} | files.read_json(path / str(step) / META / _META_FILE)
    except UserError as error:
      raise Damaged(path, step, files.brief(error)) from error
  version = meta['format_version']
  if type(version) is not int or version < 0:
    raise Damaged(path, step, f'format_version is {version!r}')
  if version > FORMAT_VERSION:
    raise UserError(
      f'step {step} in {path} has format {version}; this version of folk_jax reads formats up to'
      f' {FORMAT_VERSION}: update folk_jax to the version that wrote it'
    )
  return meta


def read_tree(path: epath.Path, step: int, whole: bool = False) -> Any:
  """The state's tree of array metadata: named tuples and dataclasses as dicts, tuples as lists."""
  with reading(path, step, whole), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return handler.metadata(path / str(step) / STATE).tree


def check_fits(path: epath.Path, step: int, saved: Any, wanted: Any) -> None:
  """Raises `UserError` with the first differences of two trees."""
  if found := trees.mismatches(saved, wanted):
    raise UserError(
      f'step {step} in {path} does not fit this configuration: {found};'
      ' use the configuration it was trained with'
    )


def _check_size(path: epath.Path, step: int, node: Any) -> None:
  """Refuses arrays that cannot be in the files: missing chunks would be read as zeros, of any size."""
  if files.is_remote(path):
    return
  declared = trees.size(node)
  if declared <= _UNPACKED_BYTES:
    return
  on_disk = sum(size for _, size, _ in digests.status(path / str(step), (STATE,)))
  if declared > _UNPACKED_BYTES + _UNPACKED_TIMES * on_disk:
    raise Damaged(
      path,
      step,
      f'its arrays claim {files.megabytes(declared)} and its files have {files.megabytes(on_disk)}',
    )


@contextlib.contextmanager
def reading(path: epath.Path, step: int, whole: bool = False) -> Iterator[None]:
  """Turns what Orbax and TensorStore raise on damaged files into `Damaged`, one line that names the step.

  Where storage refuses or fails for the moment, it is a plain `UserError`: nothing is known about
  the step. So is whatever fails where its digests have shown the step to be `whole`, and in buckets,
  which have checksums of their own.

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
  except (jax.errors.JaxRuntimeError, Damaged):
    raise  # The former is a device out of memory, not a damaged file.
  except Exception as error:
    reason = files.brief(error)
    for link in (error, error.__cause__, error.__context__):
      if link is not None:
        traceback.clear_frames(link.__traceback__)  # they hold on to the abandoned reads
    time.sleep(_ABANDONED_READS_SECONDS)
    gc.collect()
    if whole or files.is_remote(path) or _may_pass(error):
      known = 'its files are those that were written' if whole else 'it may be whole'
      raise UserError(
        f'step {step} in {path} could not be read this time ({reason}); {known}: start again'
      ) from error
    raise Damaged(path, step, reason, shown=False) from error
  finally:
    sys.excepthook, sys.unraisablehook = hooks
    event_loop_log.removeFilter(_nothing)


def _may_pass(error: BaseException) -> bool:
  """Whether storage or memory failed, by what was raised and what it was raised from."""
  for link in (error, error.__cause__, error.__context__):
    if isinstance(link, OSError) and not isinstance(link, FileNotFoundError):
      return True
    if isinstance(link, MemoryError) or (link and _PASSING.search(str(link))):
      return True
  return False


def _nothing(_: standard_logging.LogRecord) -> bool:
  return False
