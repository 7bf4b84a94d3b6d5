"""The samples of a run that do not decode, kept in its workdir: a share of the data set holds over all its starts.

A process writes `bad_samples.jsonl` (`bad_samples-<number>.jsonl` where there are several) and reads everybody's: one
line of JSON a sample with `index`, `name` and `reason`; `passed_over` true where it is not even tried again, with what
it holds for (`tried`); `mended` true where a later start decoded it after all.
"""

import dataclasses
import json
import math
import os
import time

from etils import epath

from folk_jax.data import notices
from folk_jax.data.sources import Source

_PREFIX = 'bad_samples'
# Objects can't be added to, and each look costs requests: in a bucket files are written and read so often at most.
REMOTE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Tried:
  """With what a sample was tried that is passed over; with anything else it is tried again.

  Attributes:
    decode_seconds: the time it had to decode; 0 for no limit.
    file: bytes and time (ns) of the file that holds it; None where there is none, or it can't be told.
  """

  decode_seconds: float
  file: tuple[int, int] | None = None

  def holds(self, now: 'Tried') -> bool:
    """Whether trying it `now` would be the same again: the same file, and no more time."""
    return self.file == now.file and _limit(now.decode_seconds) <= _limit(self.decode_seconds)


def _limit(seconds: float) -> float:
  return seconds or math.inf


def trying(source: Source, index: int, decode_seconds: float) -> Tried:
  """With what sample `index` would be tried now."""
  try:
    found = os.stat(source.file(index))
  except (OSError, ValueError):
    return Tried(decode_seconds)
  return Tried(decode_seconds, (found.st_size, found.st_mtime_ns))


@dataclasses.dataclass(frozen=True)
class Bad:
  """A sample that does not decode.

  Attributes:
    index: its number in the source.
    name: what messages call it.
    reason: why, in a few words.
    passed_over: whether it is not to be tried again: it hangs its decoder, or kills it.
    tried: what that holds for; None where it is not known.
  """

  index: int
  name: str
  reason: str
  passed_over: bool = False
  tried: Tried | None = None

  def __str__(self) -> str:
    return f'{self.name} ({self.reason})'


class Ledger:
  """What all starts and all processes of a run know of bad samples; without a folder, what this start knows."""

  def __init__(self, directory: str = '', process_index: int = 0):
    """Reads what is there.

    Args:
      directory: the run's, local or in object storage; '' to keep nothing.
      process_index: number of this process; each writes a file of its own.
    """
    self._directory = epath.Path(directory).expanduser() if directory else None
    self._process = process_index
    self._remote = '://' in directory
    # gcsfs raises what is no OSError; a run goes on without its ledger.
    self._failures = Exception if self._remote else OSError
    ending = f'-{process_index}' if process_index else ''
    self._file = self._directory / f'{_PREFIX}{ending}.jsonl' if directory else None
    self._lines: list[str] = []
    self._cut = False
    self._bad: dict[int, Bad] = {}
    self._writes = self._file is not None
    # By file: its size when it was read, and how many whole lines of it have been taken in.
    self._read: dict[str, tuple[int, int]] = {}
    self._looked_at = self._written_at = -math.inf
    self._unwritten = self._warned = False
    self.refresh(now=True)

  @property
  def bad(self) -> dict[int, Bad]:
    """The bad samples by number, in the order met."""
    return self._bad

  @property
  def where(self) -> str:
    """The files, for a message; '' where there are none."""
    return str(self._directory / f'{_PREFIX}*.jsonl') if self._directory else ''

  def refresh(self, now: bool = False) -> None:
    """Takes in what other processes have found since; in a bucket once a minute at most, or `now`."""
    if self._directory is None:
      return
    if self._remote:
      self._flush(now)
      if not now and time.monotonic() - self._looked_at < REMOTE_SECONDS:
        return
      self._looked_at = time.monotonic()
    try:
      for file in sorted(self._directory.glob(f'{_PREFIX}*.jsonl')):
        self._take_file(file)
    except self._failures:
      return  # What can't be read now is read the next time.

  def _take_file(self, file: epath.Path) -> None:
    """Takes in the lines that a file has gained."""
    before, taken = self._read.get(str(file), (-1, 0))
    if file == self._file and before >= 0:
      return  # Ours are known.
    size = file.stat().length
    if size == before:
      return
    text = file.read_bytes().decode('utf-8', 'replace')
    lines = text.split('\n')
    for line in lines[taken:]:
      self._take(line)
    # The last line may be cut short: it is looked at again.
    self._read[str(file)] = size, len(lines) - 1
    if file == self._file:
      self._cut = bool(lines[-1])
      self._lines = [line for line in lines if line] + self._lines

  def _take(self, line: str) -> None:
    try:
      found = json.loads(line)
      index = int(found['index'])
      if found.get('mended'):
        self._bad.pop(index, None)
        return
      passed_over = bool(found.get('passed_over'))
      tried = _tried(found['tried']) if passed_over and 'tried' in found else None
      bad = Bad(index, str(found['name']), str(found['reason']), passed_over, tried)
    except (ValueError, LookupError, TypeError, AttributeError):
      return  # A line that a kill or a full disk cut short.
    if index not in self._bad or passed_over:  # What it was passed over for last is what holds.
      self._bad[index] = bad

  def add(self, bad: Bad) -> None:
    """Notes a bad sample."""
    self._bad[bad.index] = bad
    fields = {'index': bad.index, 'name': bad.name, 'reason': bad.reason}
    fields |= {'passed_over': True} if bad.passed_over else {}
    self._write(fields | ({'tried': dataclasses.asdict(bad.tried)} if bad.tried else {}))

  def mend(self, index: int) -> None:
    """Notes that a sample decodes after all."""
    del self._bad[index]
    self._write({'index': index, 'mended': True})

  def close(self) -> None:
    """Writes what is not written yet; more may be noted afterwards."""
    self._flush(now=True)

  def _write(self, fields: dict) -> None:
    if not self._writes:
      return
    if self._remote:
      self._lines.append(json.dumps(fields))
      self._unwritten = True
      self._flush()
      return
    try:
      with open(self._file, 'a', encoding='utf-8') as file:
        file.write('\n' * self._cut + json.dumps(fields) + '\n')
      self._cut = False
    except OSError as error:
      self._writes = False
      self._warn(error)

  def _flush(self, now: bool = False) -> None:
    """Writes the whole file anew, in a bucket; where that fails, the next time has another try."""
    if not self._unwritten or not now and time.monotonic() - self._written_at < REMOTE_SECONDS:
      return
    self._written_at = time.monotonic()
    try:
      if str(self._file) not in self._read and self._file.exists():
        self._take_file(self._file)  # It could not be read before, and must not be lost.
      self._file.write_text('\n'.join(self._lines) + '\n')
      self._unwritten = False
      self._read.setdefault(str(self._file), (0, 0))
    except Exception as error:
      self._warn(error)

  def _warn(self, error: Exception) -> None:
    if not self._warned:
      self._warned = True
      notices.warn(self._process, f'bad samples are not kept in {self._file}: {error}')


def _tried(found: dict) -> Tried:
  file = found['file']
  return Tried(float(found['decode_seconds']), file and (int(file[0]), int(file[1])))
