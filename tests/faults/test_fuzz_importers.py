"""Any bytes and any arrays for the importers of weights: a result or one line in words, in bounded memory.

FOLK_JAX_FUZZ=20 tries twenty times as many examples, of other seeds each time.
"""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from folk_jax import models
from folk_jax.errors import UserError
from folk_jax.interop import timm as interop

DEEPER = int(os.environ.get('FOLK_JAX_FUZZ', '0'))
# Files of a few kilobytes: reading them, and the fuzzer's own notes, stay far below what a bomb asks for.
MOST_MEMORY = 32 << 20
ARRAYS = {
  'norm.weight': np.arange(3, dtype=np.float32),
  'head.bias': np.ones((2, 5), np.float16),
  'count': np.array(3),
}


def fuzz(examples: int):
  """CI's examples are always the same, so that it fails for a change alone."""
  return settings(
    max_examples=examples * max(DEEPER, 1),
    derandomize=not DEEPER,
    database=None,
    deadline=None,
  )


def npz(compressed: bool) -> bytes:
  file = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(file, **ARRAYS)
  return file.getvalue()


SAFETENSORS = safetensors.numpy.save(ARRAYS)
WHOLE = {'.npz': [npz(False), npz(True)], '.safetensors': [SAFETENSORS]}


@st.composite
def damaged(draw, whole: list[bytes]) -> bytes:
  """A whole file with bytes changed, cut out or put in."""
  content = bytearray(draw(st.sampled_from(whole)))
  for _ in range(draw(st.integers(1, 6))):
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    change = draw(st.sampled_from(['flip', 'set', 'cut', 'out', 'in']))
    if change == 'flip' and content:
      content[at] ^= 1 << draw(st.integers(0, 7))
    elif change == 'set' and content:
      content[at] = draw(st.sampled_from([0, 1, 0x7F, 0xFF, ord('9')]))
    elif change == 'cut':
      del content[at:]
    elif change == 'out':
      del content[at : at + draw(st.integers(1, 40))]
    elif change == 'in':
      content[at:at] = draw(st.binary(max_size=12))
  return bytes(content)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('fuzz')


def read(folder, ending: str, content: bytes) -> None:
  """Reads the file as an import would. Passes where it gives arrays of numbers or refuses in a line."""
  file = folder / f'fuzzed{ending}'
  file.write_bytes(content)
  tracemalloc.start()
  try:
    state = interop.load_timm_file(file)
    assert all(array.dtype.kind in 'fiu' for array in state.values())
  except UserError as error:
    assert '\n' not in str(error) and 'damaged or not what its ending says' in str(error)
  finally:
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
  assert peak < MOST_MEMORY


@fuzz(150)
@given(content=st.one_of(st.binary(max_size=300), damaged(WHOLE['.npz'])))
def test_any_npz(folder, content):
  read(folder, '.npz', content)


@fuzz(100)
@given(content=st.one_of(st.binary(max_size=300), damaged(WHOLE['.safetensors'])))
def test_any_safetensors(folder, content):
  read(folder, '.safetensors', content)


NUMBERS = st.one_of(st.integers(-1, 40), st.integers(-(2**65), 2**65), st.just(1e9), st.none())
ENTRIES = st.fixed_dictionaries(
  {},
  optional={
    'dtype': st.sampled_from(['F32', 'BF16', 'U8', 'F8_E4M3', 'BOOL', '', 3]),
    'shape': st.one_of(st.lists(NUMBERS, max_size=4), st.just('x')),
    'data_offsets': st.lists(NUMBERS, max_size=3),
  },
)


@fuzz(120)
@given(
  header=st.dictionaries(st.sampled_from('abc'), st.one_of(ENTRIES, NUMBERS)),
  length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
  data=st.binary(max_size=60),
)
def test_any_header_of_safetensors(folder, header, length, data):
  text = json.dumps(header).encode()
  size = struct.pack('<Q', len(text) if length is None else length)
  read(folder, '.safetensors', size + text + data)


@fuzz(120)
@given(
  descr=st.one_of(st.sampled_from(['<f4', '|V2', '|O', '<U9', '<f16', 'x']), st.text(max_size=9)),
  shape=st.lists(NUMBERS, max_size=4).map(tuple),
  data=st.binary(max_size=60),
  version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
  wild=st.one_of(st.none(), st.text(max_size=60)),
)
def test_any_header_of_an_array(folder, descr, shape, data, version, wild):
  text = wild
  if text is None:
    text = repr({'descr': descr, 'fortran_order': bool(len(data) % 2), 'shape': shape})
  text = text.encode('latin1', 'replace') + b'\n'
  size = struct.pack('<H' if version[0] == 1 else '<I', len(text))
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('a.npy', b'\x93NUMPY' + bytes(version) + size + text + data)
  read(folder, '.npz', file.getvalue())


SIZES = {
  'vit': (8, {'width': 8, 'depth': 2, 'heads': 2, 'patch': 4}, (2, 2)),
  'resnet': (32, {'depth': 18, 'width': 2}, None),
}


@pytest.fixture(scope='module')
def templates():
  """Shapes of a small backbone of each kind."""
  shapes = {}
  for name, (size, fields, _) in SIZES.items():
    module = models.make_backbone(name, size, **fields)
    image = np.zeros((1, size, size, 3), np.float32)
    shapes[name] = jax.eval_shape(lambda m=module, x=image: m.init(jax.random.key(0), x))['params']
  return shapes


@st.composite
def changed(draw, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A state dict with some entries gone, renamed, or of other shapes, kinds and values."""
  state = dict(state)
  for _ in range(draw(st.integers(0, 3))):
    # Where something more than a copy is done, more often than the others are hit.
    special = [n for n in state if 'pos' in n or n.endswith('cls') or 'query' in n] or list(state)
    name = draw(st.one_of(st.sampled_from(special), st.sampled_from(sorted(state))))
    what = draw(st.sampled_from(['gone', 'renamed', 'shape', 'axes', 'kind', 'values']))
    array = state.pop(name)
    if what == 'renamed':
      state[draw(st.one_of(st.text(max_size=8), st.just(name + '/LayerNorm_2/')))] = array
    elif what == 'shape':
      shape = draw(st.lists(st.sampled_from([0, 1, 2, 5, 8, 10]), max_size=4))
      state[name] = np.zeros(shape, np.float32)
    elif what == 'axes':
      state[name] = array.T
    elif what == 'kind':
      with np.errstate(all='ignore'):  # The values don't matter here.
        state[name] = array.astype(draw(st.sampled_from([np.int8, np.float16, np.uint64])))
    elif what == 'values':
      state[name] = np.full(array.shape, draw(st.floats(width=32)), np.float32)
    if not state:
      break
  return state


@pytest.mark.parametrize('name', SIZES)
def test_any_state_dict_of_timm_s_names(name, templates):
  template, (_, _, grid) = templates[name], SIZES[name]
  whole = {key: np.ones(shape, np.float32) for key, shape in interop.timm_shapes(template).items()}
  wanted = jax.tree.map(lambda leaf: leaf.shape, template)

  @fuzz(60)
  @given(state=changed(whole))
  def imported(state):
    try:
      found = interop.variables_from_timm(state, template, grid=grid)
    except UserError as error:
      assert 'do not fit the model' in str(error)
      return
    assert jax.tree.map(np.shape, found.params) == wanted

  imported()


def test_any_state_dict_of_big_vision_s_names(templates):
  template = templates['vit']
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), template)
  whole = interop.to_big_vision(ones, heads=2)
  wanted = jax.tree.map(lambda leaf: leaf.shape, template)
  # What the original repository adds: a position for the class token.
  old = {key: value for key, value in whole.items() if 'pos_embedding' not in key}
  old['params/Transformer/posembed_input/pos_embedding'] = np.ones((1, 5, 8), np.float32)

  @fuzz(60)
  @given(state=st.one_of(changed(whole), changed(old)), heads=st.sampled_from([None, 2, 4]))
  def imported(state, heads):
    try:
      found = interop.from_big_vision(state, template, heads=heads)
    except UserError as error:
      assert 'do not fit the model' in str(error)
      return
    assert jax.tree.map(np.shape, found)['blocks'] == wanted['blocks']

  imported()
