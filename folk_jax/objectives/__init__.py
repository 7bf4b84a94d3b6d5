"""Objectives by name; `make_objective` builds one from a config's fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from folk_jax.errors import UserError
from folk_jax.objectives.base import LossOutput, Objective, Parts
from folk_jax.objectives.folk import Folk

OBJECTIVES = {'folk': Folk}

__all__ = ['OBJECTIVES', 'LossOutput', 'Objective', 'Parts', 'make_objective']


def make_objective(name: str, parts: Parts, fields: Mapping[str, Any]) -> Objective:
  """The objective called `name`, with `fields` as its settings.

  Args:
    name: a key of `OBJECTIVES`.
    parts: backbone, heads, views and normalisation.
    fields: every setting of the objective's dataclass, by name; lists are taken as tuples.

  Raises:
    UserError: for an unknown objective, an unknown or missing field, or values that the objective refuses.
  """
  if name not in OBJECTIVES:
    raise UserError(
      f'unknown objective {name!r} (config.objective.name). Known: {", ".join(sorted(OBJECTIVES))}.'
    )
  kind = OBJECTIVES[name]
  known = {f.name for f in dataclasses.fields(kind)} - {'parts'}
  wrong = sorted(set(fields) ^ known)
  if wrong:
    state = 'is unknown' if wrong[0] in fields else 'is missing'
    raise UserError(
      f'config.objective.{wrong[0]} {state}: objective {name!r} has the fields {", ".join(sorted(known))}.'
    )
  values = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}
  return kind(parts=parts, **values)
