"""Weights that a run starts from: another run's, or a file's in timm's or big_vision's names, at any image size."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.interop import timm

# The folder of the best step in a workdir, beside that of the last ones.
BEST, LAST = 'best', 'checkpoints'
# What a file of weights may hold, beside and in multiples of the model's own.
_SPARE_BYTES, _SPARE_TIMES = 1 << 30, 8


def load(
  init_from: str,
  params: dict[str, Any],
  *,
  image_size: int,
  patch: int,
  which: str = 'teacher',
  heads: int | None = None,
) -> dict[str, Any]:
  """The weights of `init_from` that fit `params`, by name.

  A workdir gives the backbone of its last step (WORKDIR/best: of its best), from its teacher where it has one, and
  those heads whose shapes agree. A file gives the backbone: a `.safetensors` in timm's names, an `.npz` in timm's or
  big_vision's (as `export --format=npz` writes it). A ResNet's BatchNorm statistics come with it. A position embedding
  for another image size is resampled.

  Args:
    init_from: a workdir, `best` in one, or a file that ends in `.safetensors` or `.npz`.
    params: the run's parameters or their shapes, by name.
    image_size: of the run that starts, in pixels.
    patch: of its backbone, in pixels: a ViT's patch, a ResNet's stride.
    which: 'teacher' takes a workdir's teacher where it has one; 'student' doesn't.
    heads: attention heads of its ViT, which big_vision's arrays are checked against; None takes the file's.

  Returns:
    NumPy trees by name, `backbone` always among them; what is missing starts fresh. For a ResNet also `batch_stats`,
    the statistics that go with the backbone, which are no parameters.

  Raises:
    UserError: for a path that isn't there, a file that is damaged or of something else, or a backbone of another
      architecture (names what is missing, unexpected or misshapen).
  """
  path = epath.Path(init_from).expanduser()
  if not path.exists():
    if path.name == BEST and path.parent.exists():
      raise no_best(path.parent)
    raise UserError(
      f'config.init_from {init_from!r} does not exist: give a workdir, or a .safetensors or .npz file of weights.'
    )
  grid = (image_size // patch,) * 2
  # Positions of a larger image, a classifier of many classes, a training checkpoint's moments: not more than this.
  limit = _SPARE_BYTES + _SPARE_TIMES * sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(params))
  if path.suffix == '.safetensors':
    state = timm.load_timm_file(str(path), limit)
    return _backbone(state, params['backbone'], grid)
  if path.suffix == '.npz':
    state = _from_npz(str(path), params['backbone'], heads, limit)
    return _backbone(state, params['backbone'], grid)
  return _from_workdir(path, params, grid, which)


def no_best(workdir: str | epath.Path) -> UserError:
  """The error for a run without a best checkpoint."""
  return UserError(
    f'{workdir} has no best checkpoint: its run must have set config.checkpoint.best.'
  )


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


def _from_npz(
  path: str, fresh: Mapping[str, Any], heads: int | None, limit: int
) -> Mapping[str, np.ndarray]:
  """The arrays of an `.npz`, in timm's names."""
  state = timm.read_npz(path, limit)
  if timm.is_big_vision(state):
    return timm.to_timm(timm.from_big_vision(state, fresh, heads=heads))
  if not any(name.endswith('.weight') for name in state):
    shown = ', '.join([*state][:4]) or 'nothing'
    raise UserError(
      f"{path}: neither big_vision's names (params/embedding/kernel, ...) nor timm's (norm.weight, ...): it holds "
      f'{shown}{", ..." if len(state) > 4 else ""}; export one with python -m folk_jax.export --format=npz.'
    )
  return state


def find_run(path: str | epath.Path) -> tuple[epath.Path, str]:
  """The workdir, and the folder of the steps, that a path means: WORKDIR its last steps, WORKDIR/best its best one.

  Raises:
    UserError: for a path that is neither.
  """
  path = epath.Path(path).expanduser()
  if (path / 'config.json').exists():
    return path, str(path / LAST)
  if path.name == BEST and (path.parent / 'config.json').exists():
    return path.parent, str(path)
  raise UserError(
    f'config.init_from {path} is no workdir (it has no config.json) and no .safetensors or .npz file.'
  )


def _from_workdir(
  path: epath.Path, params: dict[str, Any], grid: tuple[int, int], which: str
) -> dict[str, Any]:
  workdir, directory = find_run(path)
  match checkpoint.read_json(workdir / 'config.json'):
    case {'teacher': {'enabled': bool(has_teacher)}}:
      pass
    case _:
      raise UserError(
        f"{workdir / 'config.json'} is no run's configuration: it lacks teacher.enabled"
      )
  student, _, step = checkpoint.read_subtree(directory, ('params',))
  teacher = {}
  if has_teacher and which == 'teacher':
    teacher, _, _ = checkpoint.read_subtree(directory, ('opt_state', '**', 'teacher'), step)
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
