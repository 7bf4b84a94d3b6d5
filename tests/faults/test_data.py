"""Faults of data, injected: files, records, tars, decoders and workers that fail; real files and real processes."""

import json
import os
import struct
import threading
import time

import numpy as np
import pytest
from PIL import Image

from folk_jax.data import (
  DataSettings,
  Ledger,
  ViewSettings,
  make_source,
  tasks,
  train_batches,
  waiting_for,
)
from folk_jax.data.sources import Source
from folk_jax.errors import UserError

COUNT = 24


@pytest.fixture
def folder(tmp_path):
  """24 images, four of them bad in a way of their own."""
  rng = np.random.default_rng(0)
  path = tmp_path / 'images'
  (path / 'a').mkdir(parents=True)
  for number in range(COUNT):
    pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path / 'a' / f'{number:02d}.jpg')
  whole = (path / 'a' / '03.jpg').read_bytes()
  (path / 'a' / '03.jpg').write_bytes(whole[: len(whole) // 2])
  (path / 'a' / '09.jpg').unlink()
  os.mkfifo(path / 'a' / '09.jpg')
  return path


def of_folder(path, **fields):
  fields = {'max_bad_share': 0.25, 'image_size': 8, **fields}
  return DataSettings(source='folder', path=str(path), **fields)


def train(settings, source=None, ledger=None, **fields):
  fields = {'seed': 3, 'step': 0, 'batch_size': 8} | fields
  source = source or make_source(settings, 'train')
  return train_batches(source, settings, ledger=ledger, **fields)


def test_pipes_and_files_that_vanish_or_are_cut_short_are_named_and_do_not_stop(folder, caplog):
  settings = of_folder(folder)
  source = make_source(settings, 'train')
  (folder / 'a' / '17.jpg').unlink()
  (folder / 'a' / '18.jpg').chmod(0) if os.getuid() else (folder / 'a' / '18.jpg').write_bytes(b'')
  with caplog.at_level('WARNING', 'absl'), train(settings, source) as batches:
    for _ in range(6):
      assert next(batches)['valid'].all()
    assert sorted(name[-6:] for name in batches.bad_names) == [
      '03.jpg',
      '09.jpg',
      '17.jpg',
      '18.jpg',
    ]
  said = sorted(record.getMessage() for record in caplog.records)
  assert f'skipping a bad file: {folder}/a/09.jpg (not a regular file)' in said
  assert any('17.jpg ([Errno 2] No such file' in line for line in said)
  assert len(said) == 4


def test_the_share_holds_over_all_starts_and_processes_of_a_run(folder, tmp_path):
  settings = of_folder(folder, max_bad_share=1.4 / COUNT)
  workdir = tmp_path / 'run'
  workdir.mkdir()
  source = make_source(settings, 'train')

  def ledger(process=0):
    return Ledger(str(workdir), process)

  def runs(sample, ledger):
    """The first batch of a stream that begins with `sample`: each start meets one bad file, too few to stop it."""
    alone = of_folder(folder, max_bad_share=1.0)
    for seed in range(500):
      with train(alone, source, seed=seed, batch_size=1) as batches:
        next(batches)
        if batches.bad_names == [source.name(sample)]:
          break
    with train(settings, source, ledger, seed=seed, batch_size=1) as batches:
      next(batches)

  runs(3, ledger())
  lines = (workdir / 'bad_samples.jsonl').read_text().splitlines()
  assert [json.loads(line)['name'] for line in lines] == [str(folder / 'a' / '03.jpg')]
  with open(workdir / 'bad_samples.jsonl', 'a') as file:
    file.write('{"index": 5, "na')  # A kill in mid-line.
  with pytest.raises(UserError) as caught:
    runs(9, ledger(1))
  message = str(caught.value)
  assert '2 of 24 samples do not decode, more than data.max_bad_share=0.0583' in message
  assert '03.jpg' in message
  assert f'remove {workdir}/bad_samples*.jsonl' in message
  assert '\n' not in message
  # Again at once: nothing was mended.
  with pytest.raises(UserError, match='2 of 24 samples'):
    runs(3, ledger())
  # Mended files count no more, once they were seen.
  for number in (3, 9):
    (folder / 'a' / f'{number:02d}.jpg').unlink()
    Image.new('RGB', (9, 9)).save(folder / 'a' / f'{number:02d}.jpg')
  with train(settings, source, ledger()) as batches:
    for _ in range(3):
      next(batches)
    assert batches.bad_count == 0
  assert ledger().bad == {}


class Hanging(Source):
  """Pictures; some samples hang their decoder until the test ends, some their reader."""

  def __init__(self, hanging=(), slow=()):
    self.hanging, self.slow = hanging, slow
    self.free = threading.Event()

  def __len__(self):
    return COUNT

  def read(self, index):
    if index in self.slow:
      assert self.free.wait(60)
    return b'hang' if index in self.hanging else b'%c' % index, 0

  def name(self, index):
    return f'picture {index}'


@pytest.fixture
def decoder(monkeypatch):
  """A decoder of `Hanging`'s bytes; gives the event that lets go those that hang."""
  free = threading.Event()

  def decode(data):
    if data == b'hang':
      assert free.wait(60)
    return np.full((9, 9, 3), data[0], np.uint8)

  monkeypatch.setattr(tasks, 'decode', decode)
  yield free
  free.set()


def test_a_decoder_that_does_not_return_is_left_behind(decoder, caplog):
  del decoder
  settings = DataSettings(
    source='synthetic', image_size=8, threads=2, decode_seconds=0.2, max_bad_share=0.1
  )
  clean = DataSettings(source='synthetic', image_size=8, threads=2)
  with train(clean, Hanging()) as batches:
    wanted = [next(batches) for _ in range(6)]
  with train(settings, Hanging(hanging=(7, 15))) as batches:
    found = [next(batches) for _ in range(6)]
    assert sorted(batches.bad_names) == ['picture 15', 'picture 7']
  messages = {record.getMessage() for record in caplog.records}
  assert 'skipping a bad file: picture 7 (takes longer than 0.2 s to decode)' in messages
  for a, b in zip(found, wanted, strict=True):
    hung = np.isin(b['index'], (7, 15))
    np.testing.assert_array_equal(a['index'], b['index'] + hung)
    np.testing.assert_array_equal(a['views'][~hung], b['views'][~hung])


def test_a_data_set_that_hangs_altogether_stops(decoder):
  del decoder
  settings = DataSettings(
    source='synthetic', image_size=8, threads=2, decode_seconds=0.1, max_bad_share=1.0
  )
  with (
    pytest.raises(UserError, match=r'samples each took longer than data.decode_seconds=0.1 ') as e,
    train(settings, Hanging(hanging=range(COUNT))) as batches,
  ):
    next(batches)
  assert int(str(e.value).split()[0]) == str(e.value).count("'picture ") > tasks.MAX_LEFT_BEHIND


class Files(Hanging):
  """Each sample in a file of its own."""

  def __init__(self, folder, **fields):
    super().__init__(**fields)
    self.folder, self.tried = folder, []

  def file(self, index):
    return str(self.folder / str(index))

  def read(self, index):
    self.tried.append(index)
    return super().read(index)


def test_a_sample_that_hung_is_tried_again_where_its_file_or_its_time_has_changed(
  decoder, tmp_path, caplog
):
  for number in range(COUNT):
    (tmp_path / str(number)).write_bytes(b'%c' % number)
  seconds = 0.2

  def start(hanging=(7,)):
    """A start of the run: whether it tried sample 7, and the samples that are bad."""
    source = Files(tmp_path, hanging=hanging)
    settings = DataSettings(
      source='synthetic', image_size=8, threads=1, decode_seconds=seconds, max_bad_share=0.1
    )
    with train(settings, source, Ledger(str(tmp_path))) as batches:
      for _ in range(COUNT // 8):
        next(batches)
      return 7 in source.tried, batches.bad_names

  assert start() == (True, ['picture 7'])
  assert start() == (False, ['picture 7'])
  seconds = 0.1  # Less than it had.
  assert start() == (False, ['picture 7'])
  seconds = 0.4
  assert start() == (True, ['picture 7'])
  assert start() == (False, ['picture 7'])  # Its entry has the time that it had.
  assert 'skipping a bad file: picture 7 (takes longer than 0.4 s to decode)' in caplog.messages
  os.utime(tmp_path / '7', ns=(1, 1))
  assert start() == (True, ['picture 7'])
  (tmp_path / '7').write_bytes(b'mended')
  assert start(hanging=()) == (True, [])
  assert start(hanging=()) == (True, [])
  decoder.set()


def test_all_processes_but_the_first_say_their_number(folder, caplog):
  with train(of_folder(folder), process_index=1, process_count=2) as batches:
    for _ in range(6):
      next(batches)
  said = [(record.levelname, record.getMessage()) for record in caplog.records]
  start = f'process 1: skipping a bad file: {folder}/a/'
  assert said and all(level == 'ERROR' and words.startswith(start) for level, words in said)


def test_slow_storage_is_waited_for_and_named(decoder):
  del decoder
  settings = DataSettings(source='synthetic', image_size=8, threads=1, decode_seconds=0.1)
  source = Hanging(slow=range(COUNT))
  got = []
  with train(settings, source) as batches:
    reader = threading.Thread(target=lambda: got.append(next(batches)))
    reader.start()
    time.sleep(0.5)
    said = waiting_for()
    source.free.set()
    reader.join(60)
    assert batches.bad_count == 0
  assert said.startswith("a thread reads 'picture ")
  assert got[0]['valid'].all()
  assert waiting_for() == 'not for images'


def test_a_mask_that_vanishes_or_declares_too_much_stops_by_its_name(tmp_path):
  for kind in ('images', 'masks'):
    (tmp_path / 'train' / kind).mkdir(parents=True)
    for number in range(3):
      Image.new('L', (20, 20)).save(tmp_path / 'train' / kind / f'{number}.png')
  masks = {
    'classes': 2,
    'ignore': 255,
    'height': 20,
    'width': 20,
    'short_side': 0,
    'scale': (1, 1),
    'category_max_ratio': 1.0,
  }
  settings = DataSettings(
    source='mask_folder', path=str(tmp_path), image_size=8, views=(ViewSettings(),), masks=masks
  )
  source = make_source(settings, 'train')
  mask = tmp_path / 'train' / 'masks' / '1.png'
  data = mask.read_bytes()
  at = data.index(b'IHDR') + 4
  mask.write_bytes(data[:at] + struct.pack('>II', 50_000, 50_000) + data[at + 8 :])
  with (
    pytest.raises(UserError, match=r'masks/1.png. cannot be read'),
    train(settings, source) as batches,
  ):
    next(batches)
  mask.unlink()
  with (
    pytest.raises(UserError, match=r'masks/1.png. cannot be read .*No such file'),
    train(settings, source) as batches,
  ):
    next(batches)
