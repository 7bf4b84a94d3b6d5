"""The page at a run's end: it is made by another process, which neither fails the run nor keeps it."""

import json
import subprocess
import sys
import time

import jax
import pytest

from folk_jax.report import at_end


@pytest.fixture
def warned(monkeypatch):
  lines = []
  monkeypatch.setattr(at_end.logging, 'warning', lambda line, *words: lines.append(line % words))
  return lines


@pytest.fixture
def pretend(monkeypatch):
  """`pretend(code)` has Python run `code` instead of the report; gives commands, environments and processes."""
  asked = []

  def use(code: str) -> list:
    class Popen(subprocess.Popen):
      def __init__(self, command, **options):
        asked.append((command, options['env'], self))
        super().__init__([sys.executable, '-S', '-c', code], **options)

    # In its place there alone: `platform` runs processes, too.
    monkeypatch.setattr(at_end.subprocess, 'Popen', Popen)
    return asked

  monkeypatch.setattr(at_end, 'machine', lambda: {'devices': 'none'})  # It runs processes.
  return use


def test_the_run_goes_on_whatever_becomes_of_its_page(tmp_path, pretend, warned):
  asked = pretend('import sys; sys.exit("a line\\nerror: no such thing")')
  at_end.write_page(str(tmp_path))
  at_end.write_page(str(tmp_path / 'absent'))
  ((command, environment, _),) = asked  # There was no folder to write the second one's page to.
  assert command[1:] == ['-m', 'folk_jax.report', f'--workdir={tmp_path}']
  assert environment['JAX_PLATFORMS'] == 'cpu'
  assert [line.startswith('no report was written') for line in warned] == [True, True]
  assert 'error: no such thing' in warned[0] and not any('\n' in line for line in warned)
  assert json.loads((tmp_path / 'machine.json').read_text()) == {'devices': 'none'}


def test_a_page_that_is_made_is_named(tmp_path, pretend, warned, capsys):
  pretend('print("x" * 1000000)')  # More than a pipe holds.
  at_end.write_page(str(tmp_path))
  assert not warned
  assert capsys.readouterr().out == f'report: {tmp_path / "report.html"}\n'


@pytest.mark.parametrize(
  ('limit', 'told', 'said'), [(0, False, 'more than 0 seconds'), (300, True, 'told to end')]
)
def test_a_page_is_given_up(limit, told, said, tmp_path, pretend, warned, monkeypatch):
  """The process that makes it ends, though it would take an hour: past its time, or once the run is told to end."""
  monkeypatch.setattr(at_end, '_SECONDS', {False: limit})
  monkeypatch.setattr(at_end, '_LOOK_EVERY', 0.05)
  asked, answers = pretend('import time; time.sleep(3600)'), iter((False, False, told))
  begun = time.monotonic()
  at_end.write_page(str(tmp_path), told=lambda: next(answers))
  assert time.monotonic() - begun < 60
  assert asked[0][2].returncode is not None
  assert len(warned) == 1 and said in warned[0]


def test_a_process_that_will_not_end_is_killed(tmp_path, pretend, warned, monkeypatch):
  monkeypatch.setattr(at_end, '_GRACE', 0.1)
  monkeypatch.setattr(at_end, '_LOOK_EVERY', 0.05)
  deaf = tmp_path / 'deaf'
  asked = pretend(
    'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '
    f'open({str(deaf)!r}, "w").close(); time.sleep(3600)'
  )
  at_end.write_page(str(tmp_path), told=deaf.exists)
  assert asked[0][2].returncode == -9
  assert 'told to end' in warned[0]


def test_whether_a_page_is_missing(tmp_path, monkeypatch):
  assert at_end.page_missing(str(tmp_path))
  (tmp_path / 'report.html').write_text('')
  assert not at_end.page_missing(str(tmp_path))

  def refuse(path):
    raise PermissionError(path)

  monkeypatch.setattr(at_end.epath, 'Path', refuse)
  assert not at_end.page_missing(str(tmp_path / 'absent'))  # It can't be told.


def test_a_machine_in_words():
  assert at_end.machine()['devices'].startswith(f'{jax.device_count()} x ')
