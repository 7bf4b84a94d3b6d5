"""Curves of a run's metrics as inline SVG, in the page's own colours: they follow its light and dark.

Shape letters: N points of a curve.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from folk_jax.report.markup import Markup, number, tag

# In the viewBox, which a page shows at about its own size: text stays as large as it is written.
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24
_MOST_POINTS = 240
_STRIPS = 60  # Places that answer a pointer with the numbers there.


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric of a chart: what the page calls it, its key in the metrics, whether its axis is in per cent."""

  label: str
  key: str


@dataclasses.dataclass(frozen=True)
class Chart:
  """Curves that share an axis.

  Attributes:
    title: of the chart.
    curves: as many as are in the metrics are drawn.
    caption: one sentence: what to look for.
    percent: whether the values are shares in [0, 1], shown in per cent.
  """

  title: str
  curves: tuple[Curve, ...]
  caption: str
  percent: bool = False


def _of(title: str, caption: str, percent: bool = False, **curves: str) -> Chart:
  made = tuple(Curve(label.replace('_', ' '), key) for label, key in curves.items())
  return Chart(title, made, caption, percent)


CHARTS = (
  _of(
    'Loss',
    'The total should fall and level off; a part that stays flat from the start is not being learned.',
    total='train/loss',
    reconstruction='train/loss_reconstruction',
    distillation='train/loss_distillation',
    patches='train/loss_patch',
  ),
  _of(
    'Loss by wavelet level',
    'Each level of the wavelet transform has a loss of its own; level 1 is the finest.',
    **{f'level_{n}': f'train/loss_level_{n}' for n in range(1, 7)},
  ),
  _of(
    'Accuracy on held-out images',
    'Measured during the run on images it never trained on: a rising line means features that tell classes apart.',
    percent=True,
    kNN='eval/knn_top1',
    kNN_top_5='eval/knn_top5',
    top_1='eval/top1',
    top_5='eval/top5',
    linear='eval/linear_cached_top1',
    pixels='eval/pixel_accuracy',
    mIoU='eval/miou',
  ),
  _of(
    'Reconstruction of held-out images',
    'The network has learned to rebuild what was taken where its error lies below that of guessing the mean.',
    network='eval/reconstruction',
    guessing_the_mean='eval/reconstruction_of_mean',
  ),
  _of(
    'Teacher temperature',
    'The lower it is, the more sharply the teacher decides; it follows the schedule of the configuration.',
    teacher='schedule/teacher_temperature',
  ),
  _of(
    'Entropy of the answers',
    'As a share of the largest there can be: near 100 % the teacher says the same of everything, near 0 % of the mean '
    'all images get one answer.',
    percent=True,
    teacher='train/teacher_entropy',
    mean_over_images='train/teacher_entropy_of_mean',
    student='train/student_entropy',
  ),
  _of(
    'Effective rank of the features',
    'In how many directions the features of a batch differ: falling to 1 would be collapse.',
    features='train/effective_rank',
  ),
  _of(
    'Agreement of student and teacher',
    'How often the student names the same prototype as the teacher does for the other view.',
    percent=True,
    agreement='train/agreement',
  ),
  _of(
    'Learning rate',
    'Warm-up, then the decay that the configuration asks for.',
    learning_rate='train/learning_rate',
  ),
  _of(
    'Gradient norm',
    'Spikes mean unstable steps; a line near 0 means that nothing is learned any more.',
    gradient='train/gradient_norm',
  ),
  _of(
    'Throughput',
    'Images a second in training, without evaluations and saves; dips point at the machine, not at the method.',
    images_a_second='train/images_per_second',
  ),
  _of(
    'Where the time goes',
    'Waiting for data should stay near 0 %; goodput is the share of the whole time that went into training steps.',
    percent=True,
    waiting_for_data='train/data_wait',
    goodput='train/goodput',
  ),
)  # fmt: skip


def charts(metrics: Sequence[Mapping[str, float]]) -> list[Markup]:
  """A card for each chart that the metrics have something for: lines as `read_metrics` returns them."""
  cards = []
  for chart in CHARTS:
    lines = [(curve.label, _points(metrics, curve.key)) for curve in chart.curves]
    # A loss of one part is that part: one line says it.
    before = [[other for _, other in lines[:i]] for i in range(len(lines))]
    lines = [
      line for line, others in zip(lines, before, strict=True) if line[1] and line[1] not in others
    ]
    if lines:
      cards.append(_card(chart, lines))
  return cards


def _points(metrics: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
  """(step, value) of a metric; of many, the means of neighbours."""
  points = [(line['step'], line[key]) for line in metrics if key in line]
  size = -(-len(points) // _MOST_POINTS)
  if size <= 1:
    return points
  groups = [points[i : i + size] for i in range(0, len(points), size)]
  return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _card(chart: Chart, lines: list[tuple[str, list[tuple[float, float]]]]) -> Markup:
  legend = [
    tag('span', tag('i', class_=f'key c{i}'), label, class_='entry')
    for i, (label, _) in enumerate(lines)
  ]
  return tag(
    'figure',
    tag('h3', chart.title),
    tag('div', legend, class_='legend') if len(lines) > 1 else None,
    _svg(chart, lines),
    tag('figcaption', chart.caption),
    class_='chart',
  )


def _svg(chart: Chart, lines: list[tuple[str, list[tuple[float, float]]]]) -> Markup:
  finite = [point for _, points in lines for point in points if math.isfinite(point[1])]
  last = max(step for _, points in lines for step, _ in points)
  first = min(step for _, points in lines for step, _ in points)
  values = [value for _, value in finite] or [0.0]
  y_ticks = ticks(min(values), max(values), 4)
  low, high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))
  x_ticks = [tick for tick in ticks(first, last, 4) if first <= tick <= last]
  across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

  def x_of(step: float) -> float:
    return _LEFT + across * (step - first) / max(last - first, 1)

  def y_of(value: float) -> float:
    return _TOP + down * (1 - (value - low) / max(high - low, 1e-300))

  def said(value: float) -> str:
    return f'{number(100 * value)} %' if chart.percent else number(value)

  parts = []
  for tick in y_ticks:
    y = y_of(tick)
    parts.append(
      tag('line', x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f'{y:.1f}', y2=f'{y:.1f}', class_='grid')
    )
    parts.append(tag('text', said(tick), x=_LEFT - 6, y=f'{y + 4:.1f}', class_='y'))
  for tick in x_ticks:
    near_end = x_of(tick) > _WIDTH - 30
    anchor = 'end' if near_end else 'middle'
    x = _WIDTH - _RIGHT + 6 if near_end else x_of(tick)
    parts.append(
      tag('text', number(tick), x=f'{x:.1f}', y=_HEIGHT - 6, text_anchor=anchor, class_='x')
    )
  for i, (_, points) in enumerate(lines):
    for stretch in _stretches(points):
      path = 'M' + 'L'.join(f'{x_of(step):.1f} {y_of(value):.1f}' for step, value in stretch)
      parts.append(tag('path', d=path, class_=f'line c{i}'))
      if len(stretch) <= 12:
        parts += [
          tag('circle', cx=f'{x_of(step):.1f}', cy=f'{y_of(value):.1f}', r=3, class_=f'dot c{i}')
          for step, value in stretch
        ]
  parts += _strips(lines, x_of, said)
  name = f'{chart.title} over steps {number(first)} to {number(last)}: ' + '; '.join(
    f'{label} {said(points[0][1])} at first, {said(points[-1][1])} at last'
    for label, points in lines
  )
  return tag('svg', *parts, viewBox=f'0 0 {_WIDTH} {_HEIGHT}', role='img', aria_label=name)


def _strips(lines, x_of, said) -> list[Markup]:
  """Invisible columns over the curves whose tooltips hold the numbers there."""
  steps = sorted({step for _, points in lines for step, _ in points})
  steps = steps[:: -(-len(steps) // _STRIPS)]
  by_step = [(label, dict(points)) for label, points in lines]
  edges = [x_of(steps[0])]
  edges += [(x_of(a) + x_of(b)) / 2 for a, b in zip(steps, steps[1:], strict=False)]
  edges.append(x_of(steps[-1]))
  strips = []
  for step, left, right in zip(steps, edges[:-1], edges[1:], strict=True):
    found = [f'{label} {said(values[step])}' for label, values in by_step if step in values]
    text = f'step {number(step)}: ' + ', '.join(found)
    width = max(right - left, 1.5)
    strips.append(
      tag('rect', tag('title', text), x=f'{left:.1f}', y=_TOP, width=f'{width:.1f}',
          height=_HEIGHT - _TOP - _BOTTOM, class_='strip')
    )  # fmt: skip
  return strips


def _stretches(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
  """The points between those that are no numbers."""
  found: list[list[tuple[float, float]]] = [[]]
  for point in points:
    if math.isfinite(point[1]):
      found[-1].append(point)
    elif found[-1]:
      found.append([])
  return [stretch for stretch in found if stretch]


def ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers that reach from `low` or below it to `high` or above it."""
  if not high > low:
    margin = abs(low) / 2 or 0.5
    low, high = low - margin, high + margin
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  # Rounded to the step's own digits: 0.30000000000000004 is no round number.
  digits = max(0, 2 - math.floor(math.log10(step)))
  return [round(i * step, digits) for i in range(first, last + 1)]
