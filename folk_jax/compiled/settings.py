"""Configurations near a given one: the same recipe with a few fields changed, and the changes that save memory.

A configuration is a `ConfigDict`; a change maps paths of its fields, such as 'model.remat', to values.
"""

from collections.abc import Mapping
from typing import Any


def changed(config: Any, change: Mapping[str, Any]) -> Any:
  """A copy of `config` with the fields that `change` names by their paths."""
  copy = config.copy_and_resolve_references()
  for key, value in change.items():
    *path, last = key.split('.')
    node = copy
    for part in path:
      node = node[part]
    node[last] = value
  return copy


def has(config: Any, key: str) -> bool:
  *path, last = key.split('.')
  for part in path:
    if part not in config:
      return False
    config = config[part]
  return last in config


def field(config: Any, key: str) -> Any:
  for part in key.split('.'):
    config = config[part]
  return config


def alternatives(config: Any, devices: int, slices: int = 1) -> list[dict[str, Any]]:
  """Changes that save memory: those that compute the same thing first, smaller batches last."""
  found = []
  stronger = {'none': ('elementwise', 'block'), 'elementwise': ('block',)}
  remats = stronger.get(config.model.remat, ()) if 'remat' in config.model else ()
  found += [{'model.remat': remat} for remat in remats]
  most = {'model.remat': 'block'} if remats else {}
  a_chip = config.batch_size // devices
  for times in (2, 4, 8):
    if config.batch_size % (devices * config.accumulate * times) == 0 and not _pooled(config):
      found.append(most | {'accumulate': config.accumulate * times})
  spread = [
    n for n in (8, 16, 32, 64, 128, 256) if n > config.mesh.fsdp and devices // slices % n == 0
  ]
  found += [most | {'mesh.fsdp': n} for n in spread[:2]]
  for part in (2, 4, 8):
    if a_chip % (part * config.accumulate) == 0:
      found.append(most | {'batch_size': config.batch_size // part})
  return found


def _pooled(config: Any) -> bool:
  return ('reduce', 'pooled') in config.objective.items()
