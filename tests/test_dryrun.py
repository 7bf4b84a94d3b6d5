"""The command: on the local devices, refused in words, out of memory, and for a TPU where its compiler is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from folk_jax import config as config_lib
from folk_jax import dryrun
from folk_jax.compiled import chips, gpus, hlo, step
from folk_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = '--config=configs/vit_b.py:smoke'
# A model that compiles in seconds.
TINY = ('width=24', 'heads=2', 'depth=2')
TINY_ARGS = tuple(f'--config.model.{field}' for field in TINY) + (
  '--config.projection.outputs=24',
  '--config.projection.hidden=32',
)


def run(*args, devices=1, **environment):
  flag = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.run(
    [sys.executable, '-m', 'folk_jax.dryrun', *args],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flag}'} | environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
  """The command on eight CPU devices."""
  folder = tmp_path_factory.mktemp('dryrun')
  report, text = folder / 'made' / 'report.json', folder / 'step.hlo'
  done = run(SMOKE, *TINY_ARGS, f'--json={report}', f'--text={text}', devices=8)
  assert done.returncode == 0, done.stderr
  return done, json.loads(report.read_text()), text.read_text()


def test_the_table_and_the_json_say_the_same(smoke):
  done, report, text = smoke
  assert report['fits'] and report['setting']['devices'] == 8
  assert report['setting']['images_a_chip'] == 2 and report['setting']['recipe'].endswith('smoke')
  assert report['setting']['changes']['model.width'] == 24
  assert '8 x cpu' in done.stdout and 'no bound' in done.stdout
  assert 'compiling' in done.stderr and 'compiling' not in done.stdout
  assert hlo.parse(text).entry
  assert report['memory']['arguments'] > 0 and report['seconds']['compile'] > 0


def test_what_is_executed_is_what_the_model_needs(smoke):
  """Without rematerialisation a step runs its own products and no others; the FFT isn't a product on a CPU."""
  _, report, _ = smoke
  assert report['flops']['executed_over_model'] == pytest.approx(1, abs=0.02)
  assert report['notes'] == []


def test_devices_tell_each_other_gradients_and_statistics_only(smoke):
  _, report, _ = smoke
  assert {row['kind'] for row in report['collectives']} == {'all-reduce'}
  assert {row['what'] for row in report['collectives']} <= {'parameters', 'statistics'}
  reduced = sum(row['bytes'] for row in report['collectives'] if row['what'] == 'parameters')
  # Every parameter's gradient once, in float32, with a few statistics in the same all-reduce.
  assert reduced == pytest.approx(4 * report['setting']['parameters'], rel=0.05)


@pytest.mark.parametrize('scope', ['augment', 'filter', 'student', 'teacher', 'optimizer'])
def test_every_part_of_the_step_has_its_share(smoke, scope):
  assert smoke[1]['share']['bytes'][scope] > 0


@pytest.mark.parametrize(
  ('args', 'complaint'),
  [
    ((SMOKE, '--topology=v9:4x4'), "unknown topology 'v9:4x4'"),
    ((SMOKE, '--slices=2'), '--slices needs a --topology'),
    ((SMOKE, '--topology=h100:8', '--slices=2'), 'give hosts x GPUs, such as h100:2x8'),
    ((SMOKE, '--topology=h100:all'), 'give the number of GPUs, such as h100:8'),
    pytest.param(
      (SMOKE, '--topology=h100:8'),
      "jax's plugin for CUDA, which is not installed: pip install -c constraints.txt -e '.[gpu]'",
      marks=pytest.mark.skipif(gpus.cuda() is not None, reason='it is installed'),
    ),
    (('--config=configs/evaluate.py',), 'only a recipe that trains'),
  ],
)
def test_mistakes_are_one_line_and_status_2(args, complaint):
  done = run(*args)
  assert done.returncode == 2, done.stderr
  assert complaint in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


class Pretended:
  """Stands for the compiler: a step of so many GiB an image, divided by what saves memory."""

  SAVES = {'none': 1, 'elementwise': 2, 'block': 4}

  def __init__(self, limit: float, an_image: float = 1.0, topology: str = 'v5e:4x4'):
    chip = chips.CHIPS['v5e'] if topology else None
    self.target = step.Target(topology, 1, [None] * 16, chip, None)
    self.limit, self.an_image, self.tried = limit, an_image, []

  def fits(self, config):
    self.tried.append(config)
    needed = config.batch_size / 16 * self.an_image / self.SAVES[config.model.remat]
    needed /= config.accumulate
    return None if needed > self.limit else int(needed * 2**30)


def test_out_of_memory_is_answered_with_what_fits():
  config = config_lib.load_recipe('configs/vit_b.py')  # 64 images on each of 16 chips
  config.model.remat = 'none'
  compiler = Pretended(limit=16.0)
  found = list(dryrun.what_fits(compiler, config, 2))
  assert [each['change'] for each in found] == [
    {'model.remat': 'block'},
    {'model.remat': 'block', 'accumulate': 2},
  ]
  assert len(compiler.tried) == 3  # 'elementwise' was tried and didn't fit
  line = dryrun.does_not_fit(compiler, config, step.OutOfMemory(28 * 2**30, 15 * 2**30), found)
  assert 'v5e:4x4 has not the memory for 64 images a chip: 28.00 GiB needed' in line
  assert 'fits with --config.model.remat=block (16.00 GiB) or' in line
  assert '--config.model.remat=block --config.accumulate=2 (8.00 GiB)' in line
  nothing = list(dryrun.what_fits(Pretended(limit=1e-3), config, 2))
  assert nothing == [] and list(dryrun.what_fits(compiler, config, 0)) == []
  assert 'none of the settings' in dryrun.does_not_fit(
    compiler, config, step.OutOfMemory(2, 1), nothing
  )


def test_the_largest_batch_is_found_in_images_a_chip():
  config = config_lib.load_recipe('configs/vit_b.py')
  config.model.remat = 'none'
  assert dryrun.find_batch(Pretended(limit=100.5), config).batch_size == 96 * 16
  config.accumulate = 4
  assert dryrun.find_batch(Pretended(limit=2.2), config).batch_size == 8 * 16
  with pytest.raises(UserError, match='not even 4 images'):
    dryrun.find_batch(Pretended(limit=0.5), config)
  with pytest.raises(UserError, match='--memory_gib'):
    dryrun.find_batch(Pretended(limit=1, topology=''), config)


@pytest.mark.parametrize(
  ('message', 'sizes'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.29G) exceeds '
      'available HBM (15.75G).',
      (28.29, 15.75),
    ),
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.50G of '
      '15.75G hbm. Exceeded hbm capacity by 2.75G.',
      (18.5, 15.75),
    ),
  ],
)
def test_a_compilers_out_of_memory_is_read(message, sizes):
  assert step.shortfall(message) == tuple(size * 2**30 for size in sizes)
  assert step.shortfall('INTERNAL: something else') is None


def test_a_limit_on_memory_is_kept(monkeypatch):
  """The compiler of a CPU takes anything; a limit says when it is full."""

  def compile_step(made, state, mesh):
    return jax.jit(lambda state, batch: batch['views'].astype(float) + state.step)

  monkeypatch.setattr(step.loop, 'compile_step', compile_step)
  config = config_lib.load_recipe('configs/vit_b.py', 'smoke')
  views = 16 * 2 * 32 * 32 * 3  # bytes; and four times as many for the result
  for limit, fits in ((4 * views, False), (20 * views, True)):
    target = step.Target('', 1, jax.devices()[:1], None, float(limit))
    compiler = step.Compiler('', target, 256, 0)
    assert (compiler.fits(config) is not None) == fits
    if not fits:
      with pytest.raises(step.OutOfMemory, match='GiB short'):
        compiler.report(config)


def test_a_topologys_auto_is_the_chips():
  config = config_lib.load_recipe('configs/vit_b.py')
  target = step.Target('v5e:4x4', 1, [], chips.CHIPS['v5e'], None)
  assert step.for_target(config, target).model.dtype == 'bfloat16'
  assert step.for_target(config, target).model.attention == 'pallas'
  config.model.dtype = 'float32'
  assert step.for_target(config, target).model.dtype == 'float32'
  config.model.dtype = 'auto'
  of_gpu = step.for_target(config, step.Target('h200:8', 1, [], chips.CHIPS['h200'], None))
  assert (of_gpu.model.dtype, of_gpu.model.attention) == ('bfloat16', 'cudnn')
  assert of_gpu.model.scan_unroll == of_gpu.model.depth and of_gpu.spectral_backend == 'fft'
  config.model.dtype = 'float32'  # which cuDNN's attention does not take
  assert (
    step.for_target(config, step.Target('h200:8', 1, [], chips.CHIPS['h200'], None)).model.attention
    == 'xla'
  )
  config.model.dtype = 'auto'
  local = step.Target('', 1, jax.devices(), None, None)
  assert step.for_target(config, local).model.dtype == 'float32'  # on a CPU


def test_an_old_gpu_at_hand_keeps_xlas_attention(monkeypatch):
  """A T4's step is what a run there would compile."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(step.run.attention, 'is_too_old', lambda device: True)
  config = config_lib.load_recipe('configs/vit_b.py')
  found = step.for_target(config, step.Target('', 1, jax.devices(), None, None))
  assert found.model.attention == 'xla' and found.model.dtype == 'bfloat16'


def test_what_a_gpu_lends_is_the_environments_share(monkeypatch):
  chip = chips.CHIPS['h200']
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(name, raising=False)
  assert dryrun._lent(chip) == 0.75 * chip.hbm_bytes
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.5')
  assert dryrun._lent(chip) == 0.5 * chip.hbm_bytes
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.9')
  assert dryrun._lent(chip) == 0.9 * chip.hbm_bytes
  for wrong in ('all', '0', '-1', 'nan'):
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', wrong)
    with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION is '{wrong}'.*0.9"):
      dryrun._lent(chip)


def test_fsdp_stays_inside_a_host_of_gpus():
  config = config_lib.load_recipe('configs/vit_b.py')
  config.batch_size, config.mesh.fsdp = 64, 16
  target = step.Target('h100:2x8', 1, [None] * 16, chips.CHIPS['h100'], None)
  assert target.islands == 2
  with pytest.raises(UserError, match='mesh.fsdp is 16 and a slice, or a host of GPUs, has 8'):
    step.Compiler('', target, 256, 0).compile(config)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="the compiler for TPUs is not installed: pip install -c constraints.txt -e '.[tpu]'",
)
def test_a_tpus_compiler_compiles_the_step(tmp_path):
  report = tmp_path / 'report.json'
  done = run(SMOKE, *TINY_ARGS, '--topology=v5e:2x2', f'--json={report}')
  assert done.returncode == 0, done.stderr
  found = json.loads(report.read_text())
  assert found['setting']['device_kind'] == 'TPU v5 lite' and found['setting']['devices'] == 4
  assert found['setting']['dtype'] == 'float32'  # the smoke recipe says so
  assert 'images' not in {row['what'] for row in found['collectives']}
  # The transforms are products here, and small ones are padded.
  assert 1 <= found['flops']['executed_over_model'] < 2
  assert found['roofline']['seconds'] > 0 and found['compiler']['cycles'] > 0
  assert found['memory']['capacity'] == 16 * 2**30 and 'MFU' in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
  gpus.cuda() is None,
  reason="the compiler for NVIDIA GPUs is not installed: pip install -c constraints.txt -e '.[gpu]'",
)
def test_a_gpus_compiler_compiles_the_step(tmp_path):
  report = tmp_path / 'report.json'
  args = (*TINY_ARGS, '--config.model.heads=3', '--config.model.dtype=bfloat16')
  done = run(SMOKE, *args, '--topology=h200:2', f'--json={report}', '--text=/dev/null')
  assert done.returncode == 0, done.stderr
  found = json.loads(report.read_text())
  assert found['setting']['device_kind'] == 'NVIDIA H200' and found['setting']['devices'] == 2
  assert found['setting']['model']['attention'] == 'cudnn'
  assert 'images' not in {row['what'] for row in found['collectives']}
  assert 0.95 <= found['flops']['executed_over_model'] < 1.5
  bound = found['roofline']
  assert 0 < bound['seconds'] <= bound['serial'] and 0 < bound['serial_mfu'] <= bound['mfu']
  assert found['memory']['capacity'] == 141 * 2**30 and 'one kernel after the other' in done.stdout
