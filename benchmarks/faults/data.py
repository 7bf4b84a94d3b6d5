"""Faults of data: files, records, decoders and workers that fail under a loader, and whole runs over them.

  python benchmarks/faults/data.py [--times=N] [--only='a worker killed;...']

Trials of the loader are processes that stream batches under a fault and compare them with a clean stream
(`data_child.py`); trials of runs are `python -m folk_jax.main` on a :smoke recipe over a folder of images.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import common
import numpy as np
from PIL import Image

from folk_jax.data import plans, prepare
from folk_jax.train import watchdog

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = 96
# A status of data_child.py's: the fault did not happen.
_NOT_MADE = 3
# No trial takes so long, on any machine: a hang is what these trials look for.
HANG_SECONDS = 900


def images(folder: pathlib.Path, seed: int) -> None:
  """Writes 96 images of noise, in two classes, and 16 to evaluate on."""
  shutil.rmtree(folder, ignore_errors=True)
  rng = np.random.default_rng(seed)
  for split, count in (('train', COUNT), ('val', 16)):
    for number in range(count):
      file = folder / split / 'ab'[number % 2] / f'{number:03d}.jpg'
      file.parent.mkdir(parents=True, exist_ok=True)
      sides = rng.integers(24, 60, 2)
      Image.fromarray(rng.integers(0, 256, (*sides, 3), np.uint8)).save(file)


def damage(file: pathlib.Path, kind: str, rng: np.random.Generator) -> None:
  """Makes a good image bad."""
  data = file.read_bytes()
  if kind in ('gone', 'pipe'):
    file.unlink()
  if kind == 'pipe':
    os.mkfifo(file)
  if kind == 'cut':
    file.write_bytes(data[: int(rng.integers(20, len(data) - 20))])
  if kind == 'empty':
    file.write_bytes(b'')
  if kind == 'corrupt':
    file.write_bytes(rng.bytes(len(data)))
  if kind == 'bomb':
    at = data.index(b'\xff\xc0') + 5
    file.write_bytes(data[:at] + b'\xff\xdc\xff\xdc' + data[at + 4 :])


# A fault that comes too early or too late is drawn again so many times.
_TRIES = 6
# A file that is gone is no sample when a run lists its folder; the tests have files that vanish later.
KINDS = ('cut', 'empty', 'corrupt', 'bomb', 'pipe')


def prepared(workdir: pathlib.Path, number: int, share: float) -> tuple[pathlib.Path, list[int]]:
  """A folder with damage and its clean twin; the numbers of the damaged samples."""
  folder, clean = workdir / 'images', workdir / 'images.clean'
  images(folder, number)
  shutil.rmtree(clean, ignore_errors=True)
  shutil.copytree(folder, clean)
  rng = np.random.default_rng(number)
  files = sorted((folder / 'train').rglob('*.jpg'))
  bad = sorted(rng.choice(len(files), int(share * len(files)), replace=False).tolist())
  for place, index in enumerate(bad):
    damage(files[index], KINDS[place % len(KINDS)], rng)
  (workdir / 'images.bad').write_text(' '.join(map(str, bad)))
  return folder, bad


def environment(workdir: pathlib.Path, **more: str) -> dict[str, str]:
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')]))
  cache = str(workdir.resolve() / 'xla')
  return {
    **os.environ,
    'PYTHONPATH': path,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': cache,
    **more,
  }


class NotMade(Exception):
  """The fault did not happen: the trial shows nothing, and does not count."""


def child(kind: str, folder: pathlib.Path, number: int, workdir: pathlib.Path, **more: str) -> str:
  """Runs `data_child.py`; what it says was lost."""
  command = [
    sys.executable,
    str(ROOT / 'benchmarks/faults/data_child.py'),
    kind,
    str(folder),
    str(number),
  ]
  env = environment(workdir, FAULT_KIND=kind, **more)
  try:
    done = subprocess.run(
      command, env=env, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
  except subprocess.TimeoutExpired:
    return f'it hung for {HANG_SECONDS} s'
  if done.returncode == _NOT_MADE:
    raise NotMade(done.stderr.strip())
  lines = done.stdout.splitlines()
  if done.returncode or not lines:
    return f'exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}'
  return lines[-1]


def loader(workdir: pathlib.Path, kind: str, number: int) -> str:
  folder, _ = prepared(workdir, number, 0.06 if kind == 'files' else 0.0)
  sample, why = str(number * 7 % COUNT), []
  for attempt in range(_TRIES):
    try:
      return child(kind, folder, number, workdir, FAULT_SAMPLE=sample, FAULT_ATTEMPT=str(attempt))
    except NotMade as error:
      why.append(str(error))
  raise RuntimeError(f'in {_TRIES} tries the fault did not happen: {why}')


def shards(workdir: pathlib.Path, how: str, number: int) -> str:
  """Damages the second of four shards."""
  images(workdir / 'images', number)
  out = workdir / 'records'
  shutil.rmtree(out, ignore_errors=True)
  prepare.write_plans(plans.plan_folder(str(workdir / 'images'), COUNT // 4), str(out), quiet=True)
  shard = out / 'train-00001-of-00004.array_record'
  data, rng = bytearray(shard.read_bytes()), np.random.default_rng(number)
  harmless = ''
  if how == 'cut':
    del data[int(rng.integers(1, len(data))) :]
  else:
    at = int(rng.integers(64, len(data) - 8))
    # Blocks are padded with zeros to 64 KB: damage there harms no record, and may pass in silence.
    harmless = 'yes' if not any(data[at : at + 8]) else ''
    for place in range(at, at + 8):
      data[place] ^= int(rng.integers(1, 256))
  shard.write_bytes(data)
  return child('shard', out, number, workdir, FAULT_HARMLESS=harmless)


def command(folder: pathlib.Path, run: pathlib.Path, steps: int, **fields: object) -> list[str]:
  fields = {
    'data.workers': 2,
    'data.threads': 1,
    'data.limit': 0,
    'data.max_bad_share': 0.1,
    'evaluation.at_start': False,
    'evaluation.knn': '()',
    'evaluation.held_out_images': 16,
    'logging.tensorboard': False,
    'compilation_cache': '',
    'checkpoint.every': 4,
    'total_steps': steps,
    **fields,
  }
  recipe = f'configs/vit_s.py:smoke,data=folder,path={folder.resolve()}'
  flags = [f'--config.{key}={value}' for key, value in fields.items()]
  return [sys.executable, '-m', 'folk_jax.main', f'--config={recipe}', f'--workdir={run}', *flags]


def run_of(
  workdir: pathlib.Path, run: pathlib.Path, folder: pathlib.Path, disturb=None, **fields
) -> tuple[int, str]:
  """A whole run; its status, and stderr."""
  log = workdir / 'log'
  with open(log, 'w', encoding='utf-8') as file:
    process = subprocess.Popen(
      command(folder, run, 12, **fields),
      env=environment(workdir),
      cwd=ROOT,
      stdout=file,
      stderr=file,
    )
    if disturb:
      disturb(process, log)
    try:
      status = process.wait(HANG_SECONDS)
    except subprocess.TimeoutExpired:
      process.kill()
      status = -1
  return status, log.read_text(encoding='utf-8')


def losses(run: pathlib.Path) -> list[tuple[int, float]]:
  lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  return [(line['step'], line['train/loss']) for line in lines if 'train/loss' in line]


def workers_of(process: subprocess.Popen) -> list[int]:
  """The loader's workers: what the run has started that runs Python's spawn."""
  found = []
  for entry in pathlib.Path('/proc').iterdir():
    if entry.name.isdigit():
      try:
        line = (entry / 'cmdline').read_bytes()
        parent = int((entry / 'stat').read_text().rsplit(')', 1)[1].split()[1])
      except OSError:
        continue
      if parent == process.pid and b'spawn_main' in line:
        found.append(int(entry.name))
  return found


def at_step(step: int, act, process: subprocess.Popen, log: pathlib.Path) -> None:
  """Acts on the workers once the run has said a step."""
  end = time.monotonic() + HANG_SECONDS
  while process.poll() is None and time.monotonic() < end:
    if f'step {step}/' in log.read_text(encoding='utf-8'):
      for pid in workers_of(process):
        act(pid)
      return
    time.sleep(0.05)


def whole_run(workdir: pathlib.Path, number: int) -> str:
  """Bad files and killed workers: every one named, and the losses of the run that had no workers to lose."""
  folder, bad = prepared(workdir, number, 0.06)
  found = {}
  # A kill after whose step all batches had been made comes earlier in another run.
  for name, step in (('plain', 0), ('killed', 3 + number % 5), ('killed', 2), ('killed', 1)):
    run = workdir / f'run_{name}'
    shutil.rmtree(run, ignore_errors=True)
    kill = functools.partial(at_step, step, lambda pid: os.kill(pid, signal.SIGKILL))
    fields = {'data.workers': 0} if name == 'plain' else {}
    status, said = run_of(workdir, run, folder, kill if name == 'killed' else None, **fields)
    if status:
      return f'the {name} run ended with status {status}: {said.splitlines()[-1:]}'
    found[name] = losses(run)
    if name == 'killed' and 'exit code -9' in said:
      break
  else:
    raise RuntimeError('no worker was killed in time')
  lines = (workdir / 'run_killed' / 'bad_samples.jsonl').read_text().splitlines()
  if {json.loads(line)['index'] for line in lines} != set(bad):
    return f'{len(lines)} of {len(bad)} bad files were named'
  return (
    ''
    if found['plain'] == found['killed']
    else 'the losses differ from those of the run without workers'
  )


def stopped_workers(workdir: pathlib.Path, number: int) -> str:
  """Workers that neither die nor answer: the watchdog says so, ends the run, and it goes on to its end."""
  folder, _ = prepared(workdir, number, 0.0)
  run = workdir / 'run_stopped'
  shutil.rmtree(run, ignore_errors=True)
  pids = []

  def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    pids.append(pid)

  fields = {'watchdog.seconds': 20, 'watchdog.limit': 60, 'data.decode_seconds': 0}
  status, said = run_of(workdir, run, folder, functools.partial(at_step, 5, stop), **fields)
  if status != watchdog.STATUS or 'waiting for the batch of step' not in said:
    return f'the run ended with status {status}: {said.splitlines()[-1:]}'
  # The run waits for their end; this wait is for a machine that is slow to take a process off its list.
  end = time.monotonic() + 10
  while left := [pid for pid in pids if os.path.exists(f'/proc/{pid}')]:
    if time.monotonic() > end:
      return f'{len(left)} workers were left behind'
    time.sleep(0.1)
  if not (run / 'stacks-0.txt').exists():
    return 'no stacks were written'
  status, said = run_of(workdir, run, folder)
  return (
    ''
    if not status and losses(run)[-1][0] == 12
    else f'started again, it ended with status {status}'
  )


def faults(workdir: pathlib.Path) -> list[common.Fault]:
  """The rows."""
  same = 'The batches are those of a clean stream but for the bad sample, which the next one replaces, and it is named.'
  unchanged = 'The batches are those of an undisturbed stream, bit for bit.'

  def of_loader(name: str, kind: str, promise: str, how: str, times: int) -> common.Fault:
    return common.Fault(name, promise, how, functools.partial(loader, workdir, kind), times)

  return [
    of_loader(
      'bad image files',
      'files',
      'Each is named and replaced by the next good one; all other rows stay.',
      'Damages 6 % of 96 images (cut, empty, noise, a header of 4 gigapixels, a pipe) under 2 workers with 2 threads.',
      6,
    ),
    of_loader(
      'a slow file',
      'slow',
      'It is waited for, and nothing changes.',
      'A read takes three times data.decode_seconds.',
      3,
    ),
    of_loader('an endless decode', 'endless', same, 'The decoder of one sample never returns.', 4),
    of_loader(
      'a decoder that holds the interpreter',
      'stuck',
      same,
      'Nor does it let any thread of its worker run.',
      4,
    ),
    of_loader(
      'a sample that kills its worker', 'crash', same, 'Reading one sample raises SIGSEGV.', 4
    ),
    of_loader(
      'a worker killed',
      'killed',
      unchanged,
      'kill -9 of all workers at a random moment, as for want of memory.',
      8,
    ),
    of_loader(
      'a worker killed while it starts',
      'killed at start',
      unchanged,
      'kill -9 in the first four seconds.',
      5,
    ),
    of_loader(
      'SIGTERM to workers that start',
      'told to end at start',
      unchanged,
      'SIGTERM to every worker, four times in its first two seconds.',
      5,
    ),
    common.Fault(
      'bytes of a shard flipped',
      'What cannot be read is named by shard and record, and passed over or the run stops.',
      'Flips eight bytes anywhere in one of four ArrayRecord shards.',
      functools.partial(shards, workdir, 'flip'),
      6,
    ),
    common.Fault(
      'a shard cut short',
      'The run stops, and names the shard.',
      'Cuts one of four ArrayRecord shards anywhere.',
      functools.partial(shards, workdir, 'cut'),
      6,
    ),
    common.Fault(
      'a run over bad files whose workers are killed',
      'It ends with the losses of an undisturbed run, to the last bit, and a list of the bad files.',
      'A :smoke run over 96 images, 6 % of them bad, whose workers get kill -9 at a step.',
      functools.partial(whole_run, workdir),
      2,
    ),
    common.Fault(
      'a run whose workers hang',
      'The watchdog says what it waits for and ends the run with status 75; started again, it ends.',
      'SIGSTOP to the workers of a :smoke run at step 5.',
      functools.partial(stopped_workers, workdir),
      1,
    ),
  ]


def main() -> None:
  """Runs the chosen faults."""
  flags = common.parser(__doc__, __file__).parse_args()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  common.main(faults(flags.workdir.resolve()), flags, 'faults of data')


if __name__ == '__main__':
  main()
