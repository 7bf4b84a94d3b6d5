"""Weights that a run starts from: another run's, or a timm file's, at any image size."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.interop import timm


def load(
  init_from: str, params: dict[str, Any], *, image_size: int, patch: int, which: str = 'teacher'
) -> dict[str, Any]:
  """The weights of `init_from` that fit `params`, by name.

  A workdir gives the backbone, from its teacher where it has one, and those heads whose shapes agree. A timm
  `.safetensors` gives the backbone. A ResNet's BatchNorm statistics come with it. A position embedding for another
  image size is resampled.

  Args:
    init_from: a workdir, or a file that ends in `.safetensors`.
    params: the run's parameters or their shapes, by name.
    image_size: of the run that starts, in pixels.
    patch: of its backbone, in pixels: a ViT's patch, a ResNet's stride.
    which: 'teacher' takes a workdir's teacher where it has one; 'student' doesn't.

  Returns:
    NumPy trees by name, `backbone` always among them; what is missing starts fresh. For a ResNet also `batch_stats`,
    the statistics that go with the backbone, which are no parameters.

  Raises:
    UserError: for a path that isn't there, or a backbone of another architecture (names each mismatch).
  """
  path = epath.Path(init_from).expanduser()
  if not path.exists():
    raise UserError(
      f'config.init_from {init_from!r} does not exist: give a workdir, or a timm .safetensors file.'
    )
  grid = (image_size // patch,) * 2
  if path.suffix == '.safetensors':
    return _backbone(timm.load_timm_file(str(path)), params['backbone'], grid)
  return _from_workdir(path, params, grid, which)


def read_statistics(directory: str, which: str, step: int | None = None) -> dict[str, Any]:
  """The BatchNorm statistics that a saved backbone is evaluated with, as NumPy arrays.

  Args:
    directory: the folder of the steps, `<workdir>/checkpoints`.
    which: 'student' or 'teacher'.
    step: the latest by default.

  Returns:
    `extra['clean_stats'][which]` where there is one, else `extra['batch_stats'][which]`: see `TrainState.extra`.

  Raises:
    UserError: no such step, or one without statistics of `which`.
  """
  extra, _, step = checkpoint.read_subtree(directory, ('extra',), step)
  kinds = {name: extra[name] for name in ('clean_stats', 'batch_stats') if name in extra}
  for statistics in kinds.values():
    if which in statistics:
      return statistics[which]
  there = ', '.join(f'{name}/{network}' for name, kind in kinds.items() for network in kind)
  raise UserError(
    f'step {step} in {directory} has no BatchNorm statistics of the {which}, which a ResNet needs;'
    f' there are: {there or "none"}.'
  )


def _backbone(
  state: Mapping[str, np.ndarray], fresh: Mapping[str, Any], grid: tuple[int, int]
) -> dict[str, Any]:
  """`backbone`, and `batch_stats` where it has any, from timm's names."""
  loaded = timm.variables_from_timm(state, fresh, grid=grid)
  statistics = {'batch_stats': loaded.statistics} if loaded.statistics else {}
  return {'backbone': loaded.params} | statistics


def _from_workdir(
  path: epath.Path, params: dict[str, Any], grid: tuple[int, int], which: str
) -> dict[str, Any]:
  config_file = path / 'config.json'
  if not config_file.exists():
    raise UserError(
      f'config.init_from {path} is no workdir (it has no config.json) and no .safetensors file.'
    )
  config = json.loads(config_file.read_text())
  directory = str(path / 'checkpoints')
  student, _, step = checkpoint.read_subtree(directory, ('params',))
  teacher = {}
  if config['teacher']['enabled'] and which == 'teacher':
    teacher, _, _ = checkpoint.read_subtree(directory, ('opt_state', '**', 'teacher'))
  loaded = {}
  for name, fresh in params.items():
    found = teacher.get(name, student.get(name))
    if name == 'backbone':
      statistics = {}
      if timm.statistics_shapes(found):
        statistics = read_statistics(directory, 'teacher' if name in teacher else 'student', step)
      # Through timm's names: they resample the position embedding and report what doesn't fit.
      loaded |= _backbone(timm.to_timm(found, statistics), fresh, grid)
    elif found is None:
      logging.info('init_from %s step %d has no %s: it starts fresh.', path, step, name)
    elif mismatches := _mismatches(found, fresh):
      logging.info(
        'init_from %s: %s has other shapes and starts fresh (%s).', path, name, mismatches[0]
      )
    else:
      loaded[name] = found
  return loaded


def _mismatches(found: Any, expected: Any) -> list[str]:
  """What differs between two trees of arrays, a phrase each."""
  shapes = [
    {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape for path, leaf in leaves}
    for leaves in (jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected))
  ]
  return [
    f'{name} is {shapes[0].get(name, "missing")}, expected {shapes[1].get(name, "nothing")}'
    for name in sorted(shapes[0].keys() | shapes[1].keys())
    if shapes[0].get(name) != shapes[1].get(name)
  ]
