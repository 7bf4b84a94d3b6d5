"""What a run says about itself: files of scalars, a progress line, throughput.

`MetricWriter` writes `metrics.jsonl`, TensorBoard and, where asked, Weights & Biases. `StepTimer`
measures images/s and the share of time spent waiting for data. `Late` keeps device scalars until
the next step is under way, so that the loop never waits for the step it has just launched.
`Progress` is the line on the screen.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np
import tqdm
from absl import logging
from etils import epath

from folk_jax import checkpoint
from folk_jax.checkpoint.files import is_remote
from folk_jax.errors import UserError
from folk_jax.train.events import Events
from folk_jax.train.faults import failures


class MetricWriter:
  """Writes scalars of a step to every place that keeps them; a context manager.

  `metrics.jsonl` has a JSON object a line: `step` and slash-named scalars. NaN and the infinities,
  which JSON does not have, are the strings 'nan', 'inf' and '-inf', all of which `float()` reads
  back: a null would not tell an overflow from a division by zero. TensorBoard gets them as they
  are.

  A resumed run cuts the file after the step it resumes from, so that no step stands there twice;
  TensorBoard is told to hide its later points likewise.
  """

  def __init__(
    self,
    workdir: str,
    *,
    tensorboard: bool = True,
    wandb: bool = False,
    config: Mapping[str, Any] | None = None,
    start_step: int = 0,
    primary: bool = True,
  ):
    """Opens the files.

    Args:
      workdir: the run's folder, local or in object storage (`gs://...`); made where it is missing.
      tensorboard: also write event files to `<workdir>/tensorboard/`.
      wandb: also log to Weights & Biases, whose own environment variables name project and account.
      config: what W&B shows as the run's configuration.
      start_step: the step the run resumes from; lines of later steps are dropped, and so is a
        last line that a kill cut short.
      primary: whether this process writes; all others of a run pass False and write nothing.

    Raises:
      UserError: wandb asked for and not installed, or a workdir that cannot be written.
    """
    self._lines = self._events = self._wandb = None
    self._workdir, self._failed = workdir, False
    if wandb:
      try:
        import wandb as wandb_module  # an optional package: only where it is asked for
      except ImportError as error:
        raise UserError(
          'W&B logging is on, but wandb is not installed: pip install wandb, or turn it off'
        ) from error
    if not primary:
      return
    path = epath.Path(workdir).expanduser()
    try:
      path.mkdir(parents=True, exist_ok=True)
      self._lines = _Lines(path / 'metrics.jsonl', start_step)
      if tensorboard:
        self._events = Events(path / 'tensorboard', start_step + 1)
    except (*failures(path), ImportError) as error:
      why = checkpoint.unwritable(error, path)
      why = why or f'{error}; give a --workdir that can be written'
      raise UserError(f'cannot write metrics to {workdir}: {why}') from error
    if wandb:
      self._wandb = wandb_module.init(
        config=dict(config or {}),
        dir=None if is_remote(path) else str(path),
        id=_run_id(path),
        resume='allow',
      )

  def write(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes scalars (Python, NumPy or jax, for which it waits) under their slash-named keys.

    Raises:
      UserError: the disk is full, or is not to be written any more.
    """
    values = {key: float(value) for key, value in scalars.items()}
    with self._writing(f'the metrics of step {step}'):
      self._write(step, values)

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    if self._lines is not None:
      self._lines.add(step, values)
    if self._events is not None:
      self._events.write(step, values)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  @contextlib.contextmanager
  def _writing(self, what: str) -> Iterator[None]:
    try:
      yield
    except failures(self._workdir) as error:
      self._failed = True
      why = checkpoint.unwritable(error, self._workdir) or str(error)
      raise UserError(f'cannot write {what} to {self._workdir}: {why}') from error

  def close(self) -> None:
    """Flushes and closes; a second call does nothing. Raises as `write` does, which has not failed before."""
    for name in ('_lines', '_events'):
      writer = getattr(self, name)
      setattr(self, name, None)
      if writer is None:
        continue
      # What could not be written was said once; files try it again when they are closed.
      passing = contextlib.suppress(*failures(self._workdir))
      with passing if self._failed else self._writing('the last metrics'):
        writer.close()
    if self._wandb is not None:
      self._wandb.finish()
      self._wandb = None

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Reads `metrics.jsonl` back: a dict a line, 'nan' and 'inf' as floats, no line cut short."""
  lines = []
  for line in _text(epath.Path(workdir).expanduser() / 'metrics.jsonl').splitlines():
    # A kill cuts a line short, a lost machine may leave anything at the end of the file.
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
      record = json.loads(line)
      lines.append({key: value if key == 'step' else float(value) for key, value in record.items()})
  return lines


def _text(path: epath.Path) -> str:
  return (path.read_bytes() if path.exists() else b'').decode('utf-8', 'replace')


class _Lines:
  """A JSONL file that grows a line at a time, flushed at each: a kill costs none."""

  # Object stores cannot append: there the file, which is small, is written anew this often.
  REWRITE_SECONDS = 60

  def __init__(self, path: epath.Path, start_step: int):
    self._path = path
    text = _text(path)
    kept = ''.join(f'{line}\n' for line in text.splitlines() if _belongs(line, start_step))
    if kept != text:
      checkpoint.replace_text(path, kept)
    self._text, self._written_at = kept, time.monotonic()
    self._file = None if is_remote(path) else open(path, 'a', encoding='utf-8')

  def add(self, step: int, values: Mapping[str, float]) -> None:
    record = {'step': int(step)} | {
      key: value if math.isfinite(value) else str(value) for key, value in values.items()
    }
    line = json.dumps(record, allow_nan=False) + '\n'
    if self._file is not None:
      self._file.write(line)
      self._file.flush()
      return
    self._text += line
    if time.monotonic() - self._written_at > self.REWRITE_SECONDS:
      try:
        self._rewrite()
      except failures(self._path) as error:  # Nothing is lost: the next time all is written anew.
        logging.warning('cannot write %s this time: %s', self._path, error)

  def _rewrite(self) -> None:
    self._written_at = time.monotonic()
    self._path.write_text(self._text)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    else:
      self._rewrite()


def _belongs(line: str, start_step: int) -> bool:
  try:
    return json.loads(line)['step'] <= start_step
  except (ValueError, KeyError, TypeError, RecursionError):
    return False  # cut short by a kill


def _run_id(path: epath.Path) -> str:
  """W&B's name of this run, kept in the workdir: a resumed run goes on with the same curves."""
  file = path / 'wandb_id'
  if not file.exists():
    file.write_text(np.random.default_rng().bytes(4).hex())
  return file.read_text()


class StepTimer:
  """Images/s and the share of time spent waiting for data, since the last `scalars()`.

  `with timer.waiting(): batch = next(batches)`, then the step, then `timer.tick(images)`. Steps are
  launched without waiting for them, so a single one's time means nothing: a window's does.
  """

  def __init__(self):
    self._born, self._trained = time.perf_counter(), 0.0
    self.begin()

  def begin(self) -> None:
    """Begins a window: what came before counts as no step's time."""
    self._began = time.perf_counter()
    self._waited, self._images, self._steps = 0.0, 0, 0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as waiting for data."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._waited += time.perf_counter() - began

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the time inside out: an evaluation, a save that blocks."""
    began = time.perf_counter()
    try:
      yield
    finally:
      self._began += time.perf_counter() - began

  def tick(self, images: int) -> None:
    """Counts a step over this many images of all processes; a pair of views is one image."""
    self._images += images
    self._steps += 1

  def scalars(self) -> dict[str, float]:
    """Ends the window, and says what it held; empty where no step was counted.

    `train/images_per_second`, `train/step_seconds`, and in [0, 1] `train/data_wait` and `train/goodput`: the share of
    the whole time since this timer was made that went into steps, and not into waiting or what was left out.
    """
    if not self._steps:
      return {}  # And the window goes on: a step may be running that was counted before.
    now = time.perf_counter()
    elapsed = max(now - self._began, 1e-9)
    steps, images, waited = self._steps, self._images, self._waited
    self.begin()
    self._trained += max(elapsed - waited, 0.0)
    return {
      'train/goodput': min(self._trained / max(now - self._born, 1e-9), 1.0),
      'train/images_per_second': images / elapsed,
      'train/data_wait': min(waited / elapsed, 1.0),
      'train/step_seconds': elapsed / steps,
    }


class Late:
  """Holds a step's device scalars until the next push, when reading them stalls nothing."""

  def __init__(self):
    self._held = None

  def push(self, step: int, scalars: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
    """Takes a step's scalars (arrays of shape []); returns those of the push before as floats."""
    before = self.flush()
    self._held = (step, dict(scalars))
    for value in scalars.values():
      if hasattr(value, 'copy_to_host_async'):
        value.copy_to_host_async()
    return before

  def flush(self) -> tuple[int, dict[str, float]] | None:
    """Returns what is held, or None: for the end of a run, or a guard that cannot wait."""
    if self._held is None:
      return None
    (step, scalars), self._held = self._held, None
    return step, {key: float(value) for key, value in scalars.items()}


class Progress:
  """A bar on a terminal, elsewhere a plain line at each update with scalars; both on stderr.

  They show the step, the loss, images/s, the share of time spent waiting for data, and the ETA.
  """

  _SHOWN = {
    'train/loss': ('loss', '{:.4f}'),
    'train/images_per_second': ('images/s', '{:.1f}'),
    'train/data_wait': ('data wait', '{:.0%}'),
  }

  def __init__(
    self, total_steps: int, start_step: int = 0, enabled: bool = True, stream: TextIO | None = None
  ):
    """Begins the line.

    Args:
      total_steps: of the whole run.
      start_step: the step it resumes from.
      enabled: False on all processes of a run but one, which say nothing.
      stream: stderr by default.
    """
    stream = stream or sys.stderr
    self._stream, self._enabled = stream, enabled
    self._total, self._start, self._step = total_steps, start_step, start_step
    self._began = time.perf_counter()
    self._bar = None
    if enabled and stream.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps,
        initial=start_step,
        file=stream,
        dynamic_ncols=True,
        unit='step',
        smoothing=0.1,
      )

  def update(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
    """Moves to `step`, the steps done. Without scalars only a bar moves."""
    if not self._enabled:
      return
    shown = {
      label: form.format(scalars[key])
      for key, (label, form) in self._SHOWN.items()
      if scalars and key in scalars
    }
    if self._bar is not None:
      if shown:
        self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._step)
    elif scalars:
      fields = [
        f'step {step}/{self._total}',
        *(f'{label} {value}' for label, value in shown.items()),
      ]
      self.say('  '.join([*fields, f'ETA {self._time_to_go(step)}']))
    self._step = step

  def say(self, line: str) -> None:
    """Prints a line above the bar, or as it is where there is none."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.write(line, file=self._stream)
    else:
      print(line, file=self._stream, flush=True)

  def _time_to_go(self, step: int) -> str:
    done = step - self._start
    if done <= 0:
      return 'unknown'
    seconds = (time.perf_counter() - self._began) / done * (self._total - step)
    return tqdm.tqdm.format_interval(seconds)

  def close(self) -> None:
    """Ends the bar's line."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()
