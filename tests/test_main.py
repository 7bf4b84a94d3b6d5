"""The command: a smoke run from end to end, and every mistake one line and status 2."""

import json
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from folk_jax import cli, main
from folk_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = '--config=configs/vit_b.py:smoke'
# ml_collections loads recipes by a method that Python deprecates.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
QUIET = ('--config.compilation_cache=', '--config.data.source=synthetic')


@pytest.fixture
def run_main(monkeypatch, capsys):
  """`run_main(*arguments)` runs the command in this process: (status, stdout, stderr)."""

  def run(*arguments: str):
    monkeypatch.setattr(sys, 'argv', ['folk_jax.main', *arguments])
    with pytest.raises(SystemExit) as ended:
      cli.run(main.main)
    out, err = capsys.readouterr()
    _forget_flags()
    return ended.value.code or 0, out, err

  monkeypatch.chdir(ROOT)
  return run


def _forget_flags() -> None:
  """Flags are global, and each override becomes one: the next command starts without them."""
  for name in list(flags.FLAGS):
    if name.startswith('config.'):
      delattr(flags.FLAGS, name)
  for name in ('config', 'workdir'):
    flags.FLAGS[name].unparse()
    flags.FLAGS[name].value = None


def command(*arguments: str) -> subprocess.CompletedProcess:
  """The command in a process of its own."""
  return subprocess.run(
    [sys.executable, '-m', 'folk_jax.main', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def assert_refused(status: int, stderr: str, words: str) -> None:
  assert status == 2
  lines = stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), stderr
  assert words in lines[0]


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['--config.batchsize=8'], "did you mean 'config.batch_size'?"),
    (['--config.model.widht=8'], "did you mean 'config.model.width'?"),
    (['--config=configs/vit_b.py:smoek'], "unknown recipe argument 'smoek'. Did you mean 'smoke'?"),
    (['--config=configs/vit_x.py'], 'there is no config file configs/vit_x.py'),
    (['--config.task=pretain'], "unknown task 'pretain'. Did you mean 'pretrain'?"),
    (
      ['--config.objective.name=fork'],
      "unknown objective 'fork' (config.objective.name). Did you mean 'folk'? Known: deblur, denoise,",
    ),
    (['--config.model.name=vet'], "model.name is 'vet': known models are resnet, vit"),
    (['--config.data.source=foldr'], "did you mean 'folder'?"),
    (
      ['--config.batch_size=10', '--config.accumulate=4'],
      'batch_size 10 is not a multiple of config.accumulate 4',
    ),
    (['--config.mesh.fsdp=3'], 'config.mesh.fsdp 3 does not divide the 1 devices'),
    (
      ['--config.image_size=30'],
      'config.image_size 30 is not a multiple of config.model.patch 8: use 24 or 32',
    ),
    (['--config.data.source=folder', '--config.data.path=/nowhere/at/all'], '/nowhere/at/all'),
    (['--config.data.source=tfds', '--config.data.name=no_such_set'], 'no_such_set'),
    (['--config.init_from=/nowhere/at/all'], "config.init_from '/nowhere/at/all' does not exist"),
    (
      ['--config.guard.on_collapse=halt'],
      "unknown config.guard.on_collapse 'halt'. Known: stop, warn.",
    ),
    (['--config.optimizer.clip_by=layer'], "unknown config.optimizer.clip_by 'layer'"),
    (['--config.checkpoint.keep=0'], 'checkpoint.keep is 0'),
  ],
  ids=lambda value: value[0].removeprefix('--') if isinstance(value, list) else '',
)
def test_mistakes_are_one_line_and_leave_no_run_behind(run_main, tmp_path, arguments, words):
  """Without config.json the same workdir takes the mended command."""
  workdir = tmp_path / 'run'
  status, _, stderr = run_main(SMOKE, *QUIET, f'--workdir={workdir}', *arguments)
  assert_refused(status, stderr, words)
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_a_workdir_of_another_run_is_left_as_it_is(run_main, tmp_path):
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  config.seed = 5
  (tmp_path / 'config.json').write_text(config_lib.to_json(config))
  status, _, stderr = run_main(SMOKE, '--config.log_every=3', f'--workdir={tmp_path}')
  assert_refused(status, stderr, 'another configuration: seed was 5, now 0. Give another --workdir')
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']
  assert (tmp_path / 'config.json').read_text() == config_lib.to_json(config)


@pytest.mark.parametrize('content', ['', '{"seed": 0'])
def test_a_damaged_config_json_is_refused(run_main, tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  status, _, stderr = run_main(SMOKE, *QUIET, f'--workdir={tmp_path}')
  assert_refused(status, stderr, f'cannot use workdir {tmp_path}')


def test_a_workdir_that_cannot_be_made_is_refused(run_main, tmp_path):
  (tmp_path / 'file').write_text('in the way')
  status, _, stderr = run_main(SMOKE, *QUIET, f'--workdir={tmp_path}/file/run')
  assert_refused(status, stderr, f'{tmp_path}/file/run')


def test_a_missing_flag_is_said(run_main):
  assert_refused(*run_main(SMOKE)[::2], '--workdir is required')


def test_a_mistake_in_a_real_process(tmp_path):
  done = command(SMOKE, *QUIET, '--config.data.source=imagenet', f'--workdir={tmp_path}/run')
  assert_refused(
    done.returncode, done.stderr, "unknown data.source 'imagenet'; known: embedded, folder"
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_the_smoke_recipe_from_end_to_end(run_main, tmp_path):
  workdir, cache = tmp_path / 'run', tmp_path / 'cache'
  arguments = (SMOKE, f'--workdir={workdir}', f'--config.compilation_cache={cache}')
  done = command(*arguments)
  assert done.returncode == 0, done.stderr
  assert f'done: 4 steps in {workdir}' in done.stdout and 'kNN top-1: ' in done.stdout
  assert any(cache.iterdir())

  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['total_steps'] == 4 and saved['objective']['name'] == 'folk'
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['2', '4']
  assert any((workdir / 'tensorboard').iterdir())
  text = (workdir / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  training = {line['step']: line for line in lines if 'train/loss' in line}
  assert sorted(training) == [1, 2, 3, 4]
  for name in ('loss', 'loss_reconstruction', 'loss_distillation', 'gradient_norm'):
    assert all(line[f'train/{name}'] > 0 for line in training.values()), name
  # The first line tells of steps 1 and 2, of which the second, saved at once, has nothing to add.
  assert training[1]['train/images_per_second'] > 0 and training[3]['train/images_per_second'] > 0
  evaluations = {line['step']: line for line in lines if 'eval/knn_top1' in line}
  assert sorted(evaluations) == [0, 4]
  for line in evaluations.values():
    assert 0 <= line['eval/knn_top1'] == line['eval/knn_top1_k20'] <= line['eval/knn_top5'] <= 1
    assert 0 < line['eval/reconstruction'] and 0 < line['eval/reconstruction_of_mean']

  # Started again it has nothing to do, and does nothing.
  status, out, _ = run_main(*arguments)
  assert status == 0
  assert f'the run in {workdir} is complete' in out and 'kNN top-1: ' in out
  assert (workdir / 'metrics.jsonl').read_text() == text
