"""Trains every method for equally many steps on CIFAR-10 (JPEG) and sets their kNN accuracies side by side.

  python benchmarks/methods.py --path=data/cifar10 --out=benchmarks/results/methods_cpu.json --workdir=runs/methods

Each is its own recipe with `:cifar10`, all with the same backbone (ResNets apart), optimiser, batch and
length. Nothing is tuned for any of them. Killed and started again with the same command, it goes on:
finished runs stand in the JSON, an unfinished one resumes from its checkpoint.
"""

import argparse
import json
import os
import pathlib
from typing import Any

import report
import runs

from folk_jax import config as config_lib
from folk_jax.errors import UserError

# Name -> recipe and its arguments beside cifar10 and path.
METHODS = {
  'FOLK': ('cifar10.py', ''),
  'MFM': ('mfm.py', ''),
  'MFM with Com/RCom': ('mfm.py', 'filter=com_rcom'),
  'super-resolution': ('restoration.py', 'task=super_resolution'),
  'deblur': ('restoration.py', 'task=deblur'),
  'denoise': ('restoration.py', 'task=denoise'),
  'wavelet MIM, after WaMIM': ('wavelet_mim.py', ''),
  'MAE': ('mae.py', ''),
  'DINO': ('dino.py', ''),
  'iBOT': ('ibot.py', ''),
  'FOLK, ResNet-18': ('resnet50.py', ''),
  'MFM, ResNet-18': ('mfm.py', 'model=resnet50'),
}


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--path', required=True, help='CIFAR-10 as train/<class>/*.jpg and test/<class>/*.jpg')
  add('--steps', type=int, default=300, help='of each run (default 300)')
  add('--seed', type=int, default=0, help='of each run (default 0)')
  add('--only', default='', help='names of methods, separated by semicolons (default all)')
  add('--out', type=pathlib.Path, required=True, help='JSON, written anew after each method')
  add('--workdir', type=pathlib.Path, required=True, help='holds a workdir for each method')
  add('--figure', type=pathlib.Path, help='PNG (default docs/figures/<name of the JSON>.png)')
  add('--redraw', action='store_true', help='only the figure and the table, from the JSON')
  flags = parser.parse_args()
  flags.figure = flags.figure or report.ROOT / 'docs' / 'figures' / f'{flags.out.stem}.png'
  flags.methods = flags.only.split(';') if flags.only else list(METHODS)
  for name in flags.methods:
    if name not in METHODS:
      raise config_lib.unknown('method', name, METHODS)
  return flags


def recipe(name: str, path: str) -> str:
  """What --config is for a method."""
  file, arg = METHODS[name]
  own = '' if file == 'cifar10.py' else 'cifar10'  # The one recipe that needs no such argument.
  items = ','.join(filter(None, (own, arg, config_lib.format_arg({'path': path}))))
  return f'configs/{file}:{items}'


def run(flags: argparse.Namespace, name: str) -> dict[str, Any]:
  """Trains one method and returns its row."""
  workdir = flags.workdir / ''.join(c if c.isalnum() else '_' for c in name.lower())
  config = recipe(name, flags.path)
  # Equal steps, and no evaluation on the way: only its start and end are compared.
  extra = [f'--config.total_steps={flags.steps}', '--config.eval_every=0']
  ran = runs.train(config, workdir, flags.seed, extra)
  settings = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  about = {'method': name, 'config': config, 'seed': flags.seed}
  about |= {key: settings['evaluation'][key] for key in ('which', 'feature')}
  return about | runs.read(workdir) | ran | {'date': report.context()['date']}


def show(rows: list[dict[str, Any]]) -> None:
  header = ('method', 'kNN before', 'after', 'gain', 'reconstruction', 'images/s', 'GiB')
  cells = [
    (
      row['method'],
      f'{row["knn_before"]:.2%}',
      f'{row["knn_after"]:.2%}',
      f'{100 * row["gain"]:+.2f}',
      '-' if row['reconstruction_relative'] is None else f'{row["reconstruction_relative"]:.1%}',
      row['images_per_second'],
      row['peak_memory_gib'],
    )
    for row in rows
  ]
  print(report.table(header, cells))


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """kNN before and after, a line a method."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = result['rows'][::-1]
  places = range(len(rows))
  figure, knn = plt.subplots(figsize=(8, 4.6), constrained_layout=True)
  for place, row in zip(places, rows, strict=True):
    before, after = 100 * row['knn_before'], 100 * row['knn_after']
    knn.plot([before, after], [place, place], color='C0' if after > before else 'C3', linewidth=2)
  knn.scatter([100 * row['knn_before'] for row in rows], places, color='grey', label='random init')
  knn.scatter([100 * row['knn_after'] for row in rows], places, color='C0', label='after')
  knn.set(xlabel='kNN top-1, %', yticks=list(places), yticklabels=[row['method'] for row in rows])
  knn.legend(fontsize='small')
  machine, steps = result['machine'], result['rows'][0]['steps']
  figure.suptitle(
    f'CIFAR-10 (JPEG), {steps} steps each, one seed: smoke scale. '
    f'{machine["cores"]} cores of {machine["processor"]}, {result["date"][:10]}',
    fontsize='medium',
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def load(flags: argparse.Namespace) -> dict[str, Any]:
  """The JSON of an earlier start, or a fresh one; one of another length or seed is refused."""
  asked = {'steps': flags.steps, 'seed': flags.seed}
  if not flags.out.exists():
    return {'what': 'Every method for equally many steps', 'asked': asked, 'rows': []}
  result = report.read_json(flags.out)
  if result['asked'] != asked and not flags.redraw:
    raise UserError(
      f'{flags.out} holds {result["asked"]}, not {asked}: name another --out, or remove it'
    )
  return result


def main() -> None:
  flags = parse()
  result = load(flags)
  os.environ['GLIBC_TUNABLES'] = report.KEEP_MEMORY
  rows = {row['method']: row for row in result['rows']}
  for name in [] if flags.redraw else flags.methods:
    if name in rows:
      print(f'{name} stands in {flags.out}: skipped')
      continue
    print(f'{name}: {recipe(name, flags.path)}', flush=True)
    rows[name] = run(flags, name)
    result['rows'] = [rows[key] for key in METHODS if key in rows]
    result = result | report.context()
    report.write_json(flags.out, result)
  if not rows:
    raise UserError(f'{flags.out} holds no finished method: run this without --redraw first')
  show(result['rows'])
  draw(result, flags.figure)
  print(f'written to {flags.out} and {flags.figure}')


if __name__ == '__main__':
  report.main(main)
