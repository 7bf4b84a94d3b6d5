"""folk_jax.main, which also writes down the numbers of each step's images, and may be told to end after a step.

  RECORD=FILE STOP_AFTER=4 python benchmarks/faults/recorded_main.py --config=... --workdir=...

RECORD gets a line of JSON a step and process, {"step": 3, "index": [17, 2, ...]}. STOP_AFTER=N is what
SIGTERM in step N is: the run saves and leaves with status 143; 0 lets it run to its end.
"""

import json
import os
from typing import Any


class Recorded:
  """Batches as they are, whose image numbers are written down."""

  def __init__(self, batches: Any, step: int, process: int):
    self._batches, self._step, self._process = batches, step, process

  def __next__(self) -> dict[str, Any]:
    batch = next(self._batches)
    self._step += 1
    line = {'step': self._step, 'index': [int(one) for one in batch['index']]}
    with open(f'{os.environ["RECORD"]}.{self._process}', 'a', encoding='utf-8') as out:
      out.write(json.dumps(line) + '\n')
    return batch

  def __iter__(self) -> 'Recorded':
    return self

  def __getattr__(self, name: str) -> Any:
    return getattr(self._batches, name)


def main() -> None:
  """Puts both in place, and runs the command."""
  from folk_jax import cli, data, distributed
  from folk_jax import main as command

  stream, stop = data.train_batches, int(os.environ.get('STOP_AFTER', 0))

  def train_batches(*args: Any, step: int, process_index: int = 0, **named: Any) -> Recorded:
    batches = stream(*args, step=step, process_index=process_index, **named)
    return Recorded(batches, step, process_index)

  data.train_batches = train_batches
  if stop:
    distributed.preempted = lambda step: step == stop
  cli.run(command.main)


if __name__ == '__main__':
  main()
