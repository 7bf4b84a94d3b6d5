"""What holds across processes: the same stream from Grain's workers, errors that arrive, no jax."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing import shared_memory

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import (
  DataSettings,
  LocalViewSettings,
  ViewSettings,
  eval_batches,
  make_source,
  pipeline,
  train_batches,
  transport,
)
from folk_jax.errors import UserError


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """A folder of 24 images, one of them broken."""
  path = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  for number in range(24):
    pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path / f'{number:02d}.jpg')
  (path / '11.jpg').write_bytes(b'broken')
  return lambda **fields: DataSettings(
    **{'source': 'folder', 'path': str(path), 'max_bad_share': 0.05, 'image_size': 32, **fields}
  )


def take(settings, count, step=0, batch_size=8):
  source = make_source(settings, 'train')
  with train_batches(source, settings, seed=3, step=step, batch_size=batch_size) as batches:
    found = [{key: np.array(x) for key, x in next(batches).items()} for _ in range(count)]
    return found, batches.bad_names


def assert_same(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    for key in b:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.slow
def test_two_workers_give_the_stream_of_none_and_resume_it(settings):
  local = LocalViewSettings(3, 16, ViewSettings((0.05, 0.25)))
  wanted, bad = take(settings(local_views=local), 9)
  found, found_bad = take(settings(workers=2, local_views=local), 9)
  assert_same(found, wanted)
  assert found_bad == bad
  assert len(bad) == 1
  # An odd step: worker 0 starts where worker 1 stood.
  assert_same(take(settings(workers=2, local_views=local), 4, step=5)[0], wanted[5:])
  # Global views are cut first: with local views or without, they are the same.
  assert wanted[0]['local_views'].shape == (8, 3, 16, 16, 3)
  for batch, plain in zip(wanted, take(settings(), 2)[0], strict=False):
    np.testing.assert_array_equal(batch['views'], plain['views'])
    assert 'local_views' not in plain
    # Crops of another place each, and not the global view made smaller.
    assert len({row.tobytes() for rows in batch['local_views'] for row in rows}) == 24
  assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_workers_evaluate_and_end(settings, monkeypatch):
  source = make_source(settings(), 'train')
  with eval_batches(source, settings(), batch_size=10) as batches:
    wanted = [{key: np.array(x) for key, x in batch.items()} for batch in batches]
  with eval_batches(source, settings(workers=2), batch_size=10) as batches:
    assert_same(list(batches), wanted)
  monkeypatch.setattr(transport, 'has_room', lambda *_: False)
  with pytest.warns(UserWarning, match='/dev/shm has less free'):
    batches = eval_batches(source, settings(workers=1), batch_size=10)
  with batches:
    assert_same(list(batches), wanted)
    assert batches.bad_count == 1


def test_a_ring_hands_views_over_waits_and_ends():
  ring = transport.Ring(2, {'views': (2, 4, 3), 'local_views': (5,)})
  worker = pickle.loads(pickle.dumps(ring))
  batches = [
    {
      'views': np.full((2, 4, 3), i, np.uint8),
      'local_views': np.full(5, 100 + i, np.uint8),
      'label': np.arange(i),
    }
    for i in range(9)
  ]
  for batch in batches:
    assert_same([ring.receive(worker.send(batch))], [batch])

  # A writer ahead of its reader waits for it; when the reader stops, it goes on.
  sent = []
  send = worker.send
  writer = threading.Thread(target=lambda: sent.extend(map(send, batches)))
  writer.start()
  for number, batch in enumerate(batches[:3]):
    while len(sent) <= number:
      time.sleep(0.001)
    time.sleep(0.01)
    assert len(sent) <= number + transport.SLOTS
    assert_same([ring.receive(sent[number])], [batch])
  ring.stop()
  writer.join(timeout=10)
  assert len(sent) == len(batches)
  with pytest.raises(RuntimeError, match='slot of batch 17 of worker 0 holds'):
    ring.receive(sent[-1])

  names = list(itertools.chain(*ring._names))
  ring.close()
  for name in names:
    with pytest.raises(FileNotFoundError):
      shared_memory.SharedMemory(name)


@pytest.mark.slow
def test_workers_end_and_shared_memory_is_freed_when_the_main_process_is_killed(tmp_path):
  script = tmp_path / 'killed.py'
  script.write_text(
    textwrap.dedent("""
      import multiprocessing, os, signal
      from folk_jax.data import DataSettings, make_source, train_batches

      if __name__ == '__main__':
        settings = DataSettings(source='synthetic', image_size=32, workers=1)
        source = make_source(settings, 'train')
        batches = train_batches(source, settings, seed=0, step=0, batch_size=8)
        next(batches)
        names = [name for names in batches._holder.stream._ring._names for name in names]
        print(multiprocessing.active_children()[0].pid, *names, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
  )
  path = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
  with subprocess.Popen(
    [sys.executable, str(script)],
    env={**os.environ, 'PYTHONPATH': path},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  ) as process:
    pid, *names = process.stdout.readline().split()
  assert process.returncode == -signal.SIGKILL

  def left():
    return os.path.exists(f'/proc/{pid}') or any(
      os.path.exists(f'/dev/shm/{name}') for name in names
    )

  deadline = time.monotonic() + 60
  while left() and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not left()


# In a process of its own: spawned workers import the script that holds the sources.
FAILING = """
  import multiprocessing, os, signal, sys
  import numpy as np
  from folk_jax.data import DataSettings, train_batches
  from folk_jax.data.sources import Source

  class Custom(Exception):
    def __init__(self, first, second):  # what pickle cannot make again from its message
      super().__init__(f'{first} and {second}')

  class Failing(Source):
    def __init__(self, error):
      self.error = error
    def __len__(self):
      return 50
    def read(self, index):
      if index == 13 and self.error:
        raise Custom('one', 'two') if self.error == 'custom' else KeyError('the table is broken')
      if 'jax' in sys.modules:
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
      return np.zeros((40, 40, 3), np.uint8), 0
    def name(self, index):
      return str(index)

  def drain(error, kill=False):
    settings = DataSettings(source='synthetic', image_size=8, workers=1)
    with train_batches(Failing(error), settings, seed=0, step=0, batch_size=10) as batches:
      try:
        for step in range(100):
          next(batches)
          if kill and step == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
      except Exception as caught:
        print(type(caught).__name__, caught)
      else:
        print('went on')

  if __name__ == '__main__':
    drain('key')
    drain('custom')
    drain('', kill=True)
    print(multiprocessing.active_children())
"""


@pytest.mark.slow
def test_errors_arrive_and_nothing_hangs(tmp_path):
  script = tmp_path / 'failing.py'
  script.write_text(textwrap.dedent(FAILING))
  path = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, str(script)],
    env={**os.environ, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  lines = done.stdout.splitlines()
  assert lines[0] == "KeyError 'the table is broken'", done.stderr
  assert lines[1] == 'RuntimeError Custom: one and two'
  assert lines[2:] == ['went on', '[]']
  assert f'exit code {-signal.SIGKILL}' in done.stderr


@pytest.mark.slow
def test_too_many_bad_files_stop_the_workers(settings):
  with pytest.raises(UserError, match='1 of 24 samples do not decode'):
    take(settings(workers=1, max_bad_share=0.01), 4)
  assert multiprocessing.active_children() == []


def test_the_room_loads_without_jax_tensorflow_tfds_and_skimage(settings):
  code = f"""
    import sys
    from folk_jax import data
    from folk_jax.data import decode, plans, prepare, records, views
    settings = data.DataSettings(source='folder', path={settings().path!r}, image_size=8)
    source = data.make_source(settings, 'train')
    decode.decode(source.fetch(0))
    heavy = 'jax', 'grain', 'tensorflow', 'tensorflow_datasets', 'skimage', 'sklearn', 'scipy'
    print([name for name in heavy if name in sys.modules])
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert (done.stdout, done.stderr) == ('[]\n', '')


def test_no_file_of_the_room_imports_jax():
  folder = os.path.dirname(pipeline.__file__)
  for name in sorted(os.listdir(folder)):
    if name.endswith('.py'):
      with open(os.path.join(folder, name), encoding='utf-8') as file:
        assert not [line for line in file if line.strip().startswith(('import jax', 'from jax'))]
