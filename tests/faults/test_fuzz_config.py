"""Any text for a recipe, and any numbers in its configuration: a result or one line in words, never a traceback.

FOLK_JAX_FUZZ=20 tries twenty times as many examples, of other seeds each time.
"""

import json
import os

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folk_jax import checkpoint
from folk_jax import config as config_lib
from folk_jax.errors import UserError

DEEPER = int(os.environ.get('FOLK_JAX_FUZZ', '0'))
DEFAULTS = {'smoke': False, 'data': '', 'size': 3, 'rate': 0.5}
# What the grammar is made of, more often than chance would bring it.
TOKENS = st.sampled_from(['smoke', 'data', 'size', 'rate', '=', ',', '"', "'", ' ', 'true', '1e3'])
TEXT = st.one_of(st.text(), st.lists(st.one_of(TOKENS, st.text(max_size=3))).map(''.join))


def fuzz(examples: int):
  """CI's examples are always the same, so that it fails for a change alone."""
  return settings(
    max_examples=examples * max(DEEPER, 1),
    derandomize=not DEEPER,
    database=None,
    deadline=None,
  )


@fuzz(250)
@given(TEXT)
def test_any_text_is_parsed_or_refused_in_a_line(text):
  try:
    found = config_lib.parse_arg(text, **DEFAULTS)
  except UserError as error:
    assert str(error)
    return
  assert set(found) == set(DEFAULTS)
  for name, value in DEFAULTS.items():
    assert type(found[name]) is type(value)


@fuzz(150)
@given(
  st.fixed_dictionaries(
    {
      'smoke': st.booleans(),
      'data': TEXT,
      'size': st.integers(),
      'rate': st.floats(allow_nan=False),
    }
  )
)
def test_what_is_formatted_is_parsed_back(values):
  empty = {'smoke': False, 'data': '', 'size': 1, 'rate': 1.0}
  found = config_lib.parse_arg(config_lib.format_arg(values), **empty)
  assert found.to_dict() == values


@pytest.fixture(scope='module')
def recipe() -> ml_collections.ConfigDict:
  return config_lib.load_recipe('configs/vit_b.py', 'smoke')


NUMBERS = st.one_of(
  st.sampled_from([0, 1, -1, 2, 3, 7]),
  st.integers(-(2**70), 2**70),
  st.floats(),
  st.text(max_size=5),
)


@fuzz(80)
@given(st.data())
def test_any_values_are_valid_or_refused_in_a_line(recipe, data):
  config = recipe.copy_and_resolve_references()
  keys = sorted(key for key, value in config_lib.flatten(config.to_dict()).items())
  for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4)):
    value = data.draw(NUMBERS)
    try:
      config.update_from_flattened_dict({key: value})
    except (
      TypeError,
      ValueError,
    ):  # ConfigDict keeps types, and the command line says so in words.
      continue
  devices, fsdp = data.draw(st.integers(1, 16)), data.draw(st.integers(-2, 16))
  for check in (
    lambda: config_lib.validate(config),
    lambda: config_lib.check_layout(max(config.batch_size, 1), 1, devices, fsdp),
  ):
    try:
      check()
    except UserError as error:
      assert str(error)


JSON = st.recursive(
  st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
  lambda children: st.one_of(st.lists(children), st.dictionaries(st.text(), children)),
  max_leaves=12,
)


@fuzz(150)
@given(saved=st.dictionaries(st.text(), JSON))
def test_any_saved_configuration_is_this_run_s_or_refused(recipe, saved):
  with pytest.raises(UserError, match='holds a run with another configuration'):
    config_lib.check_same_run(saved, recipe, 'runs/some')
  same = json.loads(config_lib.to_json(recipe))
  config_lib.check_same_run(same | {'watchdog': saved}, recipe, 'runs/some')


@fuzz(150)
@given(content=st.one_of(st.binary(), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_small_file_is_an_object_or_refused(tmp_path_factory, content):
  file = tmp_path_factory.getbasetemp() / 'fuzzed.json'
  file.write_bytes(content)
  try:
    assert isinstance(checkpoint.read_json(file), dict)
  except UserError as error:
    assert 'fuzzed.json is damaged' in str(error) and '\n' not in str(error)
