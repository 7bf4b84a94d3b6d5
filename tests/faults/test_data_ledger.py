"""The ledger of bad samples: what it holds for, and where its files cannot be written or lie in a bucket."""

import json
import types

import pytest

from folk_jax.data import Ledger
from folk_jax.data import ledger as ledger_lib
from folk_jax.data.ledger import Bad, Tried


def test_a_ledger_that_cannot_be_kept_is_no_reason_to_stop(tmp_path, caplog):
  ledger = Ledger(str(tmp_path / 'not_there'))
  ledger.add(Bad(1, 'one', 'broken'))
  ledger.add(Bad(2, 'two', 'broken'))
  assert list(ledger.bad) == [1, 2]
  assert [r.getMessage()[:28] for r in caplog.records] == ['bad samples are not kept in ']


@pytest.mark.parametrize(
  'now, holds',
  [(Tried(60.0, (5, 9)), True), (Tried(30.0, (5, 9)), True), (Tried(61.0, (5, 9)), False)]
  + [(Tried(0.0, (5, 9)), False), (Tried(60.0, (5, 8)), False), (Tried(60.0, None), False)],
)  # fmt: skip
def test_what_a_sample_was_passed_over_for(now, holds):
  assert Tried(60.0, (5, 9)).holds(now) is holds
  assert Tried(0.0, (5, 9)).holds(now) is (now.file == (5, 9))


class Refused(Exception):
  """As gcsfs raises after its tries: no OSError."""


def test_a_ledger_in_a_bucket_is_written_once_a_minute_and_outlives_refusals(
  tmp_path, monkeypatch, caplog
):
  clock, files, refuses = [1000.0], {}, [False]

  class Object:
    def __init__(self, name):
      self.name = name

    def __str__(self):
      return self.name

    def __lt__(self, other):
      return self.name < other.name

    def __eq__(self, other):
      return self.name == other.name

    def __truediv__(self, name):
      return Object(f'{self.name}/{name}')

    def expanduser(self):
      return self

    def asks(self):
      if refuses[0]:
        raise Refused('503')
      return self

    def glob(self, pattern):
      assert pattern == 'bad_samples*.jsonl'
      return [Object(name) for name in self.asks() and list(files)]

    def exists(self):
      return self.asks().name in files

    def stat(self):
      return types.SimpleNamespace(length=len(files[self.asks().name]))

    def read_bytes(self):
      reads.append(self.name)
      return files[self.asks().name].encode()

    def write_text(self, text):
      files[self.asks().name] = text

  reads = []
  monkeypatch.setattr(ledger_lib.epath, 'Path', Object)
  monkeypatch.setattr(ledger_lib, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
  run = 'gs://bucket/run'
  first, second = Ledger(run), Ledger(run, 1)
  first.add(Bad(1, 'one', 'broken'))
  first.add(Bad(2, 'two', 'broken'))
  assert len(files[f'{run}/bad_samples.jsonl'].splitlines()) == 1
  second.refresh()
  assert not second.bad  # It has looked less than a minute ago.
  clock[0] += 61
  first.refresh()
  second.refresh()
  assert list(second.bad) == [1, 2]
  reads.clear()
  second.refresh(now=True)
  assert reads == []  # No file has grown.
  refuses[0] = True
  clock[0] += 61
  first.add(Bad(3, 'three', 'broken'))
  first.refresh(now=True)
  assert list(first.bad) == [1, 2, 3]
  assert caplog.messages == [f'bad samples are not kept in {run}/bad_samples.jsonl: 503']
  late = Ledger(run)  # A start that can't read what is there, and doesn't lose it.
  refuses[0] = False
  late.add(Bad(4, 'four', 'broken'))
  late.close()
  assert sorted(Ledger(run).bad) == [1, 2, 4]
  first.close()
  assert [json.loads(line)['index'] for line in files[f'{run}/bad_samples.jsonl'].splitlines()] == [
    1,
    2,
    3,
  ]
