"""The command that compiles a recipe's train step for chips that needn't be there, and says what it will cost.

  python -m folk_jax.dryrun --config=configs/vit_b.py --topology=v5e:4x4
  python -m folk_jax.dryrun --config=configs/vit_b.py:smoke                      # for the devices at hand

No data is read and no parameter is made. The table goes to stdout, progress to stderr. Exit status: 0 it fits; 2 it
does not (one line says by how much, and which of the settings tried fit) or a mistake in what was asked; 1 anything
else. docs/performance.md explains every figure.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from folk_jax import cli
from folk_jax import config as config_lib
from folk_jax.compiled import chips, search, settings, table, topology
from folk_jax.errors import UserError

if TYPE_CHECKING:  # It imports jax, which must wait until the environment is prepared.
  from folk_jax.compiled import step as step_lib

GIB = chips.GIB
_GPU_FRACTION = 0.75  # jax's own default ("GPU memory allocation" in its documentation).
_LARGEST_BATCH = 4096  # Images a chip; `--find_batch` goes no further.


def _define_flags() -> None:
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Recipe, such as configs/vit_b.py; every field can be overridden.',
    lock_config=True,
  )
  flags.mark_flag_as_required('config')
  flags.DEFINE_string(
    'topology',
    '',
    'What to compile for: a TPU slice, v5e:4x4, v6e:16x16, v4:2x2x4, v5p:4x4x4, ..., or GPUs, h100:8, h200:1, a100:8, '
    'b200:8, rtx4090:1 (hosts x GPUs: h100:2x8); empty: the local devices.',
  )
  flags.DEFINE_integer(
    'slices', 1, 'How many such slices of TPUs, joined over the network.', lower_bound=1
  )
  flags.DEFINE_string('json', None, 'Write the report to this file.')
  flags.DEFINE_string('text', None, "Write the compiled program (XLA's HLO) to this file.")
  flags.DEFINE_integer('images', 1281167, 'Samples of the training set; none is read.', 1)
  flags.DEFINE_integer('classes', 1000, 'Classes of the training set.', 0)
  flags.DEFINE_bool(
    'find_batch', False, 'Find the largest batch a chip that fits, then report on it.'
  )
  flags.DEFINE_integer(
    'suggestions', 2, 'After an out of memory: stop trying other settings when so many fit.', 0
  )
  flags.DEFINE_float(
    'memory_gib',
    None,
    'Memory of a device that counts as full; for devices whose own is not known.',
  )


def main(argv: Sequence[str]) -> None:
  """Compiles, reports and, where the step does not fit, says what would."""
  del argv
  values = flags.FLAGS
  config = values.config
  config_lib.validate(config)
  if config.task != 'pretrain':
    raise UserError(
      f"config.task is {config.task!r}: only a recipe that trains ('pretrain') has a step to compile"
    )
  if values.topology:
    chip, _ = topology.parse(values.topology)
    if values.slices > 1 and chip.platform == 'gpu':
      raise UserError(f'--slices is for TPUs: give hosts x GPUs, such as {chip.name}:2x8')
    topology.prepare_environment(values.topology)
  elif values.slices > 1:
    raise UserError('--slices needs a --topology: the local devices are what they are')
  from folk_jax.compiled import step as step_lib  # Starts jax, in the environment just prepared.

  target = _target(values.topology, values.slices, values.memory_gib)
  config = step_lib.for_target(config, target)
  recipe = config_flags.get_config_filename(values['config'])
  images = min(values.images, config.data.limit or values.images)
  compiler = step_lib.Compiler(recipe, target, images, values.classes)
  try:
    if values.find_batch:
      config = find_batch(compiler, config)
    result, text = compiler.report(config)
  except step_lib.OutOfMemory as error:
    fitting = list(what_fits(compiler, config, values.suggestions))
    short = {'needed': error.needed, 'granted': error.granted, 'fitting': fitting}
    _write_json(values.json, {'fits': False, 'setting': compiler.setting(config)} | short)
    raise UserError(does_not_fit(compiler, config, error, fitting)) from error
  result['setting']['changes'] = {
    key: settings.field(config, key) for key in config_flags.get_override_values(values['config'])
  }
  print(table.render(result))
  if values.text:
    _write(values.text, text)
  _write_json(values.json, result)


def _target(name: str, slices: int, memory_gib: float | None) -> 'step_lib.Target':
  """What to compile for: a topology's chips, or the devices at hand and what they say of their memory."""
  import jax

  from folk_jax.compiled import step as step_lib

  limit = memory_gib * GIB if memory_gib is not None else None
  if name:
    chip, _ = topology.parse(name)
    if limit is None and chip.platform == 'gpu':
      limit = _lent(chip)
    return step_lib.Target(name, slices, topology.devices(name, slices), chip, limit)
  devices = jax.devices()
  if limit is None:
    # A GPU says what it lends to programs; a CPU says nothing.
    limit = (devices[0].memory_stats() or {}).get('bytes_limit')
  return step_lib.Target('', 1, devices, chips.chip_of(devices[0].device_kind), limit)


def _lent(chip: chips.Chip) -> float:
  """Bytes of a GPU that jax takes when it starts, and programs have no more; a TPU's compiler knows its own."""
  # The second name is the older one.
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
  name = next((name for name in names if os.environ.get(name)), '')
  text = os.environ.get(name, str(_GPU_FRACTION))
  try:
    share = float(text)
  except ValueError:
    share = 0.0
  if not share > 0:
    raise UserError(f'{name} is {text!r} in the environment: expected a share such as 0.9')
  return chip.hbm_bytes * share


def find_batch(
  compiler: 'step_lib.Compiler', config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """`config` with the largest batch that fits; its images a chip are a multiple of the microbatches.

  Raises:
    UserError: not even one image a microbatch fits, or nothing says what a device's memory is.
  """
  devices = len(compiler.target.devices)
  if not compiler.target.topology and compiler.target.memory_limit is None:
    raise UserError(
      '--find_batch needs to know when memory is full, which these devices do not say: give --memory_gib or a'
      ' --topology'
    )

  def at(images: int) -> ml_collections.ConfigDict:
    return settings.changed(config, {'batch_size': images * devices})

  images = search.largest_that_fits(
    lambda images: compiler.fits(at(images)) is not None,
    config.batch_size // devices,
    config.accumulate,
    _LARGEST_BATCH,
  )
  if not images:
    raise UserError(
      f'not even {config.accumulate} images a chip fit: try --config.model.remat=block, or --config.mesh.fsdp to '
      'spread parameters, optimiser and teacher'
    )
  table.say(f'largest batch that fits: {images} images a chip, {images * devices} in all')
  return at(images)


def what_fits(
  compiler: 'step_lib.Compiler', config: ml_collections.ConfigDict, wanted: int
) -> Iterator[dict[str, Any]]:
  """Settings near `config` that fit, tried from the least to the greatest change, until `wanted` do."""
  found = 0
  for change in settings.alternatives(
    config, len(compiler.target.devices), compiler.target.islands
  ):
    if found == wanted:
      return
    bytes_taken = compiler.fits(settings.changed(config, change))
    if bytes_taken is not None:
      found += 1
      yield {'change': change, 'memory': bytes_taken}


def does_not_fit(
  compiler: 'step_lib.Compiler',
  config: ml_collections.ConfigDict,
  error: 'step_lib.OutOfMemory',
  fitting: Sequence[Mapping[str, Any]],
) -> str:
  """One line: what was asked for, the shortfall, and what fits."""
  target = compiler.target
  a_chip = config.batch_size / len(target.devices)
  line = f'{target.topology or "a device"} has not the memory for {a_chip:g} images a chip: {error}'
  if not fitting:
    return f'{line}; none of the settings tried fits: use more or larger chips, or a smaller batch'
  options = ' or '.join(
    ' '.join(f'--config.{key}={value}' for key, value in each['change'].items())
    + f' ({each["memory"] / GIB:.2f} GiB)'
    for each in fitting
  )
  return f'{line}; fits with {options}'


def _write_json(file: str | None, value: Mapping[str, Any]) -> None:
  if file:
    _write(file, json.dumps(value, indent=2) + '\n')


def _write(file: str, text: str) -> None:
  path = pathlib.Path(file).expanduser()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
  except OSError as error:
    raise UserError(f'cannot write {file}: {error}; give a file that can be written') from error


if __name__ == '__main__':
  _define_flags()
  cli.run(main)
