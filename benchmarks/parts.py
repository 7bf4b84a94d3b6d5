"""What a benchmark has measured so far, kept beside its result: killed and started again, it goes on."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import report


class Parts:
  """Measurements by name, in `<out>.parts`, until the result they make up is written."""

  def __init__(self, out: pathlib.Path, of: Mapping[str, Any]):
    """Those that stand there, if they are of the same settings `of`, which name device and commit too."""
    self._file, self._of = out.with_name(f'{out.name}.parts'), dict(of)
    self._found: dict[str, Any] = {}
    if self._file.exists():
      saved = json.loads(self._file.read_text(encoding='utf-8'))
      if saved['of'] == json.loads(json.dumps(self._of)):
        self._found = saved['found']
        print(f'{len(self._found)} measurements stand in {self._file}')

  def get(self, name: str, measure: Callable[[], Any]) -> Any:
    """What stands under `name`, or what `measure` finds, as JSON has it."""
    if name not in self._found:
      self._found[name] = measure()
      report.write_json(self._file, {'of': self._of, 'found': self._found})
    return self._found[name]

  def rounds(self, runs: Callable[[], Mapping[str, Callable[[], Any]]], count: int) -> Any:
    """Milliseconds by program and round, as `report.measure`; each round stands by itself.

    `runs` makes the programs; it is called if a round is missing.
    """
    made: list[Mapping[str, Callable[[], Any]]] = []

    def measure() -> dict[str, float]:
      if not made:
        made.append(runs())
      return {name: times[0] for name, times in report.measure(made[0], 1).items()}

    found = [self.get(f'round {number}', measure) for number in range(count)]
    return {name: [one[name] for one in found] for name in found[0]}

  def finish(self, out: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes the result; its parts are then no longer needed."""
    report.write_json(out, result)
    self._file.unlink(missing_ok=True)
