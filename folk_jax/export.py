"""The command that hands a run's backbone to PyTorch: `python -m folk_jax.export --workdir=DIR`.

Writes timm's names as `.safetensors` (or big_vision's layout as `.npz`), and a JSON beside it that
names the timm model, its arguments and the preprocessing. It needs neither the devices nor the data
of the training run.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from absl import flags
from etils import epath

from folk_jax import checkpoint, cli, models
from folk_jax.errors import UserError
from folk_jax.interop import timm as timm_lib
from folk_jax.signal.augment import normalise

_ENDINGS = {'timm': '.safetensors', 'npz': '.npz'}
_UNDER = {'student': ('params', 'backbone'), 'teacher': ('opt_state', '**', 'teacher', 'backbone')}
# Features after the final norm are of order 1, and float32 agrees to about 1e-6 times the depth.
VERIFY_TOLERANCE = 1e-4


def _define_flags() -> None:
  """The command's flags; not at import, where `workdir` and `out` would meet other commands' own."""
  flags.DEFINE_string('workdir', None, 'The run to export.', required=True)
  flags.DEFINE_integer(
    'step', None, 'The checkpoint to read; the newest by default.', lower_bound=0
  )
  flags.DEFINE_enum('which', 'teacher', ['teacher', 'student'], 'Whose backbone.')
  flags.DEFINE_enum(
    'format',
    'timm',
    ['timm', 'npz'],
    "timm: .safetensors with timm's names; npz: big_vision's layout.",
  )
  flags.DEFINE_string(
    'out',
    None,
    'The file, ending in .safetensors (timm) or .npz; by default WORKDIR/export/<which>_<step>.',
  )
  flags.DEFINE_bool(
    'verify',
    False,
    "Compare features with timm's own forward on random images (needs torch and timm).",
  )


def main(argv: Sequence[str]) -> None:
  """Exports what the flags name and says where it went."""
  del argv
  values = flags.FLAGS
  out = export(
    values.workdir,
    step=values.step,
    which=values.which,
    kind=values.format,
    out=values.out,
    verify=values.verify,
  )
  print(f'wrote {out} and {_beside(out)}')


def export(
  workdir: str,
  *,
  step: int | None = None,
  which: str = 'teacher',
  kind: str = 'timm',
  out: str | None = None,
  verify: bool = False,
) -> str:
  """Writes a run's backbone and its description.

  Args:
    workdir: the run's folder.
    step: which checkpoint; the newest by default.
    which: 'teacher' or 'student'.
    kind: 'timm' or 'npz'.
    out: the file to write, with the format's ending, `.safetensors` or `.npz`; by default
      `<workdir>/export/<which>_<step>` with it.
    verify: whether to compare features with timm's own forward first; nothing is written if they
      differ.

  Returns:
    The file's path. The description lies beside it, with the ending `.json`.

  Raises:
    UserError: no such run or step, no teacher, a path that can't be written or has another format's
      ending, or features that differ.
  """
  if out is not None and not out.endswith(_ENDINGS[kind]):
    # timm, numpy and load_timm_file go by the ending.
    raise UserError(f'--out={out}: the name of --format={kind} must end in {_ENDINGS[kind]}')
  config = read_config(workdir)
  if which == 'teacher' and not config['teacher']['enabled']:
    raise UserError(f'{workdir} was trained without a teacher: export --which=student')
  directory = str(epath.Path(workdir).expanduser() / 'checkpoints')
  backbone, _, step = checkpoint.read_subtree(directory, _UNDER[which], step)
  out = out or str(epath.Path(workdir).expanduser() / 'export' / f'{which}_{step}{_ENDINGS[kind]}')
  about = describe(config) | {'which': which, 'step': step}
  state = timm_lib.to_timm(backbone)
  if verify:
    about['verified_max_difference'] = verify_with_timm(config, backbone, state, about)
    print(f'largest difference from timm: {about["verified_max_difference"]:.2e}')
  if kind == 'npz':
    state = timm_lib.to_big_vision(backbone, heads=config['model']['heads'])
    about['args'] = about['args'] | {
      'no_embed_class': True
    }  # Its class token holds its position already.
  _write(out, kind, state, about)
  return out


def read_config(workdir: str) -> dict[str, Any]:
  """A run's configuration. Raises `UserError` where `workdir` holds none."""
  file = epath.Path(workdir).expanduser() / 'config.json'
  try:
    return json.loads(file.read_text())
  except OSError as error:
    raise UserError(
      f'{workdir} holds no run: there is no {file}; give the --workdir of a run'
    ) from error
  except json.JSONDecodeError as error:
    raise UserError(f'{file} is damaged: {error}') from error


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
  """The timm model, its arguments and the preprocessing that a run's weights want."""
  model, data = config['model'], config['data']
  fields = {name: model[name] for name in ('width', 'depth', 'heads', 'patch', 'mlp_ratio')}
  size = config['image_size']
  timm_model = timm_lib.timm_model(
    image_size=size, layer_scale=model['layer_scale'] or None, **fields
  )
  short_side = data['test_resize'] or int(size * 256 / 224)
  return timm_model | {
    'preprocessing': {
      'input_size': [3, size, size],
      'mean': data['mean'],
      'std': data['std'],
      'interpolation': data['interpolation'],
      'crop_pct': size / short_side,
      'crop_mode': 'center',
    }
  }


def verify_with_timm(
  config: Mapping[str, Any],
  backbone: Mapping[str, Any],
  state: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
) -> float:
  """The largest absolute difference between our features and timm's, class token and patch tokens,
  in float32.

  Raises:
    UserError: torch or timm can't be imported, or the difference is above `VERIFY_TOLERANCE`.
  """
  try:
    import timm
    import torch
  except (ImportError, RuntimeError) as error:
    raise UserError(
      f'--verify needs torch and timm ({error}): install both in one command, pip install torch'
      ' torchvision timm (for CPUs, see pytorch.org first), or leave --verify out'
    ) from error
  import jax

  size, data = config['image_size'], config['data']
  image_NHWC = np.random.default_rng(0).random((4, size, size, 3), np.float32)
  image_NHWC = np.asarray(normalise(image_NHWC, tuple(data['mean']), tuple(data['std'])))
  fields = dict(config['model']) | {
    'dtype': 'float32',
    'layer_scale': config['model']['layer_scale'] or None,
  }
  module = models.make_backbone(fields.pop('name'), size, **fields)
  with jax.default_matmul_precision('highest'):
    output = module.apply({'params': backbone}, image_NHWC)
  ours = np.concatenate(
    [output.pooled[:, None], output.patches.reshape(4, -1, output.pooled.shape[-1])], axis=1
  )

  model = timm.create_model(about['model'], **about['args']).eval()
  model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
  with torch.no_grad():
    theirs = model.forward_features(
      torch.from_numpy(image_NHWC.transpose(0, 3, 1, 2).copy())
    ).numpy()
  difference = float(np.abs(ours - theirs).max())
  if not difference <= VERIFY_TOLERANCE:
    raise UserError(
      f"features differ from timm's by {difference:.2e}, more than {VERIFY_TOLERANCE:g}:"
      ' nothing was written; please report it with the config.json of the run'
    )
  return difference


def _write(out: str, kind: str, state: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
  """Writes weights and description under other names first: what has its name is whole."""
  path = epath.Path(out).expanduser()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
      file = os.path.join(scratch, 'weights' + _ENDINGS[kind])
      if kind == 'timm':
        safetensors.numpy.save_file(dict(state), file, metadata={'format': 'pt'})
      else:
        np.savez(file, **state)
      _replace(path, epath.Path(file).read_bytes())
    _replace(epath.Path(_beside(str(path))), (json.dumps(about, indent=2) + '\n').encode())
  except OSError as error:
    raise UserError(f'cannot write {out}: {error}; give an --out that can be written') from error


def _replace(path: epath.Path, content: bytes) -> None:
  fresh = path.parent / f'{path.name}.tmp'
  fresh.write_bytes(content)
  fresh.replace(path)


def _beside(out: str) -> str:
  return os.path.splitext(out)[0] + '.json'


if __name__ == '__main__':
  _define_flags()
  cli.run(main)
