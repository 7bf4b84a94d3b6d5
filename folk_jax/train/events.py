"""TensorBoard's files of a run's scalars."""

import threading
import time
from collections.abc import Mapping

from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import event_file_writer


class Events:
  """Writes scalars to event files, each step at once."""

  def __init__(self, folder: epath.Path, first_step: int):
    """Opens a file in `folder`, made where it is missing; TensorBoard hides what older ones have from `first_step` on.

    Raises:
      OSError: it cannot be written.
    """
    _hush_writer_threads()
    self._writer = event_file_writer.EventFileWriter(str(folder))
    # At every such mark but the first, TensorBoard drops the older points from that step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(event_pb2.Event(step=first_step, session_log=start))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes scalars by their names. Raises OSError where the disk takes them no more."""
    points = [
      summary_pb2.Summary.Value(tag=key, simple_value=value) for key, value in values.items()
    ]
    self._add(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=points)))
    self._writer.flush()

  def _add(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()  # A label: nothing is ordered by it.
    self._writer.add_event(event)

  def close(self) -> None:
    """Writes what is left. Raises OSError."""
    self._writer.close()


def _hush_writer_threads() -> None:
  """TensorBoard's thread dies of a full disk with a traceback; its error also reaches `write`, where it is said."""
  before = threading.excepthook
  if getattr(before, 'hushes_writer_threads', False):
    return

  def hook(what: threading.ExceptHookArgs) -> None:
    writes = type(what.thread).__module__ == event_file_writer.__name__
    if not (writes and isinstance(what.exc_value, OSError)):
      before(what)

  hook.hushes_writer_threads = True
  threading.excepthook = hook
