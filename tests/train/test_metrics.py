"""What a run writes and says: read back from the real files, with TensorBoard's own reader."""

import io
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_file_loader, plugin_event_accumulator

from folk_jax.errors import UserError
from folk_jax.train import metrics


def lines_of(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_scalars_of_every_kind_become_json_numbers(tmp_path):
  with metrics.MetricWriter(str(tmp_path)) as writer:
    writer.write(1, {'train/loss': 0.5, 'train/a': np.float32(0.25), 'train/b': jnp.float32(2)})
    writer.write(np.int64(2), {'eval/knn_top1': np.float64(0.75), 'n': 3})
  assert lines_of(tmp_path) == [
    {'step': 1, 'train/loss': 0.5, 'train/a': 0.25, 'train/b': 2.0},
    {'step': 2, 'eval/knn_top1': 0.75, 'n': 3.0},
  ]


def test_what_json_lacks_is_written_as_strings_and_read_back(tmp_path):
  with metrics.MetricWriter(str(tmp_path)) as writer:
    writer.write(1, {'a': float('nan'), 'b': np.float32('inf'), 'c': -math.inf})

  def refuse(constant: str) -> None:
    raise AssertionError(f'{constant} is no JSON')

  text = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(text, parse_constant=refuse) == {'step': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf'}
  (record,) = metrics.read_metrics(str(tmp_path))
  assert math.isnan(record['a']) and record['b'] == math.inf and record['c'] == -math.inf


def test_lines_are_on_disk_before_the_writer_is_closed(tmp_path):
  code = """
import os, sys
from folk_jax.train import metrics
writer = metrics.MetricWriter(sys.argv[1])
writer.write(1, {"a": 2.0})
os.kill(os.getpid(), 9)
"""
  environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
  died = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=environment, check=False)
  assert died.returncode == -9
  assert lines_of(tmp_path) == [{'step': 1, 'a': 2.0}]
  assert scalars_of(tmp_path) == {'a': [(1, 2.0)]}


def test_a_resumed_run_drops_later_steps_and_a_cut_line(tmp_path):
  with metrics.MetricWriter(str(tmp_path), tensorboard=False) as writer:
    for step in (10, 20, 30):
      writer.write(step, {'a': float(step)})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 15, "a": 1')
  with metrics.MetricWriter(str(tmp_path), tensorboard=False, start_step=20) as writer:
    writer.write(30, {'a': -30.0})
  assert [(line['step'], line['a']) for line in lines_of(tmp_path)] == [
    (10, 10),
    (20, 20),
    (30, -30),
  ]
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']
  with metrics.MetricWriter(str(tmp_path), tensorboard=False):
    pass
  assert lines_of(tmp_path) == []  # a run that begins anew at step 0


def test_a_whole_line_without_its_newline_does_not_swallow_the_next(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "a": 1.0}')
  with metrics.MetricWriter(str(tmp_path), tensorboard=False, start_step=1) as writer:
    writer.write(2, {'a': 2.0})
  assert [line['step'] for line in lines_of(tmp_path)] == [1, 2]


def test_read_metrics_skips_a_cut_line_and_a_missing_file(tmp_path):
  assert metrics.read_metrics(str(tmp_path)) == []
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
  assert metrics.read_metrics(str(tmp_path)) == [{'step': 1, 'a': 1.0}]


def scalars_of(workdir) -> dict[str, list[tuple[int, float]]]:
  """What TensorBoard would draw, by its own reader of a run's folder."""
  events = plugin_event_accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  events.Reload()
  drawn = {}
  for tag in events.Tags()['tensors']:
    points = events.Tensors(tag)
    drawn[tag] = [(point.step, point.tensor_proto.float_val[0]) for point in points]
  return drawn


def test_tensorboard_reads_the_scalars(tmp_path):
  with metrics.MetricWriter(str(tmp_path)) as writer:
    for step in (1, 2):
      writer.write(step, {'train/loss': step / 2, 'eval/knn_top1': jnp.float32(0.5)})
  assert scalars_of(tmp_path) == {
    'train/loss': [(1, 0.5), (2, 1.0)],
    'eval/knn_top1': [(1, 0.5), (2, 0.5)],
  }
  (file,) = (tmp_path / 'tensorboard').iterdir()
  assert len(list(event_file_loader.EventFileLoader(str(file)).Load())) == 4  # and version, start


def test_tensorboard_drops_what_a_resumed_run_did_not_keep(tmp_path):
  for start, value in ((0, 1.0), (2, 2.0)):
    with metrics.MetricWriter(str(tmp_path), start_step=start) as writer:
      for step in range(start + 1, start + 4):
        writer.write(step, {'a': value})
    time.sleep(1.1)  # TensorBoard orders a run's files by the second in their names
  assert scalars_of(tmp_path) == {'a': [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]}


def test_only_the_primary_process_writes(tmp_path):
  with metrics.MetricWriter(str(tmp_path / 'run'), primary=False) as writer:
    writer.write(1, {'a': 1.0})
  assert list(tmp_path.iterdir()) == []


def test_mistakes_are_said_in_words(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # as where it is not installed
  with pytest.raises(UserError, match='wandb is not installed: pip install wandb'):
    metrics.MetricWriter(str(tmp_path), wandb=True)
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write metrics to .*file/run'):
    metrics.MetricWriter(str(tmp_path / 'file' / 'run'))


def test_the_file_of_a_bucket_is_written_anew_and_complete_on_close(tmp_path, monkeypatch):
  # A stand-in for an object store, which cannot append: the same code path on a local file.
  path = metrics.epath.Path(tmp_path / 'metrics.jsonl')
  monkeypatch.setattr(metrics, 'is_remote', lambda _: True)
  lines = metrics._Lines(path, 0)
  lines.add(1, {'a': 1.0})
  assert not path.exists()
  monkeypatch.setattr(lines, 'REWRITE_SECONDS', 0)
  lines.add(2, {'a': 2.0})
  assert [line['step'] for line in lines_of(tmp_path)] == [1, 2]
  monkeypatch.setattr(lines, 'REWRITE_SECONDS', 60)
  lines.add(3, {'a': 3.0})
  lines.close()
  assert [line['step'] for line in lines_of(tmp_path)] == [1, 2, 3]
  again = metrics._Lines(path, 2)
  again.close()
  assert [line['step'] for line in lines_of(tmp_path)] == [1, 2]


class Clock:
  """A clock that only moves when told to."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.now = 100.0
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: self.now)


def test_step_timer_shares_out_a_window(monkeypatch):
  clock = Clock(monkeypatch)
  timer = metrics.StepTimer()
  for _ in range(4):
    with timer.waiting():
      clock.now += 0.5
    clock.now += 1.5
    timer.tick(64)
  with timer.paused():
    clock.now += 1000.0
  # 4 steps of 2 s, a quarter of it waiting; the pause does not count.
  assert timer.scalars() == {
    'train/images_per_second': 32.0,
    'train/data_wait': 0.25,
    'train/step_seconds': 2.0,
    'train/goodput': 6.0 / 1008.0,  # Of all the time that there was.
  }
  clock.now += 2.0
  assert timer.scalars() == {}  # No step yet, and none of its time is lost.
  clock.now += 6.0
  timer.tick(16)
  assert timer.scalars()['train/images_per_second'] == 2.0
  with pytest.raises(StopIteration), timer.waiting():
    clock.now += 1.0
    raise StopIteration
  timer.tick(1)
  assert timer.scalars()['train/data_wait'] == 1.0


def test_late_gives_each_push_at_the_next(monkeypatch):
  late = metrics.Late()
  assert late.flush() is None
  assert late.push(1, {'a': jnp.float32(1.5)}) is None
  assert late.push(2, {'a': np.float32(2.5), 'b': 3}) == (1, {'a': 1.5})
  assert late.push(3, {}) == (2, {'a': 2.5, 'b': 3.0})
  assert late.flush() == (3, {})
  assert late.flush() is None


def test_late_does_not_read_the_step_just_pushed():
  class Unread:
    def __float__(self) -> float:
      raise AssertionError('read too early')

  late = metrics.Late()
  late.push(1, {'a': jax.jit(lambda: jnp.float32(1))()})
  assert late.push(2, {'a': Unread()}) == (1, {'a': 1.0})
  with pytest.raises(AssertionError, match='read too early'):
    late.push(3, {})


SCALARS = {'train/loss': 1.23456, 'train/images_per_second': 64.04, 'train/data_wait': 0.05}


def test_progress_without_a_terminal_is_a_line_at_each_log_point(monkeypatch):
  clock = Clock(monkeypatch)
  stream = io.StringIO()
  with metrics.Progress(100, start_step=20, stream=stream) as progress:
    clock.now += 10.0
    progress.update(29)
    assert stream.getvalue() == ''
    progress.update(30, SCALARS)
    progress.say('kNN 50 %')
  # 10 steps took 10 s, 70 are left.
  expected = 'step 30/100  loss 1.2346  images/s 64.0  data wait 5%  ETA 01:10\nkNN 50 %\n'
  assert stream.getvalue() == expected


def test_progress_on_a_terminal_is_a_bar():
  class Terminal(io.StringIO):
    def isatty(self) -> bool:
      return True

  stream = Terminal()
  with metrics.Progress(4, stream=stream) as progress:
    progress.update(2, SCALARS)
    progress.update(4, SCALARS)
    progress.say('done')
  last = stream.getvalue().split('\r')[-1]
  assert '4/4' in last and 'loss=1.2346, images/s=64.0, data wait=5%' in last
  assert 'done\n' in stream.getvalue()


def test_progress_of_other_processes_says_nothing():
  stream = io.StringIO()
  with metrics.Progress(4, enabled=False, stream=stream) as progress:
    progress.update(2, SCALARS)
    progress.say('done')
  assert stream.getvalue() == ''
