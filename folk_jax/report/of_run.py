"""From a run's workdir to its page: this file joins the rooms, and reads nothing but the run's files and images.

Shape letters: N images, H, W pixels, C channels.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from folk_jax import checkpoint, schedules
from folk_jax import config as config_lib
from folk_jax.data.views import random_view
from folk_jax.interop import timm
from folk_jax.objectives.base import statistics_of
from folk_jax.report import curves, figures, images, page, photographs, rebuild, saved
from folk_jax.report.markup import number
from folk_jax.report.networks import Network, nearest
from folk_jax.report.photographs import Photographs
from folk_jax.signal.augment import Augmentation, augment
from folk_jax.train import initial, run
from folk_jax.train.metrics import read_metrics

_SHOWN, _REBUILT, _WIDE, _QUERIES, _NEIGHBOURS = 3, 4, 8, 6, 5
# The bank of neighbours: as many training images as a CPU embeds in a minute or two, within these bounds.
_BANK, _BANK_COST_ON_CPU, _BATCH = (128, 2000), 6e12, 64
_METHODS = {
  'folk': 'FOLK',
  'mfm': 'MFM',
  'super_resolution': 'Super-resolution',
  'deblur': 'Deblurring',
  'denoise': 'Denoising',
  'wavelet_mim': 'Wavelet MIM',
  'mae': 'MAE',
  'dino': 'DINO',
  'ibot': 'iBOT',
  'supervised': 'Fine-tuning',
  'linear_probe': 'Linear probe',
  'segment': 'Segmentation',
}


@dataclasses.dataclass(frozen=True)
class Weights:
  """A checkpoint's trees: of the student, of the teacher ({} where the run keeps none), and the objective's state."""

  directory: str
  step: int
  about: Mapping[str, Any]
  student: Mapping[str, Any]
  teacher: Mapping[str, Any]
  extra: Mapping[str, Any]


def report(
  workdir: str,
  out: str | None = None,
  *,
  which: str = 'teacher',
  best: bool = False,
  results: Sequence[str] = (),
  say: Callable[[str], None] = lambda line: None,
) -> str:
  """Writes a run's page.

  Args:
    workdir: the run's folder, of a run that is over or of one that isn't; or of evaluations, with `results.json`.
    out: the file; `<workdir>/report.html` by default.
    which: whose features are shown, 'teacher' (where the run has one) or 'student'.
    best: whether to take the best checkpoint instead of the last.
    results: files of evaluations of this run, besides those in its workdir.
    say: called with a line before each piece of work.

  Returns:
    The file's path.

  Raises:
    UserError: no run there, a damaged file, or a file that can't be written.
  """
  folder = epath.Path(workdir).expanduser()
  out = str(out or folder / 'report.html')
  notices: list[str] = []
  found = saved.read_results(folder, results, notices)
  if not (folder / 'config.json').exists() and found:
    section = figures.evaluation_section([], found)
    page.write(
      out, page.render(f'Evaluations in {folder.name}', str(folder), {}, [section], notices)
    )
    return out
  config = saved.read_config(folder)
  metrics = read_metrics(str(folder))
  say(f'{len(metrics)} lines of metrics')
  weights = _weights(folder, config, best, say)
  count = weights.about['data']['images'] if weights and 'data' in weights.about else None
  total = _total_steps(config, count)
  _add_temperature(metrics, config, count)
  steps = max([line['step'] for line in metrics] + [weights.step if weights else 0])
  notices[:0] = _notices(steps, total, weights, best)

  sections = []
  if cards := curves.charts(metrics):
    sections.append(figures.curves_section(cards))
  if weights:
    sections += _pictures(config, weights, which, metrics, notices, say)
  if evaluated := figures.evaluation_section(metrics, found):
    sections.append(evaluated)
  machine = saved.read_machine(folder)
  sections.append(figures.configuration_section(config_lib.flatten(config.to_dict()), machine))
  name = _METHODS.get(config.objective.name, config.objective.name)
  title = f'{name}, {_model(config)}: {folder.absolute().name}'
  facts = _facts(config, metrics, steps, total, machine, count)
  made = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
  foot = f"Made on {made} from the files of {folder}. All numbers are the run's own."
  lead = f'{_date(folder)}, {number(steps)} steps, on {_data_name(config)}.'
  page.write(out, page.render(title, lead, facts, sections, notices, foot))
  return out


def _weights(folder, config, best: bool, say) -> Weights | None:
  """The checkpoint's trees; None for a run that hasn't saved any yet."""
  directory = folder / (initial.BEST if best else initial.LAST)
  if best and not directory.is_dir():
    raise initial.no_best(folder)
  if not directory.is_dir() or not any(one.name.isdigit() for one in directory.iterdir()):
    return None
  say('reading the checkpoint')
  student, about, step = checkpoint.read_subtree(str(directory), ('params',))
  teacher = {}
  if config.teacher.enabled:
    teacher, _, _ = checkpoint.read_subtree(str(directory), ('opt_state', '**', 'teacher'), step)
  extra = {}
  if timm.statistics_shapes(student['backbone']):
    extra, _, _ = checkpoint.read_subtree(str(directory), ('extra',), step)
  return Weights(str(directory), step, about, student, teacher, extra)


def _total_steps(config, images: int | None) -> int | None:
  if config.total_steps:
    return config.total_steps
  return max(1, round(config.epochs * images / config.batch_size)) if images else None


def _add_temperature(metrics, config, images: int | None) -> None:
  """The teacher's temperature at each logged step, by the schedule of the configuration."""
  fields = ('teacher_temperature_start', 'teacher_temperature', 'teacher_temperature_epochs')
  if not images or not all(field in config.objective for field in fields):
    return
  start, end, epochs = (config.objective[field] for field in fields)
  ramp = schedules.linear_then_constant(start, end, round(epochs * images / config.batch_size))
  for line in metrics:
    if 'train/loss' in line:
      line['schedule/teacher_temperature'] = float(ramp(line['step'] - 1))


def _notices(steps: int, total: int | None, weights: Weights | None, best: bool) -> list[str]:
  notices = []
  if total is None or steps < total:
    of = f' of {number(total)}' if total else ''
    notices.append(f'This run is unfinished: it stands at step {number(steps)}{of}.')
  if weights is None:
    notices.append(
      'It has saved no checkpoint yet, so there are no pictures of what its network does.'
    )
  elif best or weights.step < steps:
    which = 'best' if best else 'newest'
    notices.append(f'Pictures are of the {which} checkpoint, step {number(weights.step)}.')
  return notices


def _model(config) -> str:
  model = config.model
  if model.name == 'vit':
    return f'ViT of {model.depth} blocks, width {model.width}, patch {model.patch}'
  return f'{"ResNet" if model.name == "resnet" else model.name}-{model.depth}, width {model.width}'


def _data_name(config) -> str:
  words = {'embedded': 'embedded photographs', 'synthetic': 'synthetic images'}
  source = config.data.source
  return words.get(source) or config.data.name or config.data.path or source


def _date(folder: epath.Path) -> str:
  file = folder / 'metrics.jsonl'
  written = (file if file.exists() else folder / 'config.json').stat().mtime
  return datetime.datetime.fromtimestamp(written, datetime.UTC).strftime('%-d %B %Y')


def _facts(
  config, metrics, steps: int, total: int | None, machine, images: int | None
) -> dict[str, Any]:
  last = {key: value for line in metrics for key, value in line.items()}
  facts = {
    'Steps': f'{number(steps)} of {number(total)}' if total else number(steps),
    'Batch': f'{number(config.batch_size)} images of {config.image_size} px',
  }
  if images:
    facts['Training images'] = number(images)
  if 'train/loss' in last:
    facts['Last loss'] = number(last['train/loss'])
  for key, name in (('eval/knn_top1', 'kNN top-1'), ('eval/top1', 'Top-1'), ('eval/miou', 'mIoU')):
    if key in last:
      facts[f'{name}, held out'] = f'{last[key]:.1%}'
  if 'train/images_per_second' in last:
    facts['Throughput'] = f'{number(round(last["train/images_per_second"], 1))} images/s'
  if 'devices' in machine:
    facts['Machine'] = machine['devices']
  return facts


def _pictures(config, weights, which, metrics, notices, say) -> Iterator[page.Section]:
  """The sections that take images or a network, as far as they apply; what is missing is said in `notices`."""
  photos = photographs.open_photographs(run.data_settings(config), notices)
  settings = config.objective.to_dict()
  few = photos.chosen(_SHOWN)
  if chosen := rebuild.filter_of(settings):
    say('filtered views')
    yield figures.filters_section(few, chosen)
  say('views')
  yield _views(config, photos, few, settings)
  student = _network(config, weights, 'student', statistics_of(weights.extra, 'student'))
  say('reconstructions')
  few = photos.chosen(_REBUILT)
  image_NHWC = np.stack([photo.unit_HWC for photo in few])
  if found := rebuild.rebuild(student, weights.student, settings, image_NHWC):
    yield figures.rebuilt_section(few, found, *_errors(metrics, weights.step))
  say('patches and attention')
  network = _judged(config, weights, which)
  yield figures.patches_section(photos.chosen(_WIDE), network)
  say('nearest neighbours')
  yield _neighbours(config, photos, network, say)


def _errors(metrics, step: int) -> tuple[float | None, float | None]:
  """Of the reconstructions of a step's weights, and of guessing the mean; None where they weren't measured then."""
  then = {key: value for line in metrics if line['step'] == step for key, value in line.items()}
  return then.get('eval/reconstruction'), then.get('eval/reconstruction_of_mean')


def _network(config, weights: Weights, which: str, statistics: Any) -> Network:
  """In float32 and with plain attention, which run on any device."""
  plain = config.copy_and_resolve_references()
  with plain.unlocked():
    plain.model.dtype = 'float32'
    if 'attention' in plain.model:
      plain.model.attention = 'xla'
  tree = weights.teacher if which == 'teacher' else weights.student
  params = jax.tree.map(jnp.asarray, tree['backbone'])
  mean, std = tuple(config.data.mean), tuple(config.data.std)
  return Network(run.make_backbone(plain), params, statistics, mean, std, which)


def _judged(config, weights: Weights, which: str) -> Network:
  which = which if weights.teacher else 'student'
  statistics = {}
  if timm.statistics_shapes(weights.student['backbone']):
    statistics = initial.read_statistics(weights.directory, which, weights.step)
  return _network(config, weights, which, statistics)


def _views(config, photos: Photographs, few, settings) -> page.Section:
  """The run's own views of photographs, and below each what the student gets of it."""
  how = run.data_settings(config)
  names = sorted(config.views)
  rng = np.random.default_rng(0)
  kinds = [
    (f'View {i + 1}', config.image_size, view, run.from_config(Augmentation, config.views[name]))
    for i, (name, view) in enumerate(zip(names, how.views, strict=True))
  ]
  if how.local_views:
    local = how.local_views
    kinds.append(
      ('Small crop', local.size, local.view, run.from_config(Augmentation, config.local_views))
    )
  chosen, hides = rebuild.filter_of(settings), ''
  rows = []
  for row, photo in enumerate(few):
    cells = []
    for place, (label, size, view, augmentation) in enumerate(kinds):
      cut_HWC = random_view(photos.raw(row), size, view, how.interpolation, rng)
      key = jax.random.split(jax.random.fold_in(jax.random.key(1), len(kinds) * row + place), 1)
      unit_1HWC = np.asarray(
        _augmented(augmentation)(jnp.asarray(cut_HWC, jnp.float32)[None] / 255.0, key)
      )
      pictures = [page.Picture(images.to_uint8(unit_1HWC[0]), f'{label} of {photo.name}')]
      if size == config.image_size:
        hidden_1HWC, hides = _hidden(config, settings, chosen, unit_1HWC, key, row)
        if hidden_1HWC is not None:
          shown_HWC = images.shown(hidden_1HWC[0], unit_1HWC[0])
          pictures.append(page.Picture(shown_HWC, f'what the student gets of {label}'))
      cells.append(page.Cell(tuple(pictures), label))
    rows.append((photo, cells))
  return figures.views_section(rows, hides)


@functools.cache
def _augmented(settings: Augmentation) -> Callable[..., jax.Array]:
  return jax.jit(lambda image_BHWC, keys_B: augment(image_BHWC, keys_B, settings))


def _hidden(config, settings, chosen, unit_1HWC, key, seed) -> tuple[np.ndarray | None, str]:
  """What the student gets of a view, and the sentence for it; None where it gets the view."""
  if chosen:
    filtered_1HWC, _ = chosen(jnp.asarray(unit_1HWC), key)
    return np.asarray(filtered_1HWC), 'Below each view is what the filter leaves the student of it.'
  patch = config.model.patch if 'patch' in config.model else 0
  hidden = rebuild.hidden_patches(unit_1HWC, settings, patch, seed) if patch else None
  if hidden is None:
    return None, ''
  return hidden[0], 'Below each view are the patches that the student sees.'


def _neighbours(config, photos: Photographs, network: Network, say) -> page.Section:
  feature = config.evaluation.feature
  least, most = _BANK
  affordable = most if jax.default_backend() != 'cpu' else int(_BANK_COST_ON_CPU / network.cost)
  bank = photos.bank(min(most, max(least, affordable)))
  embed = network.feature(feature)
  rows = []
  for first in range(0, len(bank), _BATCH):
    if first and first % (8 * _BATCH) == 0:
      say(f'nearest neighbours: {first} of {len(bank)} training images')
    part = [bank.image(i) for i in range(first, min(first + _BATCH, len(bank)))]
    # Always the same shape: compiled once.
    padded = part + [part[-1]] * (_BATCH - len(part))
    rows.append(embed(np.stack(padded))[: len(part)])
  queries = photos.chosen(_QUERIES)
  padded = figures.stack((queries * _BATCH)[:_BATCH])
  order_QK, similarity_QK = nearest(
    embed(padded)[: len(queries)], np.concatenate(rows), _NEIGHBOURS
  )
  found = [
    figures.Neighbours(query, [bank.photo(int(i)) for i in order_K], similarity_K.tolist())
    for query, order_K, similarity_K in zip(queries, order_QK, similarity_QK, strict=True)
  ]
  return figures.neighbours_section(found, len(bank), network.which, feature, photos.stand_in)
