"""Weights that a run starts from: another run's, or a timm file's, at any image size."""

import json
from typing import Any

import jax
from absl import logging
from etils import epath

from folk_jax import checkpoint
from folk_jax.errors import UserError
from folk_jax.interop import timm


def load(init_from: str, params: dict[str, Any], *, image_size: int, patch: int) -> dict[str, Any]:
  """The weights of `init_from` that fit `params`, by name.

  A workdir gives the backbone, from its teacher where it has one, and those heads whose shapes agree. A timm
  `.safetensors` gives the backbone. A position embedding for another image size is resampled.

  Args:
    init_from: a workdir, or a file that ends in `.safetensors`.
    params: the run's parameters or their shapes, by name.
    image_size: of the run that starts, in pixels.
    patch: of its backbone, in pixels.

  Returns:
    NumPy trees by name, `backbone` always among them; what is missing starts fresh.

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
    backbone = timm.from_timm(timm.load_timm_file(str(path)), params['backbone'], grid=grid)
    return {'backbone': backbone}
  return _from_workdir(path, params, grid)


def _from_workdir(
  path: epath.Path, params: dict[str, Any], grid: tuple[int, int]
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
  if config['teacher']['enabled']:
    teacher, _, _ = checkpoint.read_subtree(directory, ('opt_state', '**', 'teacher'))
  loaded = {}
  for name, fresh in params.items():
    found = teacher.get(name, student.get(name))
    if name == 'backbone':
      # Through timm's names: they resample the position embedding and report what doesn't fit.
      loaded[name] = timm.from_timm(timm.to_timm(found), fresh, grid=grid)
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
