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
from folk_jax.train import initial

_ENDINGS = {'timm': '.safetensors', 'npz': '.npz'}
_UNDER = {'student': ('params', 'backbone'), 'teacher': ('opt_state', '**', 'teacher', 'backbone')}
# Features after a final norm are of order 1, and float32 agrees to about 1e-6 times the depth. A ResNet
# ends without a norm: where the features' root mean square is above 1, this is a share of it.
VERIFY_TOLERANCE = 1e-4
# What is read of a run's configuration, which somebody else may have written.
_FIELDS = {
  'teacher.enabled': bool,
  'model.name': str,
  'image_size': int,
  'data.mean': list,
  'data.std': list,
  'data.interpolation': str,
  'data.test_resize': int,
}
# Fields of a model that choose how it is computed; these run on any device.
_PLAIN = {'dtype': 'float32', 'attention': 'xla', 'scan_unroll': 1}


def _define_flags() -> None:
  """The command's flags; not at import, where `workdir` and `out` would meet other commands' own."""
  flags.DEFINE_string('workdir', None, 'The run to export.', required=True)
  flags.DEFINE_integer(
    'step', None, 'The checkpoint to read; the newest by default.', lower_bound=0
  )
  flags.DEFINE_enum(
    'checkpoint',
    'last',
    ['last', 'best'],
    "The run's last steps, or the best that it kept (config.checkpoint.best).",
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
    best=values.checkpoint == 'best',
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
  best: bool = False,
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
    best: whether to read the run's best checkpoint instead of its last ones.

  Returns:
    The file's path. The description lies beside it, with the ending `.json`.

  Raises:
    UserError: no such run or step, no teacher, a path that can't be written or has another format's
      ending, a format that the model has not, or features that differ.
  """
  if out is not None and not out.endswith(_ENDINGS[kind]):
    # timm, numpy and load_timm_file go by the ending.
    raise UserError(f'--out={out}: the name of --format={kind} must end in {_ENDINGS[kind]}')
  config = read_config(workdir)
  if which == 'teacher' and not config['teacher']['enabled']:
    raise UserError(f'{workdir} was trained without a teacher: export --which=student')
  if kind not in timm_lib.NAMES[config['model']['name']].layouts:
    raise UserError(
      f"--format={kind} is big_vision's layout of a ViT and this run's model is"
      f' {config["model"]["name"]!r}: export with --format=timm'
    )
  directory = str(epath.Path(workdir).expanduser() / (initial.BEST if best else initial.LAST))
  backbone, _, step = checkpoint.read_subtree(directory, _UNDER[which], step)
  out = out or str(epath.Path(workdir).expanduser() / 'export' / f'{which}_{step}{_ENDINGS[kind]}')
  about = describe(config) | {'which': which, 'step': step}
  statistics = {}
  if timm_lib.statistics_shapes(backbone):
    statistics = initial.read_statistics(directory, which, step)
  state = timm_lib.to_timm(backbone, statistics)
  if verify:
    about['verified_max_difference'] = verify_with_timm(config, backbone, statistics, state, about)
    print(f'largest difference from timm: {about["verified_max_difference"]:.2e}')
  if kind == 'npz':
    state = timm_lib.to_big_vision(backbone, heads=config['model']['heads'])
    # Its class token holds its position already.
    about['args'] = about['args'] | {'no_embed_class': True}
  _write(out, kind, state, about)
  return out


def read_config(workdir: str) -> dict[str, Any]:
  """A run's configuration. Raises `UserError` where `workdir` holds none that can be exported."""
  file = epath.Path(workdir).expanduser() / 'config.json'
  try:
    config = checkpoint.read_json(file)
  except OSError as error:
    raise UserError(
      f'{workdir} holds no run: there is no {file}; give the --workdir of a run'
    ) from error
  for name, kind in _FIELDS.items():
    node = config
    for key in name.split('.'):
      node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, kind):
      raise UserError(
        f"{file} is no run's configuration: {name} is {node!r}, expected a {kind.__name__}"
      )
  if (model := config['model']['name']) not in timm_lib.NAMES:
    raise UserError(
      f'{file}: model.name {model!r} has no names in timm; known: {", ".join(timm_lib.NAMES)}'
    )
  if missing := set(timm_lib.NAMES[model].fields) - config['model'].keys():
    raise UserError(f"{file} is no run's configuration: it lacks model.{min(missing)}")
  return config


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
  """The timm model, its arguments and the preprocessing that a run's weights want."""
  model, data, size = config['model'], config['data'], config['image_size']
  fields = {field: model[field] for field in timm_lib.NAMES[model['name']].fields}
  timm_model = timm_lib.timm_model(model['name'], image_size=size, **fields)
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
  statistics: Mapping[str, Any],
  state: Mapping[str, np.ndarray],
  about: Mapping[str, Any],
) -> float:
  """The largest absolute difference between our features and timm's, the pooled one and those of
  positions, in float32.

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
  fields = dict(config['model'])
  name = fields.pop('name')
  fields |= {field: value for field, value in _PLAIN.items() if field in fields}
  if 'layer_scale' in fields:
    fields['layer_scale'] = fields['layer_scale'] or None  # A recipe's 0 is none.
  module = models.make_backbone(name, size, **fields)
  with jax.default_matmul_precision('highest'):
    output, _ = models.encode(module, backbone, statistics, image_NHWC)
  ours = np.concatenate(
    [output.pooled[:, None], output.patches.reshape(4, -1, output.pooled.shape[-1])], axis=1
  )

  model = timm.create_model(about['model'], **about['args']).eval()
  model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
  image_NCHW = torch.from_numpy(image_NHWC.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    pooled, positions = model(image_NCHW).numpy(), model.forward_features(image_NCHW).numpy()
  positions = timm_lib.NAMES[name].positions(positions)
  theirs = np.concatenate([pooled[:, None], positions], axis=1)
  difference = float(np.abs(ours - theirs).max())
  limit = VERIFY_TOLERANCE * max(1.0, float(np.sqrt(np.mean(np.square(theirs)))))
  if not difference <= limit:
    raise UserError(
      f"features differ from timm's by {difference:.2e}, more than {limit:.2g}:"
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
