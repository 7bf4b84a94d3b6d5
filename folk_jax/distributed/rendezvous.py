"""The processes of a run meet before jax connects them, and whoever is missing is named.

jax's own wait ends in an abort with a stack trace, in every process. Here process 0 listens at the port where jax's
service will listen a moment later; each of the others says who it is; when all are there, or something is wrong, all
are told. A line of JSON each way.
"""

import contextlib
import json
import socket
import time

from folk_jax.errors import UserError

_RETRY_SECONDS = 0.2
# A stranger at the port (a health check, say) is heard no longer than this.
_HELLO_SECONDS = 5.0
# Process 0 gives up first, so that the others hear why.
_GRACE_SECONDS = 10.0
_SHOWN = 8


class NotMet(Exception):
  """Some did not come in time: nobody's mistake, and worth another try (exit status 1, where a mistake has 2)."""


def meet(coordinator: str, processes: int, process: int, seconds: float) -> None:
  """Returns in every process once all have called this; the port is free again then.

  Args:
    coordinator: HOST:PORT; process 0 listens at the port on every interface of its host.
    processes: how many there are, 2 or more.
    process: this one's number, from 0.
    seconds: how long process 0 waits for the others, and they for it.

  Raises:
    NotMet: in every process that is there: some are missing (named), or process 0 cannot be reached.
    UserError: likewise: two have one number, they disagree on how many there are, or process 0 cannot listen.
  """
  host, _, port = coordinator.rpartition(':')
  if process:
    _arrive(host.strip('[]'), int(port), processes, process, seconds)
  else:
    _await_all(int(port), processes, seconds, coordinator)


def _await_all(port: int, processes: int, seconds: float, coordinator: str) -> None:
  deadline = time.monotonic() + seconds
  arrived: set[int] = set()
  others: list[socket.socket] = []
  with contextlib.ExitStack() as open_sockets:
    listener = open_sockets.enter_context(_listen(port, coordinator))
    wrong, late = '', False
    while len(arrived) < processes - 1 and not wrong:
      left = deadline - time.monotonic()
      if left <= 0:
        late = True
        missing = [i for i in range(1, processes) if i not in arrived]
        wrong = (
          f'{len(missing)} of {processes} processes did not come to {coordinator} within {seconds:g} s, '
          f'among them {", ".join(map(str, missing[:_SHOWN]))}: see what their hosts say, and that they reach this one'
        )
        break
      listener.settimeout(left)
      try:
        other, _ = listener.accept()
      except TimeoutError:
        continue
      open_sockets.enter_context(other)
      hello = _read(other, _HELLO_SECONDS)
      if not {'process', 'processes'} <= hello.keys():
        continue
      number = hello['process']
      if hello['processes'] != processes:
        wrong = f'process {number} expects {hello["processes"]} processes and process 0 expects {processes}'
      elif number in arrived or not 0 < number < processes:
        wrong = f'two processes say that they are process {number}: each needs a number of its own'
      arrived.add(number)
      others.append(other)
    for other in others:
      with contextlib.suppress(OSError):
        _write(other, {'wrong': wrong, 'late': late})
    if not wrong:
      # The end that closes first keeps the port busy for a while: the others do.
      for other in others:
        _read(other, _HELLO_SECONDS)
  if wrong:
    raise (NotMet if late else UserError)(wrong)


def _listen(port: int, coordinator: str) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(('', port))
  except OSError as error:
    raise UserError(
      f'process 0 cannot listen at port {port} of {coordinator}: {error.strerror or error}; '
      'another run may be there: choose another port'
    ) from error


def _arrive(host: str, port: int, processes: int, process: int, seconds: float) -> None:
  deadline = time.monotonic() + seconds
  reason = 'no answer'
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as server:
        _write(server, {'process': process, 'processes': processes})
        answer = _read(server, max(left, 0) + _GRACE_SECONDS)
        if answer.get('wrong'):
          raise (NotMet if answer.get('late') else UserError)(answer['wrong'])
        if 'wrong' in answer:
          return
        reason = 'it hung up'
    except OSError as error:
      reason = error.strerror or str(error) or reason
    time.sleep(min(_RETRY_SECONDS, max(left, 0)))
  raise NotMet(
    f'process {process} could not meet process 0 at {host}:{port} within {seconds:g} s ({reason}): '
    'is process 0 running there, and may this host reach that port?'
  )


def _write(to: socket.socket, message: dict) -> None:
  to.sendall(json.dumps(message).encode() + b'\n')


def _read(other: socket.socket, seconds: float) -> dict:
  """A line of JSON; empty where none comes in time, or the other end is closed."""
  other.settimeout(seconds)
  try:
    with other.makefile('rb') as stream:
      message = json.loads(stream.readline(4096) or b'{}')
  except (OSError, ValueError):
    return {}
  return message if isinstance(message, dict) else {}
