"""Objectives by name; `make_objective` builds one from a config's fields."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from folk_jax.errors import UserError
from folk_jax.objectives.base import LocalViews, LossOutput, Objective, Parts
from folk_jax.objectives.dino import Dino
from folk_jax.objectives.folk import Folk
from folk_jax.objectives.ibot import Ibot
from folk_jax.objectives.linear_probe import LinearProbe
from folk_jax.objectives.mae import Mae
from folk_jax.objectives.mfm import Deblur, Denoise, Mfm, SuperResolution
from folk_jax.objectives.segment import Segment
from folk_jax.objectives.supervised import Supervised
from folk_jax.objectives.wavelet_mim import WaveletMim

OBJECTIVES = {
  'folk': Folk,
  'mfm': Mfm,
  'super_resolution': SuperResolution,
  'deblur': Deblur,
  'denoise': Denoise,
  'wavelet_mim': WaveletMim,
  'mae': Mae,
  'dino': Dino,
  'ibot': Ibot,
  'supervised': Supervised,
  'linear_probe': LinearProbe,
  'segment': Segment,
}

__all__ = [
  'OBJECTIVES',
  'LocalViews',
  'LossOutput',
  'Objective',
  'Parts',
  'make_objective',
]


def make_objective(name: str, parts: Parts, fields: Mapping[str, Any]) -> Objective:
  """The objective called `name`, with `fields` as its settings.

  Args:
    name: a key of `OBJECTIVES`.
    parts: backbone, heads, views and normalisation.
    fields: every setting of the objective's dataclass, by name; lists are taken as tuples.

  Raises:
    UserError: for an unknown objective, an unknown or missing field, values that the objective refuses, or a backbone
      that it can't train.
  """
  if name not in OBJECTIVES:
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise UserError(
      f'unknown objective {name!r} (config.objective.name).{hint} Known: {", ".join(sorted(OBJECTIVES))}.'
    )
  kind = OBJECTIVES[name]
  known = {f.name for f in dataclasses.fields(kind)} - {'parts'}
  wrong = sorted(set(fields) ^ known)
  if wrong:
    state = 'is unknown' if wrong[0] in fields else 'is missing'
    raise UserError(
      f'config.objective.{wrong[0]} {state}: objective {name!r} has the fields {", ".join(sorted(known))}.'
    )
  if parts.model not in kind.backbones:
    serving = [other for other, k in OBJECTIVES.items() if parts.model in k.backbones]
    raise UserError(
      f'objective {name!r} masks patches and trains {" or ".join(kind.backbones)} alone; config.model.name is '
      f'{parts.model!r}, which {", ".join(serving)} can train.'
    )
  values = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}
  return kind(parts=parts, **values)
