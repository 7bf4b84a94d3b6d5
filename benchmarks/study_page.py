"""Writes docs/study.md's tables and figures, and README's, from benchmarks/results/study_*.json: none is typed.

  python benchmarks/study_page.py

Only what stands between two marks of a name is replaced; the words around it are written by hand. What has not been
run says so, with its command.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import report
from measured_tables import cells
from studies import STUDIES, Study

_RESULTS = report.ROOT / 'benchmarks' / 'results'
_PAGE = report.ROOT / 'docs' / 'study.md'
_README = report.ROOT / 'README.md'
_FIGURES = report.ROOT / 'docs' / 'figures'
_SHORT = 'cpu'  # The study whose table at equal epochs README shows in short.

# Column -> (part, score, factor to percent). The first score of a part that is there counts.
_COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
  'kNN': ('frozen', ('knn/top1_k20',)),
  'linear': ('frozen', ('linear_cached/top1',)),
  '1-shot': ('frozen', ('low_shot/1_images_a_class',)),
  '5-shot': ('frozen', ('low_shot/5_images_a_class',)),
  '10-shot': ('frozen', ('low_shot/10_images_a_class',)),
  '1 %': ('frozen', ('low_shot/1_percent',)),
  '10 %': ('frozen', ('low_shot/10_percent',)),
  'fine-tuned': ('finetune', ('finetune/top1',)),
  'error on corruptions': ('corruptions', ('robustness/linear_cached/error_corruptions_mean',)),
}
_DRAWN = ('kNN', 'linear', 'fine-tuned', 'error on corruptions')
_VALIDATED = {
  'kNN': ('train', ('knn_top1',)),
  'linear': ('train', ('linear_cached_top1',)),
}


def columns(study: Study) -> Mapping[str, tuple[str, tuple[str, ...]]]:
  return {k: v for k, v in _COLUMNS.items() if v[0] in study.parts} if study.parts else _VALIDATED


def score(row: Mapping[str, Any], column: tuple[str, tuple[str, ...]]) -> float | None:
  part, names = column
  found = row['parts'].get(part, {}).get('scores', {})
  return next((100 * found[name] for name in names if name in found), None)


def spread(values: Sequence[float]) -> str:
  """Mean and sample standard deviation of the seeds that are there."""
  if not values:
    return 'not run'
  if len(values) == 1:
    return f'{values[0]:.1f} (1 seed)'
  return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'


def table(
  study: Study, rows: Sequence[Mapping[str, Any]], budget: str, only: Sequence[str] = ()
) -> str:
  """Methods down, evaluations across: all, or those named."""
  asked = {
    title: column for title, column in columns(study).items() if title in (only or columns(study))
  }
  header = ['method', 'steps', 'GFLOP an image', *asked]
  lines = []
  for method in study.methods:
    # What equal compute is measured by, and what has no length, stand there as they are at equal epochs.
    of = 'epochs' if _idle(study, method, budget) else budget
    own = [r for r in rows if r['method'] == method.name and r['budget'] == of]
    work = [f'{own[0]["steps"]:,}', f'{own[0]["gflop_an_image"]:.3g}'] if own else ['', '']
    values = [
      [v for v in (score(row, column) for row in own) if v is not None] for column in asked.values()
    ]
    lines.append([method.name, *work, *(spread(value) for value in values)])
  return cells(header, lines)


def paired(study: Study, rows: Sequence[Mapping[str, Any]], budget: str = 'epochs') -> str:
  """What each method has over its reference with the same seed: mean, spread, and in how many seeds it is better."""
  asked = {title: column for title, column in columns(study).items() if title in _DRAWN}
  by_key = {(row['method'], row['budget'], row['seed']): row for row in rows}
  seeds = sorted({row['seed'] for row in rows})
  by_name = {method.name: method for method in study.methods}
  lines = []
  for method in study.methods:
    base = by_name.get(method.reference)
    if base is None:
      continue
    own, other = ('epochs' if _idle(study, one, budget) else budget for one in (method, base))
    line = [method.name]
    for title, column in asked.items():
      pairs = [
        (by_key.get((method.name, own, seed)), by_key.get((base.name, other, seed)))
        for seed in seeds
      ]
      scores = [tuple(score(row, column) if row else None for row in pair) for pair in pairs]
      gains = [ours - theirs for ours, theirs in scores if None not in (ours, theirs)]
      if not gains:
        line.append('')
        continue
      lower = title.startswith('error')
      better = sum(gain < 0 if lower else gain > 0 for gain in gains)
      error = f' ± {statistics.stdev(gains):.1f}' if len(gains) > 1 else ''
      line.append(f'{statistics.mean(gains):+.1f}{error}, {better} of {len(gains)}')
    if any(line[1:]):
      lines.append(line)
  return cells(['method', *asked], lines) if lines else ''


def draw(study: Study, rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """A panel an evaluation, a line a method: a dot a seed and a bar for the mean; the random network as a dotted line.

  Filled at equal epochs, hollow and a little lower at equal compute.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  asked = {
    title: column
    for title, column in columns(study).items()
    if title in _DRAWN and any(score(row, column) is not None for row in rows)
  }
  there = {row['method'] for row in rows}
  names = [method.name for method in study.methods if method.name in there][::-1]
  down = -(-len(asked) // 2)
  figure, panels = plt.subplots(
    down,
    min(2, len(asked)),
    figsize=(10, down * (1.0 + 0.3 * len(names))),
    sharey=True,
    squeeze=False,
    constrained_layout=True,
  )
  for axis in panels.flat[len(asked) :]:
    axis.set_axis_off()
  for axis, (title, column) in zip(panels.flat, asked.items(), strict=False):
    for budget, lower, face in (('epochs', 0.0, None), ('compute', 0.25, 'white')):
      for place, name in enumerate(names):
        own = [row for row in rows if (row['method'], row['budget']) == (name, budget)]
        values = [value for row in own if (value := score(row, column)) is not None]
        if not values:
          continue
        random = name.startswith('random') or name == 'none'
        colour, height = 'grey' if random else 'C0', [place - lower] * len(values)
        axis.scatter(
          values,
          height,
          s=16,
          facecolors=face or colour,
          edgecolors=colour,
          linewidths=0.8,
          zorder=3,
        )
        mean = statistics.mean(values)
        axis.plot([mean] * 2, [place - lower - 0.2, place - lower + 0.2], color=colour, linewidth=2)
        if random:
          axis.axvline(mean, color='grey', linestyle=':', linewidth=1)
    unit = '%, lower is better' if title.startswith('error') else 'top-1 %'
    axis.set(title=f'{title}, {unit}', yticks=range(len(names)), yticklabels=names)
    axis.grid(axis='x', alpha=0.3)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def section(study: Study) -> str:
  """A study's tables, or what to run for them."""
  file = _RESULTS / f'study_{study.name}.json'
  command = f'python benchmarks/study.py --study={study.name} --path=DIR'
  head = [f'## {study.title}', study.about]
  if not file.exists():
    rows = len(study.methods) * len(study.seeds)
    return '\n\n'.join(
      [*head, f'**Not run** ({rows} rows at equal epochs). The command is `{command}`.']
    )
  result = report.read_json(file)
  rows = result['rows']
  figure = _FIGURES / f'study_{study.name}.png'
  draw(study, rows, figure)
  parts = [*head]
  hollow = ', hollow at equal compute' * any(row['budget'] == 'compute' for row in rows)
  parts.append(f'![{study.title}: a dot a seed, a bar for the mean{hollow}](figures/{figure.name})')
  budgets = dict.fromkeys(budget for budget, _ in study.stages)
  for budget in budgets:
    if any(row['budget'] == budget for row in rows):
      parts += [f'### Equal {budget}', table(study, rows, budget)]
    else:
      parts += [f'### Equal {budget}', f'Not run. The command is `{command} --budgets={budget}`.']
  words = 'the same network at random initialisation' if study.parts else 'FOLK as it is'
  for budget in budgets:
    if any(row['budget'] == budget for row in rows) and (gains := paired(study, rows, budget)):
      parts += [
        f'### Against {words}, same seed, equal {budget}',
        'Points, mean and standard deviation over seeds, and in how many seeds it is better.',
        gains,
      ]
  wanted = sum(
    len(study.seeds) * sum(1 for m in study.methods if not _idle(study, m, budget))
    for budget, _ in study.stages
  )
  there = sum(
    part in row['parts'] and row['seed'] in study.seeds
    for budget, part in study.stages
    for row in rows
    if row['budget'] == budget
  )
  rest = '' if there == wanted else f' The rest is not run: `{command}` goes on.'
  loads = [part['load_average'] for row in rows for part in row['parts'].values()]
  parts.append(
    f'{there} of {wanted} parts run, {_machine(result)}. Accuracies in percent, mean and standard '
    'deviation over seeds. The machine did other work '
    f'beside it (load {min(loads):.0f} to {max(loads):.0f}), so no times are given.{rest}'
  )
  return '\n\n'.join(parts)


def _idle(study: Study, method: Any, budget: str) -> bool:
  untrained = method.changes.get('optimizer.learning_rate') == 0.0
  return budget == 'compute' and (method is study.methods[0] or untrained)


def short() -> str:
  """What README shows of it."""
  study = STUDIES[_SHORT]
  file = _RESULTS / f'study_{study.name}.json'
  if not file.exists():
    return f'Not run: `python benchmarks/study.py --study={study.name} --path=DIR`.'
  result = report.read_json(file)
  seeds = sorted({row['seed'] for row in result['rows']})
  return '\n\n'.join(
    [
      f'**{study.title}**, equal epochs ({study.steps} steps of {study.batch_size} images), {len(seeds)} seeds, '
      'percent:',
      table(study, result['rows'], 'epochs', _DRAWN),
      f'{_machine(result)}. Smoke scale: what holds here need not hold for ImageNet.',
    ]
  )


def _machine(result: Mapping[str, Any]) -> str:
  machine = result['machine']
  return (
    f'{machine["device"].upper()} ({machine["processor"]}), {result["date"][:10]}, the last part at {result["commit"]} '
    f'(`python benchmarks/study.py --study={result["asked"]["study"]} --path=DIR`)'
  )


def main() -> None:
  report.between_marks(_PAGE, {study.name: section(study) for study in STUDIES.values()})
  report.between_marks(_README, {'study': short()})
  print(f'written to {_PAGE} and {_README}')


if __name__ == '__main__':
  report.main(main)
