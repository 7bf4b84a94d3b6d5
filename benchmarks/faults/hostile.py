"""Files that mean harm, and checkpoints of other versions: refused in a line, in bounded memory and time, or read.

Each function makes one such file in a folder and hands it to whoever reads such files; '' where the promise was kept.
Trials and tests share them. Memory is what Python and NumPy allocate, by tracemalloc.
"""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable

import common
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.interop import timm

# Whatever a file claims: so much more memory than its own size, and so many seconds on a busy machine.
MOST_BYTES, MOST_SECONDS = 64 << 20, 20.0
GIGABYTE = 1 << 30
_DEEPER = 2


def refused(read: Callable[[], object], *words: str) -> str:
  """'' where reading ends with a `UserError` of one line that has the words, in bounded memory and time."""
  tracemalloc.start()
  began = time.perf_counter()
  said = ''
  try:
    read()
  except UserError as error:
    said = str(error)
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  seconds = time.perf_counter() - began
  if not said:
    return 'it was read'
  if '\n' in said or len(said) > 2000 or not all(word in said for word in words):
    return f'it was refused in other words: {said[:300]}'
  if peak > MOST_BYTES:
    return f'it took {peak >> 20} MiB'
  return f'it took {seconds:.0f} s' if seconds > MOST_SECONDS else ''


def _safetensors(folder: pathlib.Path, header: object, data: bytes = b'', length: int = -1) -> str:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  file = folder / 'hostile.safetensors'
  file.write_bytes(struct.pack('<Q', len(text) if length < 0 else length) + text + data)
  return refused(lambda: timm.load_timm_file(file), 'hostile.safetensors: damaged or not')


def _entry(shape: list[int], begin: int, end: int, dtype: str = 'F32') -> dict[str, object]:
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


SAFETENSORS: dict[str, Callable[[pathlib.Path], str]] = {
  'a shape of terabytes': lambda f: _safetensors(
    f, {'a': _entry([1 << 20, 1 << 20], 0, 8)}, bytes(8)
  ),
  'a shape and bytes of terabytes': lambda f: _safetensors(f, {'a': _entry([1 << 40], 0, 1 << 42)}),
  'a shape that overflows 64 bits': lambda f: _safetensors(
    f, {'a': _entry([1 << 32, 1 << 32, 1 << 2], 0, 0)}
  ),
  'arrays that overlap': lambda f: _safetensors(
    f, {'a': _entry([2], 0, 8), 'b': _entry([2], 4, 12)}, bytes(12)
  ),
  'arrays that share their bytes a thousand times': lambda f: _safetensors(
    f, {f'{i}': _entry([64], 0, 256) for i in range(1000)}, bytes(256)
  ),
  'a gap between arrays': lambda f: _safetensors(f, {'a': _entry([2], 4, 12)}, bytes(12)),
  'negative bytes': lambda f: _safetensors(f, {'a': _entry([-2], 8, 0)}, bytes(8)),
  'a header longer than the file': lambda f: _safetensors(f, {}, length=1 << 62),
  'a header of 2 GB that is not there': lambda f: _sparse(f, 2 * GIGABYTE),
  'a header that nests without end': lambda f: _safetensors(f, b'[' * 200_000),
  'a number without end': lambda f: _safetensors(f, b'{"a":' + b'9' * 100_000 + b'}'),
  'a name twice': lambda f: _safetensors(
    f, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', bytes(1)
  ),
  'a kind of array that is unknown': lambda f: _safetensors(
    f, {'a': _entry([1], 0, 1, 'PICKLE')}, b'.'
  ),
  'data of 30 GB that a disk need not have': lambda f: _large(f),
}


def _sparse(folder: pathlib.Path, size: int) -> str:
  file = folder / 'hostile.safetensors'
  with open(file, 'wb') as opened:
    opened.write(struct.pack('<Q', size))
    opened.truncate(size + 8)
  return refused(lambda: timm.load_timm_file(file), 'its header claims')


def _large(folder: pathlib.Path) -> str:
  size = 30 * GIGABYTE
  text = json.dumps({'a': _entry([size], 0, size, 'U8')}).encode()
  file = folder / 'hostile.safetensors'
  with open(file, 'wb') as opened:
    opened.write(struct.pack('<Q', len(text)) + text)
    opened.truncate(8 + len(text) + size)  # Holes take no room.
  return refused(lambda: timm.load_timm_file(file), 'more than weights of this model can be')


def _npz(
  folder: pathlib.Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED
) -> str:
  file = folder / 'hostile.npz'
  with zipfile.ZipFile(file, 'w', method) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return refused(lambda: timm.read_npz(file), 'hostile.npz: damaged or not')


def npy(header: str, data: bytes = b'') -> bytes:
  """The bytes of an `.npy` with this header."""
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode() + data


def _bomb(folder: pathlib.Path) -> str:
  """A file of some megabytes that unpacks to twenty gigabytes: members that say so, one after the other."""
  file = folder / 'hostile.npz'
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    archive.writestr(
      'a.npy', npy("{'descr': '|u1', 'fortran_order': False, 'shape': (9,)}", bytes(9))
    )
  content = file.read_bytes()
  central = content.index(b'PK\x01\x02')
  # The table of contents says it: 24 bytes into an entry stands the size.
  claimed = struct.pack('<I', 3 * GIGABYTE)
  entries = b''.join(
    content[central : central + 24] + claimed + content[central + 28 : central + 46] + name
    for name in (b'%c.npy' % letter for letter in range(97, 104))
  )
  end = struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, 7, 7, len(entries), central, 0)
  file.write_bytes(content[:central] + entries + end)
  return refused(lambda: timm.read_npz(file), 'unpacks to')


def _honest_bomb(folder: pathlib.Path) -> str:
  """Zeros of 2 GB in 2 MB, in a file that says so, where the model has a tenth of it."""
  file = folder / 'hostile.npz'
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    with archive.open('a.npy', 'w', force_zip64=True) as member:
      member.write(npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({256 << 20},)}}"))
      for _ in range(64):
        member.write(bytes(4 << 20))
  return refused(lambda: timm.read_npz(file, limit_bytes=128 << 20), 'unpacks to')


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"
NPZ: dict[str, Callable[[pathlib.Path], str]] = {
  'an array of terabytes': lambda f: _npz(f, {'a.npy': npy(HUGE, bytes(8))}),
  'objects to be unpickled': lambda f: _npz(
    f, {'a.npy': npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b'cos\nsystem\n.')}
  ),
  'a header that is a program': lambda f: _npz(f, {'a.npy': npy("__import__('os').abort()")}),
  'a header that nests without end': lambda f: _npz(f, {'a.npy': npy('(' * 9000)}),
  'a path that climbs': lambda f: _npz(f, {'../../../tmp/escaped': b'x'}),
  'a compression that asks for gigabytes': lambda f: _npz(
    f, {'a.npy': npy(HUGE)}, zipfile.ZIP_LZMA
  ),
  'a bomb': _bomb,
  'a bomb that says so': _honest_bomb,
}


def saved(folder: pathlib.Path) -> pathlib.Path:
  """A folder of checkpoints with a small step 1; made once."""
  path = folder / 'saved'
  if not (path / '1').exists():
    with checkpoint.Checkpoints(str(path), 1, 1, asynchronous=False) as checkpoints:
      checkpoints.save(1, {'params': {'a': np.arange(4, dtype=np.float32)}}, {'config': {}})
  return path


def changed(folder: pathlib.Path, change: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The same with something changed in step 1, by someone who left the digests out."""
  path = folder / 'changed'
  shutil.rmtree(path, ignore_errors=True)
  shutil.copytree(saved(folder), path)
  (path / '1' / 'digests.json').unlink()
  change(path / '1')
  return path


def _refused_step(folder: pathlib.Path, change: Callable[[pathlib.Path], None], *words: str) -> str:
  path = changed(folder, change)
  return refused(lambda: checkpoint.read_subtree(str(path), ('params',)), 'step 1 in', *words)


def _meta(text: bytes) -> Callable[[pathlib.Path], None]:
  return lambda step: (step / 'meta' / 'metadata').write_bytes(text) and None


def _huge_array(step: pathlib.Path) -> None:
  """The array gets a shape of terabytes, of which its one chunk is written: the rest would be read as zeros."""
  import tensorstore

  base = f'file://{step / "state"}/'
  spec = {
    'driver': 'zarr',
    'kvstore': {'driver': 'ocdbt', 'base': base, 'path': 'params.a/'},
  }
  tensorstore.open(spec, open=True).result().resize(exclusive_max=[1 << 40]).result()


CHECKPOINTS: dict[str, Callable[[pathlib.Path], str]] = {
  'a newer format': lambda f: _refused_step(
    f, _meta(b'{"format_version": 2}'), 'has format 2', 'update folk_jax'
  ),
  'a format that is no number': lambda f: _refused_step(f, _meta(b'{"format_version": "1"}')),
  'meta that nests without end': lambda f: _refused_step(f, _meta(b'[' * 300_000)),
  'meta that is deep': lambda f: _refused_step(f, _meta(b'{"a":' * 900 + b'1' + b'}' * 900)),
  'meta of gigabytes': lambda f: _refused_step(
    f, lambda step: os.truncate(step / 'meta' / 'metadata', 5 * GIGABYTE)
  ),
  'meta that is a list': lambda f: _refused_step(f, _meta(b'[1]')),
  'arrays of terabytes': lambda f: _refused_step(f, _huge_array),
}


def format_zero(folder: pathlib.Path) -> str:
  """A checkpoint from before there were versions and digests: the same tree, read as it is."""
  path = changed(folder, _meta(b'{"config": {}}'))
  node, meta, step = checkpoint.read_subtree(str(path), ('params',))
  fine = meta['format_version'] == 0 and step == 1 and node['a'].tolist() == [0, 1, 2, 3]
  return '' if fine else f'it was read as {node}, {meta}'


def fuzzed(times: int) -> Callable[[int], str]:
  """A trial that runs the tests with fuzz in their names on so many times CI's examples, of other seeds."""

  def trial(number: int) -> str:
    root = pathlib.Path(__file__).resolve().parents[2]
    files = [root / 'tests' / 'faults' / f'test_fuzz_{name}.py' for name in ('config', 'importers')]
    done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *map(str, files)],
      cwd=root,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'FOLK_JAX_FUZZ': str(times)},
      capture_output=True,
      text=True,
      check=False,
    )
    return '' if not done.returncode else f'run {number}: {done.stdout[-300:]!r}'

  return trial


def one_of(kinds: dict[str, Callable[[pathlib.Path], str]], folder: pathlib.Path):
  """A trial that takes the kinds in turn."""
  names = list(kinds)

  def trial(number: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = names[number % len(names)]
    lost = kinds[name](folder)
    return f'{name}: {lost}' if lost else ''

  return trial


# Exports argv's workdir and says what had to be imported for it.
EXPORT = """
import os, sys
from folk_jax import export

file = export.export(sys.argv[1], which=sys.argv[2])
import jax
assert jax.device_count() == 1 and os.path.getsize(file) > 1000
data = ('folk_jax.data', 'grain', 'tensorflow_datasets', 'tensorflow', 'array_record', 'cv2', 'torch', 'timm')
brought = [name for name in data if name in sys.modules]
assert not brought, f'export imported {brought}'
"""


def faults(folder: pathlib.Path) -> list[common.Fault]:
  """Rows for hostile files and other versions, each kind tried three times."""
  refusal = 'Refused in one line; memory stays below 64 MiB more and time below seconds, whatever the file claims.'
  tables = {
    'a hostile .safetensors': SAFETENSORS,
    'a hostile .npz': NPZ,
    'a hostile checkpoint, or a newer one': CHECKPOINTS,
  }
  rows = [
    common.Fault(name, refusal, f'{"; ".join(kinds)}.', one_of(kinds, folder), 3 * len(kinds))
    for name, kinds in tables.items()
  ]
  zero = {'format 0': format_zero}
  return [
    *rows,
    common.Fault(
      'a checkpoint of an older format',
      'It is read where its arrays are the same.',
      ' '.join(format_zero.__doc__.split()),
      one_of(zero, folder),
      3,
    ),
    common.Fault(
      'fuzzed configurations and weights',
      'Any text, bytes and arrays give a result or one line in words, in bounded memory.',
      f"Hypothesis tries {_DEEPER} times CI's examples, some {2000 * _DEEPER}, with other seeds.",
      fuzzed(_DEEPER),
      1,
    ),
  ]
