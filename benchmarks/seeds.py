"""Runs a recipe for several seeds in turn, and keeps what each learned: rows, spread, figure.

  python benchmarks/seeds.py --config=configs/quickstart.py --seeds=0,1,2 \\
    --out=benchmarks/results/quickstart_cpu.json --workdir=runs/seeds_quickstart
  python benchmarks/seeds.py --config=configs/cifar10.py:path=DIR --seeds=0,1,2 \\
    --out=benchmarks/results/cifar10_cpu.json --workdir=runs/seeds_cifar10 -- --config.log_every=10

What follows `--` goes to folk_jax.main. Killed and started again with the same command, it goes on:
finished seeds stand in the JSON, an unfinished one resumes from its checkpoint. Every number comes
from a run's metrics.jsonl; kNN is that of `evaluation.knn_headline` at the last step.
"""

import argparse
import os
import pathlib
import statistics
from typing import Any

import report
import runs

from folk_jax.errors import UserError


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--config', required=True, help='recipe, as for folk_jax.main')
  add('--seeds', default='0,1,2', help='separated by commas (default 0,1,2)')
  add('--out', type=pathlib.Path, required=True, help='JSON, written anew after each seed')
  add('--workdir', type=pathlib.Path, required=True, help='holds a workdir for each seed')
  add('--figure', type=pathlib.Path, help='PNG (default docs/figures/<name of the JSON>.png)')
  add(
    '--keep-memory', action=argparse.BooleanOptionalAction, default=True, help='tune glibc malloc'
  )
  add('--title', help='of the figure (default the recipe)')
  add('--redraw', action='store_true', help='only the figure and the table, from the JSON')
  add('flags', nargs='*', metavar='-- FLAGS', help='further flags of folk_jax.main')
  flags = parser.parse_args()
  flags.figure = flags.figure or report.ROOT / 'docs' / 'figures' / f'{flags.out.stem}.png'
  try:
    flags.seeds = [int(seed) for seed in flags.seeds.split(',')]
  except ValueError:
    raise UserError(f'--seeds={flags.seeds}: give whole numbers separated by commas') from None
  return flags


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Mean, least and spread (sample standard deviation) over the seeds."""
  result: dict[str, Any] = {'seeds': len(rows)}
  for key in ('knn_before', 'knn_after', 'gain', 'reconstruction_relative'):
    values = [one[key] for one in rows if one[key] is not None]
    if values:
      spread = statistics.stdev(values) if len(values) > 1 else None
      result[key] = {'mean': statistics.mean(values), 'least': min(values), 'spread': spread}
  result['every_seed_above_its_start'] = all(one['gain'] > 0 for one in rows)
  return result


def show(rows: list[dict[str, Any]]) -> None:
  header = ('seed', 'kNN before', 'kNN after', 'reconstruction', 'train s', 'images/s', 'GiB')
  cells = [
    (
      one['seed'],
      f'{one["knn_before"]:.2%}',
      f'{one["knn_after"]:.2%}',
      '-' if one['reconstruction_relative'] is None else f'{one["reconstruction_relative"]:.1%}',
      one['train_seconds'],
      one['images_per_second'],
      one['peak_memory_gib'],
    )
    for one in rows
  ]
  print(report.table(header, cells))
  whole = summary(rows)
  line = f'kNN {whole["knn_before"]["mean"]:.2%} -> {whole["knn_after"]["mean"]:.2%}'
  if whole['gain']['spread'] is not None:
    line += f', gain {whole["gain"]["mean"]:+.2%} with a spread of {whole["gain"]["spread"]:.2%}'
  print(f'{line}; reconstruction is relative to predicting the mean')


def draw(rows: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
  """Three panels: kNN with each seed's random start, losses, reconstruction error."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  figure, (knn, loss, rebuilt) = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
  for number, one in enumerate(rows):
    colour = f'C{number}'
    steps = [evaluation['step'] for evaluation in one['evaluations']]
    top1 = [100 * evaluation['knn_top1'] for evaluation in one['evaluations']]
    knn.plot(steps, top1, 'o-', color=colour, markersize=3, label=f'seed {one["seed"]}')
    knn.axhline(top1[0], color=colour, linestyle=':', linewidth=1)
    for name, style in (('loss_reconstruction', '-'), ('loss_distillation', '--')):
      if name in one['curves']:
        label = name.removeprefix('loss_') if not number else None
        loss.plot(
          one['curves']['step'], one['curves'][name], style, color=colour, linewidth=1, label=label
        )
    share = [100 * e.get('reconstruction_relative', float('nan')) for e in one['evaluations']]
    rebuilt.plot(steps, share, 'o-', color=colour, markersize=3)
  knn.set(title='kNN top-1 (dotted: random initialisation)', xlabel='step', ylabel='%')
  loss.set(title='training losses', xlabel='step')
  rebuilt.axhline(100, color='grey', linestyle=':', linewidth=1)
  rebuilt.set(
    title='held-out reconstruction error', xlabel='step', ylabel='% of predicting the mean'
  )
  knn.legend(fontsize='small')
  loss.legend(fontsize='small')
  figure.suptitle(title, fontsize='medium')
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def load(flags: argparse.Namespace) -> dict[str, Any]:
  """The JSON of an earlier start, or a fresh one; another recipe's is refused."""
  recipe = {'config': flags.config, 'flags': flags.flags}
  if not flags.out.exists():
    return {'what': f'{flags.config} over seeds', 'recipe': recipe, 'rows': []}
  result = report.read_json(flags.out)
  if result.get('recipe') != recipe and not flags.redraw:
    raise UserError(
      f'{flags.out} holds {result.get("recipe")}, not {recipe}: name another --out, or remove it'
    )
  return result


def main() -> None:
  flags = parse()
  result = load(flags)
  if flags.keep_memory:
    os.environ['GLIBC_TUNABLES'] = report.KEEP_MEMORY
  rows = {one['seed']: one for one in result['rows']}
  for seed in [] if flags.redraw else flags.seeds:
    if seed in rows:
      print(f'seed {seed} stands in {flags.out}: skipped')
      continue
    workdir = flags.workdir / f'seed_{seed}'
    ran = runs.train(flags.config, workdir, seed, flags.flags)
    rows[seed] = {'seed': seed} | runs.read(workdir) | ran | {'date': report.context()['date']}
    result['rows'] = [rows[key] for key in sorted(rows)]
    result = result | report.context() | {'summary': summary(result['rows'])}
    report.write_json(flags.out, result)
  if not rows:
    raise UserError(f'{flags.out} holds no finished seed: run this without --redraw first')
  show(result['rows'])
  processor = result['machine']['processor']
  title = f'{flags.title or result["recipe"]["config"]}, {result["machine"]["cores"]} cores of {processor}'
  draw(result['rows'], f'{title}, {result["date"][:10]}', flags.figure)
  print(f'written to {flags.out} and {flags.figure}')


if __name__ == '__main__':
  report.main(main)
