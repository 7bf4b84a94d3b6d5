"""Writes a data set as ArrayRecord shards that `data.source=array_record` reads; needs no
TensorFlow.

  python -m folk_jax.data.prepare --from=folder --source=/photos --out=/data/photos
  python -m folk_jax.data.prepare --from=imagenet_tars --source=/downloads --out=/data/imagenet
  python -m folk_jax.data.prepare --from=tfds --name=cifar10 [--out=DATA_DIR]

`folder` takes what data.source=folder takes: DIR/train/<class>/* with DIR/val or DIR/test,
DIR/<class>/*, or a flat folder. `imagenet_tars` takes the folder that holds
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and (for the labels of the latter)
ILSVRC2012_devkit_t12.tar.gz. `tfds` prepares a TFDS data set as ArrayRecord, which for most sets
needs TensorFlow (pip install 'folk_jax[prepare]').

A run that was stopped goes on where it was when the same command is given again: finished shards
are kept.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import tqdm
from absl import flags

from folk_jax import cli
from folk_jax.data import records
from folk_jax.data.decode import BadImage, decode
from folk_jax.data.plans import Plan, Shard, plan_folder, plan_imagenet_tars
from folk_jax.errors import UserError


def write_plans(
  plans: Sequence[Plan], out: str, check: bool = False, quiet: bool = False
) -> list[str]:
  """Writes every split of a data set, keeping the shards that are already there.

  Args:
    plans: one a split; all with the same class names.
    out: the data set's folder; made if need be.
    check: whether to decode every image and leave out those that do not.
    quiet: whether to show no progress bar.

  Returns:
    The names of the images that were left out.

  Raises:
    UserError: `out` cannot be written, or holds shards of something else.
  """
  index = _start_index(plans, out)
  bad = []
  for plan in plans:
    split = index['splits'][plan.split]
    if split['complete']:
      continue
    total = sum(shard.weight for shard in plan.shards)
    with tqdm.tqdm(
      total=total, desc=plan.split, unit=plan.unit, unit_scale=True, disable=quiet
    ) as bar:
      for number, shard in enumerate(plan.shards):
        file = f'{plan.split}-{number:05d}-of-{len(plan.shards):05d}.array_record'
        path = os.path.join(out, file)
        if os.path.isfile(path):
          bar.update(shard.weight)
        else:
          bad += _write_shard(path, shard, check, bar)
        split['shards'].append({'file': file, 'samples': records.open_reader(path).num_records()})
    split['samples'] = sum(shard['samples'] for shard in split['shards'])
    split['complete'] = True
    _write_index(index, out)
  return bad


def _start_index(plans: Sequence[Plan], out: str) -> dict[str, Any]:
  """Makes or checks the index, so that a resumed run cannot mix two data sets."""
  class_names = list(plans[0].class_names)
  index = {
    'format': records.FORMAT,
    'version': records.VERSION,
    'class_names': class_names,
    'splits': {},
  }
  try:
    os.makedirs(out, exist_ok=True)
    if os.path.isfile(os.path.join(out, records.INDEX)):
      index = records.load_index(out)
    elif os.listdir(out):
      raise UserError(
        f"--out '{out}' is not empty and holds no {records.INDEX} of ours; give an empty or new "
        'folder'
      )
    for plan in plans:
      old = index['splits'].get(plan.split)
      if index['class_names'] != class_names or (old and old['fingerprint'] != plan.fingerprint):
        raise UserError(
          f"--out '{out}' holds another data set (or the source or --shard_samples changed); "
          'give a new folder'
        )
      if not old or not old['complete']:
        index['splits'][plan.split] = {
          'complete': False,
          'fingerprint': plan.fingerprint,
          'shards': [],
        }
    _write_index(index, out)
  except OSError as error:
    raise UserError(f"--out '{out}' cannot be written: {error}") from error
  return index


def _write_index(index: dict[str, Any], out: str) -> None:
  path = os.path.join(out, records.INDEX)
  with open(path + '.part', 'w', encoding='utf-8') as file:
    json.dump(index, file, indent=1)
  os.replace(path + '.part', path)


def _write_shard(path: str, shard: Shard, check: bool, bar: tqdm.tqdm) -> list[str]:
  """Writes one shard under another name and renames it when it is whole; returns the names left
  out.
  """
  from array_record.python import array_record_module

  bad = []
  writer = array_record_module.ArrayRecordWriter(path + '.part', records.WRITER_OPTIONS)
  for sample in shard.samples():
    bar.update(sample.weight)
    if check:
      try:
        decode(sample.data)
      except BadImage as error:
        bad.append(f'{sample.name} ({error})')
        continue
    writer.write(records.pack(sample.label, sample.name, sample.data))
  writer.close()
  os.replace(path + '.part', path)
  return bad


def _define_flags() -> None:
  """Defines the command's flags; not at import, where names so common would meet other commands'
  own.
  """
  kinds = ['folder', 'imagenet_tars', 'tfds']
  flags.DEFINE_enum('from', None, kinds, 'What to read.', required=True)
  flags.DEFINE_string('source', '', 'The folder of images, or of the ImageNet tars.')
  flags.DEFINE_string('out', '', 'The folder to write to; for tfds its data_dir.')
  flags.DEFINE_string('name', '', 'The TFDS data set, with --from=tfds.')
  flags.DEFINE_integer('shard_samples', 8192, 'Images in a shard, about.', lower_bound=1)
  flags.DEFINE_bool('check', False, 'Decode every image, and leave out those that do not decode.')


def main(argv: Sequence[str]) -> None:
  """Runs the command that the flags describe."""
  del argv
  values = flags.FLAGS
  kind = values['from'].value
  if kind == 'tfds':
    from folk_jax.data.tfds_source import prepared_builder

    builder = prepared_builder(values.name, values.out)
    print(f'{builder.info.full_name} is ready: :data=tfds,name={builder.info.full_name}')
    return
  if not values.source or not values.out:
    raise UserError(f'--from={kind} needs --source=DIR and --out=DIR')
  make = {'folder': plan_folder, 'imagenet_tars': plan_imagenet_tars}[kind]
  bad = write_plans(make(values.source, values.shard_samples), values.out, values.check)
  for name in bad:
    print(f'left out: {name}')
  index = records.load_index(values.out)
  counts = ', '.join(
    f'{split["samples"]} {name}' for name, split in sorted(index['splits'].items())
  )
  print(f'{values.out} is ready: {counts} images, {len(index["class_names"])} classes')


if __name__ == '__main__':
  _define_flags()
  cli.run(main)
