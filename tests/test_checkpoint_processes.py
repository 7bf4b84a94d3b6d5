"""Checkpoints where processes die, change their number of devices, or are two."""

import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from folk_jax import checkpoint
from folk_jax.errors import UserError


def make_state() -> dict[str, Any]:
  """Parameters, and an optimiser's state with counters and masks, as a run holds them."""
  rng = np.random.default_rng(0)
  params = {
    'kernel': jnp.asarray(rng.normal(size=(8, 16, 32)), jnp.float32),
    'scale': jnp.asarray(rng.normal(size=(32,)), jnp.bfloat16),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {'params': params, 'opt_state': optimizer.init(params)}


def here(state: Any) -> Any:
  sharding = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def over(mesh: jax.sharding.Mesh, state: Any) -> Any:
  """Shapes of a state whose kernels are split over both axes and whose rest is on every device."""

  def placed(x: jax.Array) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec('data', None, 'fsdp') if x.ndim == 3 else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(placed, state)


def make_mesh(data: int, fsdp: int) -> jax.sharding.Mesh:
  return jax.make_mesh(
    (data, fsdp),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: data * fsdp],
  )


def assert_same(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


def test_kill_in_mid_save_leaves_whole_steps_only(tmp_path):
  saving = subprocess.Popen(
    [sys.executable, __file__, 'save_for_ever', str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])},
    start_new_session=True,
  )
  try:
    wait_until(lambda: whole_steps(tmp_path) and partial_steps(tmp_path), saving)
  finally:
    os.killpg(saving.pid, signal.SIGKILL)
    saving.wait()
  partial = partial_steps(tmp_path)
  assert partial  # the kill fell into a save
  with checkpoint.Checkpoints(str(tmp_path), every=1, keep=99) as checkpoints:
    assert checkpoints.all_steps() == whole_steps(tmp_path)
    step = checkpoints.latest_step()
    state, meta = checkpoints.restore(here(large_state(0)))
    assert meta['saved_at'] == step
    assert_same(state, large_state(step))
    # Another step than the one that was cut short, which would take its leftovers' place.
    assert checkpoints.save(step + 2, large_state(step + 2), {'saved_at': step + 2})
    checkpoints.wait()
    assert partial_steps(tmp_path) == []
    assert_same(checkpoints.restore(here(large_state(0)))[0], large_state(step + 2))


def large_state(step: int) -> dict[str, jax.Array]:
  return {name: jnp.full((1 << 20,), step, jnp.float32) for name in 'abcdefgh'}


def whole_steps(directory: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def partial_steps(directory: pathlib.Path) -> list[str]:
  return [path.name for path in directory.iterdir() if not path.name.isdigit()]


def wait_until(condition: Any, process: subprocess.Popen, seconds: float = 60) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.0005)


def save_for_ever(directory: str) -> None:
  with checkpoint.Checkpoints(directory, every=1, keep=99) as checkpoints:
    for step in range(1, 1000):
      checkpoints.save(step, large_state(step), {'saved_at': step})


@pytest.mark.parametrize('failure', ['no_folder', 'no_space'])
def test_a_process_whose_save_failed_says_which_and_ends(tmp_path, run_with_devices, failure):
  # Orbax may leave threads behind that wait for a folder, and that keep the process from ending.
  said = run_with_devices(pathlib.Path(__file__), failure, str(tmp_path), devices=1, timeout=150)
  assert 'failed as expected' in said
  if failure == 'no_space':
    node, _, step = checkpoint.read_subtree(str(tmp_path), ())
    assert step == 1
    np.testing.assert_array_equal(node['a'], np.ones(1 << 20))


def no_folder(directory: str) -> None:
  for attempt in range(5):  # whether a thread is left behind is a race, lost every other time
    folder = pathlib.Path(directory) / str(attempt)
    checkpoints = checkpoint.Checkpoints(str(folder), every=1, keep=1)
    folder.rmdir()
    folder.write_text('a file in the way')
    with pytest.raises(UserError, match=f'saving step 2 in {folder} failed: '):
      checkpoints.save(2, {'x': jnp.zeros(2)}, {})
      checkpoints.wait()
  print('failed as expected')


def no_space(directory: str) -> None:
  checkpoints = checkpoint.Checkpoints(directory, every=1, keep=1)
  rng = np.random.default_rng(0)
  checkpoints.save(1, {'a': jnp.ones(1 << 20)}, {})
  checkpoints.wait()
  # Fails in the background thread that writes, as a full disk does; noise does not compress.
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
  with pytest.raises(UserError, match=f'saving step 2 in {directory} failed: no file .*1 is whole'):
    checkpoints.save(2, {'a': jnp.asarray(rng.normal(size=1 << 20), jnp.float32)}, {})
    checkpoints.wait()
  checkpoints.close()
  print('failed as expected')


def test_a_damaged_checkpoint_prints_nothing_of_its_own(tmp_path):
  # Only a process of its own shows what event loops and collectors print, at its end at the latest.
  process = subprocess.run(
    [sys.executable, __file__, 'read_damaged', str(tmp_path)],
    env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert (process.returncode, process.stdout, process.stderr) == (0, 'refused\n', '')


def read_damaged(directory: str) -> None:
  rng = np.random.default_rng(0)
  # Many arrays, whose reads are all under way when the first of them fails.
  state = {f'{i}': jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for i in range(60)}
  for number, damaged in enumerate(('d', 'ocdbt.process_0/d')):
    folder = pathlib.Path(directory) / str(number)
    with checkpoint.Checkpoints(str(folder), every=1, keep=1) as checkpoints:
      checkpoints.save(1, state, {})
      checkpoints.wait()
      for file in (folder / '1' / 'state' / damaged).iterdir():
        file.unlink()
      for _ in range(2):
        with pytest.raises(UserError, match='no whole checkpoint is left in .*step 1: '):
          checkpoints.restore(here(state))
        with pytest.raises(UserError, match='step 1 in .* cannot be read'):
          checkpoint.read_subtree(str(folder), ())
  print('refused')


def test_eight_devices_resume_on_four_and_on_one(tmp_path, run_with_devices):
  run_with_devices(pathlib.Path(__file__), 'eight_devices', str(tmp_path), devices=8)
  # This process has one device, of another machine as far as the checkpoint can tell.
  with checkpoint.Checkpoints(str(tmp_path), every=1, keep=2) as checkpoints:
    assert_same(checkpoints.restore(here(make_state()))[0], make_state())
  node, _, _ = checkpoint.read_subtree(str(tmp_path), ('params',))
  np.testing.assert_array_equal(node['kernel'], make_state()['params']['kernel'])


def eight_devices(directory: str) -> None:
  state = make_state()
  wide = over(make_mesh(2, 4), state)
  sharded = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, wide)
  with checkpoint.Checkpoints(directory, every=1, keep=2) as checkpoints:
    checkpoints.save(5, sharded, {})
    for like in (wide, over(make_mesh(4, 1), state), here(state)):
      restored, _ = checkpoints.restore(like)
      assert_same(restored, state)
      placed = zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True)
      assert all(array.sharding == shape.sharding for array, shape in placed)


def test_two_processes_save_and_restore_one_state(tmp_path):
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}
  both = [
    subprocess.Popen(
      [sys.executable, __file__, 'one_of_two', str(tmp_path), str(port), str(index)],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  for process in both:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
  node, meta, step = checkpoint.read_subtree(str(tmp_path), ())
  np.testing.assert_array_equal(node['x'], np.arange(8.0))
  assert (meta['a'], step) == (1, 2)
  digests = json.loads((tmp_path / '2' / 'digests.json').read_text())['files']
  assert {name.split('/')[1] for name in digests} >= {'ocdbt.process_0', 'ocdbt.process_1'}


def one_of_two(directory: str, port: str, index: str) -> None:
  jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(index))
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  values = np.arange(8, dtype=np.float32)
  state = {'x': jax.make_array_from_callback((8,), sharding, lambda part: values[part])}
  with checkpoint.Checkpoints(directory, every=1, keep=1) as checkpoints:
    for step in (1, 2):
      assert checkpoints.save(step, state, {'a': 1})
    restored, _ = checkpoints.restore(state)
  for shard in restored['x'].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])


if __name__ == '__main__':
  commands = (save_for_ever, no_folder, no_space, read_damaged, eight_devices, one_of_two)
  {command.__name__: command for command in commands}[sys.argv[1]](*sys.argv[2:])
