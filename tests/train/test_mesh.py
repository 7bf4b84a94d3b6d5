"""The mesh over several slices, and where a run's files may be opened: both without the hardware."""

import ast
import dataclasses
import pathlib
import sys

import numpy as np
import pytest

from folk_jax import main
from folk_jax.errors import UserError
from folk_jax.train import sharding

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh asks of a device."""

  id: int
  slice_index: int | None
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def devices(slices: int, each: int, a_host: int = 4) -> list[Device]:
  return [Device(i, i // each, i // a_host) for i in range(slices * each)]


@pytest.mark.parametrize(
  'slices, each, fsdp', [(1, 8, 1), (1, 8, 8), (2, 8, 4), (3, 4, 4), (4, 4, 1)]
)
def test_parameters_are_sharded_within_a_slice(slices, each, fsdp):
  shuffled = np.random.default_rng(0).permutation(devices(slices, each)).tolist()
  mesh = sharding.make_mesh(fsdp, shuffled)
  assert dict(mesh.shape) == {'data': slices * each // fsdp, 'fsdp': fsdp}
  assert {device.id for device in mesh.devices.flat} == set(range(slices * each))
  assert all(len({device.slice_index for device in row}) == 1 for row in mesh.devices)
  # A slice's rows lie together: gradients are summed inside it before they leave it.
  order = [row[0].slice_index for row in mesh.devices]
  assert order == sorted(order)


def test_devices_that_know_no_slice_are_one():
  alone = [Device(i, None, 0) for i in range(4)]
  assert [device.id for device in sharding.make_mesh(2, alone).devices.flat] == [0, 1, 2, 3]


def test_what_does_not_fit_a_slice_is_refused():
  with pytest.raises(
    UserError, match='fsdp 16 does not divide the 8 devices of a slice: use one of 1, 2, 4, 8'
  ):
    sharding.make_mesh(16, devices(2, 8))
  with pytest.raises(UserError, match=r'slices of \[4, 8\] devices'):
    sharding.make_mesh(1, devices(2, 8)[:12])


# Files that open what lies in a workdir, and what else may open files there: the one line of metrics.jsonl that is
# appended to on a disk alone.
IN_WORKDIRS = (
  'evaluate.py', 'suite.py', *(
    path.relative_to(ROOT / 'folk_jax').as_posix()
    for room in ('checkpoint', 'train', 'evals')
    for path in sorted((ROOT / 'folk_jax' / room).glob('*.py'))
    if path.name not in ('digests.py', 'lock.py')  # Of disks: they let buckets alone.
  ),
)  # fmt: skip
ON_A_DISK = {
  ('train/metrics.py', "open(path, 'a', encoding='utf-8')"),
  ('checkpoint/files.py', 'shutil'),  # How much of a disk is free.
  ('checkpoint/files.py', "open(fresh, 'w', encoding='utf-8')"),  # To flush it to the disk.
  ('checkpoint/files.py', 'os.fsync'),
  # Stacks of a run that hangs are written on a disk, and for a bucket to stderr; and it leaves at once.
  ('train/watchdog.py', 'pathlib'),
  ('train/watchdog.py', "open(self._stacks, 'a', encoding='utf-8')"),
  ('train/watchdog.py', 'os._exit'),
  ('train/origins.py', 'pathlib'),  # Of source files.
}


def local_only(file: str, source: str) -> list[str]:
  """What in a file works on a disk and not in a bucket."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'open':
      found.append(ast.unparse(node))
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names] + [getattr(node, 'module', '')]
      found += [name for name in names if name in ('pathlib', 'os.path', 'shutil', 'tempfile')]
    if isinstance(node, ast.Attribute) and ast.unparse(node) != 'os.PathLike':
      found += [ast.unparse(node)] * (ast.unparse(node.value) == 'os')
  return [what for what in found if (file, what) not in ON_A_DISK]


@pytest.mark.parametrize('file', IN_WORKDIRS)
def test_a_workdir_may_lie_in_a_bucket(file):
  assert local_only(file, (ROOT / 'folk_jax' / file).read_text(encoding='utf-8')) == []


def test_what_works_on_a_disk_alone_is_found():
  source = (
    "from pathlib import Path\nwith open('a') as file:\n  pass\nfile.open('rb')\nos.remove('a')\n"
  )
  assert sorted(local_only('train/a.py', source)) == ["open('a')", 'os.remove', 'pathlib']
  assert local_only('train/metrics.py', "open(path, 'a', encoding='utf-8')") == []


def test_a_bucket_without_its_package_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(UserError, match='--workdir=gs://bucket/run: .*gcsfs.*: pip install gcsfs'):
    main._check_bucket('gs://bucket/run')
