"""What every benchmark writes beside its numbers: machine, date, versions, commit, command."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from folk_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent

# glibc hands the step's temporary buffer (hundreds of MB) back to the kernel after each step, which
# zeroes it again page by page in the next: a quarter of the quickstart's processor time. In huge
# pages it costs little. Read when a process starts, so it is set for child processes; the launch
# scripts set the same.
KEEP_MEMORY = 'glibc.malloc.hugetlb=1'


def context(device: str | None = None) -> dict[str, Any]:
  """Date, machine, versions and commit; `device` is the accelerator's name where there is one."""
  return {
    'command': shlex.join(['python', _relative(sys.argv[0]), *sys.argv[1:]]),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': _commit(),
    'machine': {
      'device': device or 'cpu',
      'processor': _processor(),
      'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
      'load_average': round(os.getloadavg()[0], 2),
    },
    'glibc_tunables': os.environ.get('GLIBC_TUNABLES', ''),
    'versions': {'python': platform.python_version()} | _versions('jax', 'flax', 'numpy', 'torch'),
  }


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a file so that a kill leaves the old one or the new one.

  Raises:
    UserError: where it cannot be written.
  """
  fresh = path.with_name(f'{path.name}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
    fresh.replace(path)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error}; name another file with --out') from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What `write_json` wrote.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    if isinstance(found, dict):
      return found
    why = f'a {type(found).__name__}, not an object'
  except (OSError, ValueError) as error:
    why = str(error)
  raise UserError(
    f'{path} is not a result as benchmarks/ writes them ({why}): take the committed one back (`git checkout` and its '
    'name), or remove it to begin anew'
  )


def between_marks(path: pathlib.Path, sections: Mapping[str, str]) -> None:
  """Writes into a page what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, for each name.

  Raises:
    UserError: the page lacks a mark, or has it twice.
  """
  page = path.read_text(encoding='utf-8')
  for name, text in sections.items():
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    if page.count(begin) != 1 or page.count(end) != 1:
      raise UserError(f'{path} must hold {begin} and {end} once each')
    before, _, rest = page.partition(begin)
    page = f'{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}'
  path.write_text(page, encoding='utf-8')


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Columns of text, the first flush left and the others flush right."""
  cells = [
    [f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in row] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
  lines = [
    '  '.join(
      cell.rjust(w) if i else cell.ljust(w)
      for i, (cell, w) in enumerate(zip(line, widths, strict=True))
    )
    for line in [list(header), *cells]
  ]
  return '\n'.join(lines)


def measure(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Milliseconds of each program in each round, by turns.

  Each runs once unmeasured before it is measured: what ran before it has taken the caches, and may have given pages
  back.
  """
  import jax  # Not at the top: worker processes of the loader's benchmark import this file.

  milliseconds = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      jax.block_until_ready(run())
      start = time.perf_counter()
      jax.block_until_ready(run())
      milliseconds[name].append(1e3 * (time.perf_counter() - start))
  return milliseconds


def main(run: Callable[[], None]) -> None:
  """Runs a benchmark; a mistake of the user's is one line on stderr and exit status 2."""
  try:
    run()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _relative(path: str) -> str:
  resolved = pathlib.Path(path).resolve()
  return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else path


def _commit() -> str | None:
  """The commit that is checked out, with `+` where files differ from it; None outside git."""
  try:
    git = ['git', '-C', str(ROOT)]
    commit = subprocess.run(
      [*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True
    )
    changed = subprocess.run(
      [*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit.stdout.strip() + ('+' if changed.stdout.strip() else '')


def _processor() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.machine()


def _versions(*packages: str) -> dict[str, str]:
  found = {}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
