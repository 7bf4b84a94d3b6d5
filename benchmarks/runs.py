"""Runs folk_jax.main as a user would, in a process of its own, and reads what the run wrote."""

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import report

from folk_jax.errors import UserError
from folk_jax.train import metrics

_CURVES = ('loss', 'loss_reconstruction', 'loss_distillation', 'loss_patch', 'teacher_entropy')
_CURVE_POINTS = 150


def train(
  config: str, workdir: pathlib.Path, seed: int, flags: Sequence[str]
) -> dict[str, float | None]:
  """One run, to its end, from its newest checkpoint where there is one.

  Returns:
    Seconds (None where the run had begun before) and peak memory of the process.

  Raises:
    UserError: where the run fails.
  """
  resumed = (workdir / 'config.json').exists()
  command = [sys.executable, '-m', 'folk_jax.main', f'--config={config}', *flags]
  command += [f'--workdir={workdir}', f'--config.seed={seed}']
  paths = [str(report.ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  environment = os.environ | {'PYTHONPATH': os.pathsep.join(paths)}
  began = time.perf_counter()
  process = subprocess.Popen(command, env=environment)
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise UserError(
      f'the run in {workdir} ended with status {process.returncode}: '
      'start this again to go on from its checkpoint'
    )
  return {
    'wall_seconds': None if resumed else round(time.perf_counter() - began, 1),
    # Of the largest of its processes, where it decodes in several.
    'peak_memory_gib': round(usage.ru_maxrss / 2**20, 3),
  }


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """What a finished run says of itself: kNN before and after, reconstruction, speed, curves."""
  lines = metrics.read_metrics(str(workdir))
  evaluations = [
    {key.removeprefix('eval/'): value for key, value in line.items()}
    for line in lines
    if 'eval/knn_top1' in line
  ]
  training = [line for line in lines if 'train/loss' in line]
  if len(evaluations) < 2 or not training:
    raise UserError(f'{workdir} has no kNN before and after: leave config.evaluation.at_start on')
  for evaluation in evaluations:
    if 'reconstruction' in evaluation:
      of_mean = evaluation['reconstruction_of_mean']
      evaluation['reconstruction_relative'] = evaluation['reconstruction'] / of_mean
  # A line that was written when no step had been timed since the one before has no times.
  timed = [line for line in training if 'train/step_seconds' in line]
  steps = [line['step'] for line in timed]
  windows = [after - before for before, after in zip([0, *steps], steps, strict=False)]
  seconds = sum(n * line['train/step_seconds'] for n, line in zip(windows, timed, strict=True))
  every = -(-len(training) // _CURVE_POINTS)
  thinned = training[::-1][::every][::-1]
  return {
    'steps': training[-1]['step'],
    'knn_before': evaluations[0]['knn_top1'],
    'knn_after': evaluations[-1]['knn_top1'],
    'gain': evaluations[-1]['knn_top1'] - evaluations[0]['knn_top1'],
    'reconstruction_relative': evaluations[-1].get('reconstruction_relative'),
    # Evaluations and blocking saves left out, the first step's compilation included.
    'train_seconds': round(seconds, 1),
    'images_per_second': round(statistics.median(x['train/images_per_second'] for x in timed), 1),
    'data_wait': round(statistics.median(line['train/data_wait'] for line in timed), 4),
    'evaluations': evaluations,
    'curves': {'step': [line['step'] for line in thinned]}
    | {
      name: [line.get(f'train/{name}') for line in thinned]
      for name in _CURVES
      if f'train/{name}' in thinned[-1]
    },
  }
