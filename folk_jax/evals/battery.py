"""The robustness evaluation as a list of measures: which there are, by name, and what they add up to.

A measure is one pass over the images: clean, under an attack, or with a corruption at a severity. Each stands by
itself, so that an evaluation that was cut short goes on after the last.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence

from folk_jax.errors import UserError
from folk_jax.evals.results import Scores
from folk_jax.evals.robustness import (
  Accuracy,
  Corrupt,
  Perturbation,
  corruption_error,
  fgsm,
  pgd,
)
from folk_jax.signal.corruptions import CORRUPTIONS

CLEAN = 'clean'
SEVERITIES = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Battery:
  """What a classifier is put through.

  Attributes:
    attacks: names in `ATTACKS`.
    epsilon: how far an attack moves a value at most, of images in [0, 1].
    pgd_steps, pgd_step_size: of 'pgd'; a size of 0 is 2.5 epsilon / steps, which reaches any corner of the cube.
    corruptions: names in `signal.corruptions.CORRUPTIONS`.
    severities: of each corruption, from 1 to 5.

  Raises:
    UserError: on construction, for a field outside its range or a name that isn't known.
  """

  attacks: tuple[str, ...]
  epsilon: float
  pgd_steps: int
  pgd_step_size: float
  corruptions: tuple[str, ...]
  severities: tuple[int, ...]

  def __post_init__(self):
    for field, known in (
      ('attacks', ATTACKS),
      ('corruptions', CORRUPTIONS),
      ('severities', SEVERITIES),
    ):
      names = tuple(getattr(self, field))
      object.__setattr__(self, field, names)
      for name in names:
        if name not in known:
          listed = ', '.join(map(str, known))
          raise UserError(f'unknown config.robustness.{field} {name!r}. Known: {listed}.')
      if len(set(names)) < len(names):
        raise UserError(f'config.robustness.{field} {names} has a name twice: give each once.')
    if self.corruptions and not self.severities:
      raise UserError('config.robustness.severities is empty: give some of 1 to 5.')
    _ = self.measures  # Attacks check their numbers.

  @property
  def measures(self) -> dict[str, Perturbation | None]:
    """Perturbations by the measure's name: 'clean', an attack's, or 'corruption/severity'."""
    found: dict[str, Perturbation | None] = {CLEAN: None}
    found |= {name: ATTACKS[name](self) for name in self.attacks}
    found |= {
      f'{name}/{severity}': Corrupt(name, severity)
      for name in self.corruptions
      for severity in self.severities
    }
    return found


ATTACKS: Mapping[str, Callable[[Battery], Perturbation]] = types.MappingProxyType(
  {
    'fgsm': lambda battery: fgsm(battery.epsilon),
    'pgd': lambda battery: pgd(battery.epsilon, battery.pgd_steps, battery.pgd_step_size),
  }
)


def result(accuracy: Accuracy) -> Scores:
  """What is kept of a measure: shares, and how many images."""
  return {
    'top1': accuracy.top1,
    'top5': accuracy.top5,
    'calibration_error': accuracy.calibration.ece,
    'images': accuracy.count,
  }


def summarise(
  battery: Battery,
  found: Mapping[str, Scores],
  baseline: Mapping[str, Scores] | None = None,
) -> Scores:
  """Scores of one classifier, from the results of all its measures.

  Args:
    battery: which measures.
    found: `result` by the measure's name.
    baseline: the same of another classifier; see `read_baseline`.

  Returns:
    top1 and calibration_error of clean images, top1_<attack>, error_<corruption> (mean over severities),
    error_corruptions_mean; with a baseline also ce_<corruption> and mce, 1 where the two err alike.
  """
  clean = found[CLEAN]
  scores: Scores = {key: clean[key] for key in ('top1', 'top5', 'calibration_error')}
  scores |= {f'top1_{name}': found[name]['top1'] for name in battery.attacks}
  if not battery.corruptions:
    return scores
  against = baseline and {
    name: sum(errors) / len(errors) for name, errors in _errors(battery, baseline).items()
  }
  error = corruption_error(_errors(battery, found), against)
  scores |= {f'error_{name}': value for name, value in error.errors.items()}
  scores['error_corruptions_mean'] = error.mean
  if error.normalised is not None:
    scores |= {f'ce_{name}': value for name, value in error.normalised.items()}
    scores['mce'] = error.mce
  return scores


def read_baseline(
  found: Mapping[str, Mapping[str, Scores]], battery: Battery, classifier: str, images: int
) -> dict[str, Scores]:
  """The baseline's results for every corruption and severity of `battery`.

  Args:
    found: `details` of its results.json.
    battery: what is asked for.
    classifier: of which kind; the measures' names begin with it and a slash.
    images: how many this evaluation measures on.

  Raises:
    UserError: a measure that the baseline lacks, or one of another number of images.
  """
  there = found.get('robustness', {})
  wanted = [name for name in battery.measures if '/' in name]
  lacking = [name for name in wanted if f'{classifier}/{name}' not in there]
  if lacking:
    more = f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''
    have = ', '.join(sorted({key.partition('/')[0] for key in there})) or 'none'
    raise UserError(
      f'config.robustness.baseline has no {lacking[0]}{more} of the classifier {classifier!r} (classifiers there: '
      f'{have}): measure it with these corruptions and severities, or leave the baseline empty.'
    )
  baseline = {name: there[f'{classifier}/{name}'] for name in wanted}
  for name, result_of in baseline.items():
    if result_of['images'] != images:
      raise UserError(
        f'config.robustness.baseline measured {name} on {result_of["images"]:g} images and this evaluation has '
        f'{images}: use the same data and config.robustness.limit.'
      )
  return baseline


def _errors(battery: Battery, found: Mapping[str, Scores]) -> dict[str, Sequence[float]]:
  return {
    name: [1 - found[f'{name}/{severity}']['top1'] for severity in battery.severities]
    for name in battery.corruptions
  }
