"""Judges a finished segmentation run on whole images: mIoU, a table by class, the best constant guess, a picture.

  python benchmarks/segmentation.py --run=runs/camvid --split=test --out=benchmarks/results/camvid_cpu.json

The picture (photograph, truth, guess) shows photographs of the data set, so it goes into the run's workdir, not into
the repository.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import report

from folk_jax import checkpoint, data
from folk_jax.errors import UserError
from folk_jax.evals import segmentation
from folk_jax.train.run import data_settings, make_run


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--run', type=pathlib.Path, required=True, help='workdir of a run with objective segment')
  add('--split', default='test', help='folder of the split to judge on (default test)')
  add('--path', help="the data's folder, where it isn't the run's")
  add('--out', type=pathlib.Path, help='JSON (default RUN/segmentation_SPLIT.json)')
  add('--batch', type=int, default=8, help='images at a time (default 8)')
  add('--pictures', type=int, default=4, help='images in the picture; 0 for none (default 4)')
  flags = parser.parse_args()
  flags.out = flags.out or flags.run / f'segmentation_{flags.split}.json'
  return flags


def judge(flags: argparse.Namespace) -> tuple[segmentation.Report, dict[str, Any], list[Any]]:
  """The report, what it is of, and (photograph, truth, guess) of evenly spread images."""
  file = flags.run / 'config.json'
  if not file.exists():
    raise UserError(f'{flags.run} is no workdir: it has no config.json')
  config = ml_collections.ConfigDict(json.loads(file.read_text(encoding='utf-8')))
  if config.objective.name != 'segment':
    raise UserError(f"{flags.run} has objective '{config.objective.name}'; expected 'segment'")
  config.data.test_split = flags.split
  config.data.path = flags.path or config.data.path
  settings = data_settings(config)
  source = data.make_source(settings, 'test')
  objective = make_run(config, len(source), len(source.class_names)).objective
  steps = str(flags.run / 'checkpoints')
  params, _, step = checkpoint.read_subtree(steps, ('params',))
  _, extra = jax.eval_shape(lambda key: objective.init(key, None), jax.random.key(0))
  if extra:  # A ViT has none.
    extra, _, _ = checkpoint.read_subtree(steps, ('extra',), step)
  shown = set(np.linspace(0, len(source) - 1, flags.pictures).round().astype(int).tolist())
  kept = []

  def keep(batch, guess_BHW):
    for row in np.flatnonzero(batch['valid']):
      if int(batch['index'][row]) in shown:
        kept.append((batch['views'][row, 0], batch['mask'][row, 0], guess_BHW[row]))

  with data.eval_batches(source, settings, batch_size=flags.batch) as batches:
    found = segmentation.evaluate(objective, params, extra, batches, keep=keep)
  about = {
    'run': str(flags.run),
    'step': step,
    'split': flags.split,
    'ignore': config.objective.ignore,
    'window': config.image_size,
    'stride': objective.window_stride,
    'class_names': list(source.class_names),
  }
  return found, about, kept


def draw(kept: list[Any], about: dict[str, Any], path: pathlib.Path) -> None:
  """A row an image: photograph, truth, guess; what doesn't count is black in the truth."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import patches
  from matplotlib import pyplot as plt

  classes = len(about['class_names'])
  colours = plt.get_cmap('tab20')(np.arange(classes) % 20)[:, :3]
  black = np.zeros((256 - classes, 3))
  table = np.concatenate([colours, black])
  figure, axes = plt.subplots(
    len(kept), 3, figsize=(13, 3.3 * len(kept)), squeeze=False, constrained_layout=True
  )
  for row, (image_HWC, truth_HW, guess_HW) in zip(axes, kept, strict=True):
    pictures = ('photograph', image_HWC), ('truth', table[truth_HW]), ('guess', table[guess_HW])
    for axis, (title, picture) in zip(row, pictures, strict=True):
      axis.imshow(picture)
      axis.set_title(title, fontsize='small')
      axis.axis('off')
  if classes <= 20:
    handles = [
      patches.Patch(color=colour, label=name)
      for colour, name in zip(colours, about['class_names'], strict=True)
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=6, fontsize='small')
  figure.savefig(path, dpi=90)
  plt.close(figure)


def main() -> None:
  flags = parse()
  found, about, kept = judge(flags)
  rows = found.rows(about['class_names'])
  cells = [
    (row['name'], *(f'{100 * row[key]:.1f}' for key in ('iou', 'recall', 'share'))) for row in rows
  ]
  print(report.table(('class', 'IoU %', 'found %', 'of pixels %'), cells))
  scores = found.scores
  summary = [
    ('this run', f'{scores["miou"]:.2%}', f'{scores["pixel_accuracy"]:.2%}'),
    (
      'best constant guess',
      f'{scores["constant_miou"]:.2%}',
      f'{scores["constant_pixel_accuracy"]:.2%}',
    ),
  ]
  print(report.table(('', 'mIoU', 'pixel accuracy'), summary))
  result = {'what': 'semantic segmentation of whole images'} | about | scores
  result |= {'images': found.images, 'classes': rows, 'confusion': found.confusion_KK.tolist()}
  del result['class_names']
  report.write_json(flags.out, result | report.context())
  print(f'written to {flags.out}')
  if kept:
    picture = flags.run / f'segmentation_{flags.split}.png'
    draw(kept, about, picture)
    print(f'picture in {picture}')


if __name__ == '__main__':
  report.main(main)
