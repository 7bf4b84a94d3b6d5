"""How processes meet: here threads, which is the same to a socket."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest

from folk_jax.distributed import leaving, rendezvous
from folk_jax.distributed.rendezvous import NotMet
from folk_jax.errors import UserError


def free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as listener:
    return listener.getsockname()[1]


def knock(port: int) -> bool:
  """Whether somebody listened to what is no process of the run."""
  with contextlib.suppress(OSError):
    with socket.create_connection(('127.0.0.1', port), timeout=5) as other:
      other.sendall(b'GET / HTTP/1.0\r\n\r\n')
    return True
  return False


def meet_all(
  said: list[tuple[int, int]], seconds: float, stranger: bool = False
) -> list[tuple[type, str] | None]:
  """The error that each process, that says (processes, process), is told; None where all is well."""
  port, told = free_port(), [None] * len(said)

  def meet(place: int, processes: int, process: int):
    try:
      rendezvous.meet(f'127.0.0.1:{port}', processes, process, seconds)
    except Exception as error:
      told[place] = (type(error), str(error))

  threads = [threading.Thread(target=meet, args=(i, *one)) for i, one in enumerate(said)]
  if stranger:  # Before the last of them.
    threads[0].start()
    assert leaving.within(10, lambda: knock(port))
  for thread in reversed(threads):  # Process 0 comes last: the others wait for it.
    if thread.ident is None:
      thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  return told


def test_all_meet_and_the_port_is_free_again():
  assert meet_all([(4, i) for i in range(4)], 20) == [None] * 4
  port = free_port()
  for _ in range(2):
    threads = [
      threading.Thread(target=rendezvous.meet, args=(f'127.0.0.1:{port}', 2, i, 20))
      for i in range(2)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    socket.create_server(('', port)).close()


def test_a_stranger_at_the_port_is_ignored():
  assert meet_all([(2, 0), (2, 1)], 20, stranger=True) == [None, None]


def test_the_missing_are_named_to_those_who_came():
  """As what another try may mend, and no mistake of the user's."""
  told = meet_all([(4, 0), (4, 2)], 1)
  assert told[0] == told[1] and told[0][0] is NotMet
  assert re.match(
    r'2 of 4 processes did not come to 127.0.0.1:\d+ within 1 s, among them 1, 3: ', told[0][1]
  )


def test_two_of_one_number_and_two_counts():
  assert set(meet_all([(3, 0), (3, 1), (3, 1)], 20)) == {
    (UserError, 'two processes say that they are process 1: each needs a number of its own')
  }
  assert set(meet_all([(2, 0), (3, 1)], 20)) == {
    (UserError, 'process 1 expects 3 processes and process 0 expects 2')
  }


def test_nobody_at_the_coordinator_and_somebody_else_at_the_port():
  port, began = free_port(), time.monotonic()
  with pytest.raises(
    NotMet, match=rf'process 1 could not meet process 0 at 127.0.0.1:{port} within 0.5 s'
  ):
    rendezvous.meet(f'127.0.0.1:{port}', 2, 1, 0.5)
  assert time.monotonic() - began < 5
  with socket.create_server(('', port)), pytest.raises(UserError, match='choose another port'):
    rendezvous.meet(f'127.0.0.1:{port}', 2, 0, 1)


def test_a_message_is_a_line_of_json():
  here, there = socket.socketpair()
  with here, there:
    rendezvous._write(here, {'process': 1})
    assert rendezvous._read(there, 1) == {'process': 1}
    here.sendall(json.dumps([1]).encode() + b'\n')
    assert rendezvous._read(there, 1) == {}
    assert rendezvous._read(there, 0.05) == {}
