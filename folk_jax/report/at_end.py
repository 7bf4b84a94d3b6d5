"""The page that a run leaves behind, made by a process of its own: whatever happens to it, the run has succeeded."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

import folk_jax

# The devices are held meanwhile. Where other processes of the run wait for this one at their end, they do so for five
# minutes.
_SECONDS = {False: 300, True: 150}
_LOOK_EVERY = 1.0
_GRACE = 5.0


def page_missing(workdir: str) -> bool:
  """Whether a folder has no page yet, as where the run was ended while it was made; False where it can't be told."""
  try:
    return not (epath.Path(workdir).expanduser() / 'report.html').exists()
  except Exception:
    return False


def write_page(workdir: str, told: Callable[[], bool] = lambda: False) -> None:
  """Writes `<workdir>/machine.json` and `<workdir>/report.html`. Fails with a warning in the log, never otherwise.

  On CPUs, since the devices are this process's, and from the files that the run has written: call it once the last
  checkpoint is whole, on the first process alone. It takes five minutes at most, half of that with several processes.

  Args:
    workdir: the run's folder.
    told: whether this process has been told to end; asked once a second, and then the page is given up.
  """
  try:
    folder = epath.Path(workdir).expanduser()
    (folder / 'machine.json').write_text(json.dumps(machine(), indent=2) + '\n')
    _run(workdir, told)
    print(f'report: {folder / "report.html"}')
  except Exception as error:
    why = ' '.join(str(error).split())[-300:]
    logging.warning(
      'no report was written (%s); try python -m folk_jax.report --workdir=%s', why, workdir
    )


def _run(workdir: str, told: Callable[[], bool]) -> None:
  home = os.path.dirname(os.path.dirname(folk_jax.__file__))
  path = os.pathsep.join(filter(None, [home, os.environ.get('PYTHONPATH', '')]))
  limit = _SECONDS[jax.process_count() > 1]
  process = subprocess.Popen(
    [sys.executable, '-m', 'folk_jax.report', f'--workdir={workdir}'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  end = time.monotonic() + limit
  try:
    while True:
      if told():
        raise RuntimeError('told to end')
      try:
        _, said = process.communicate(timeout=_LOOK_EVERY)
        break
      except subprocess.TimeoutExpired:
        if time.monotonic() > end:
          raise RuntimeError(f'it took more than {limit} seconds') from None
  finally:
    _end(process)  # Also where this process is interrupted.
  if process.returncode:
    raise RuntimeError((said.strip() or f'exit status {process.returncode}').splitlines()[-1])


def _end(process: subprocess.Popen) -> None:
  if process.poll() is not None:
    return
  process.terminate()
  try:
    process.communicate(timeout=_GRACE)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()


def machine() -> dict[str, str]:
  """What this run trains on, in words."""
  devices = jax.devices()
  kinds = sorted({device.device_kind for device in devices})
  return {
    'devices': f'{len(devices)} x {", ".join(kinds)} ({jax.default_backend()})',
    'processes': str(jax.process_count()),
    'cores of the first host': str(os.cpu_count()),
    'system': platform.platform(terse=True),
    'Python': platform.python_version(),
    'jax': jax.__version__,
    'folk_jax': folk_jax.__version__,
  }
