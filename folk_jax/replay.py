"""The command that makes a step of a run again and looks into it: `python -m folk_jax.replay --workdir=DIR --step=N`.

Loads the newest checkpoint from before the step, feeds exactly the images, crops and draws of that step through its
loss, one by one, and says which are to blame and which operation first gave a number that is not finite. Nothing is
written. The weights are the checkpoint's, which may be some steps older than the step's own; --catch_up trains up to
them first. Exit status: 0 the step is finite here, 3 it is not, 2 a mistake in what was asked.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from folk_jax import checkpoint, cli, data
from folk_jax.checkpoint import reading
from folk_jax.errors import UserError
from folk_jax.train import faults, initial, loop, sharding
from folk_jax.train.debug import Debugger
from folk_jax.train.evaluation import needed_classes
from folk_jax.train.explain import Explanation, explain
from folk_jax.train.run import Run, data_settings, make_run
from folk_jax.train.state import TrainState

_STATUS = 3
_SHOWN = 10


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'The run.', required=True)
  flags.DEFINE_integer('step', None, 'The step to make again.', required=True, lower_bound=1)
  flags.DEFINE_integer(
    'at', None, "The checkpoint's step; by default the newest before the step.", lower_bound=0
  )
  flags.DEFINE_string(
    'data_path', None, "Where the run's data are now; by default where they were."
  )
  flags.DEFINE_bool('catch_up', False, 'Train from the checkpoint to the step first.')


def main(argv: Sequence[str]) -> None:
  """Replays what the flags name and prints what was found."""
  del argv
  values = flags.FLAGS
  lines, is_finite = replay(
    values.workdir,
    values.step,
    at=values.at,
    catch_up=values.catch_up,
    data_path=values.data_path,
  )
  print('\n'.join(lines))
  sys.exit(0 if is_finite else _STATUS)


def replay(
  workdir: str,
  step: int,
  *,
  at: int | None = None,
  catch_up: bool = False,
  data_path: str | None = None,
) -> tuple[list[str], bool]:
  """Makes a step again.

  Args:
    workdir: the run's folder; only read.
    step: from 1.
    at: the checkpoint's step, before `step`; 0 for the weights the run began with. By default the newest there is.
    catch_up: whether to train from the checkpoint to the step.
    data_path: where the run's data are now; by default as the checkpoint's configuration says.

  Returns:
    What was found, in lines, and whether everything was finite.

  Raises:
    UserError: no such run or checkpoint, a step outside the run, or data that aren't the run's any more.
  """
  config = _read_config(workdir)
  at = _choose(workdir, step, at)
  if at:
    config = _config_of(workdir, at) or config
  config.data.workers = 0  # One batch, or a few: no processes for them.
  if data_path is not None:
    config.data.path = data_path
  settings = data_settings(config)
  source = data.make_source(settings, 'train')
  run = make_run(config, len(source), len(source.class_names))
  if step > run.total_steps:
    raise UserError(f'--step={step}: the run in {workdir} has {run.total_steps} steps')
  mesh = sharding.make_mesh(1, jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    state = _state(config, run, workdir, at, mesh)
    start = int(state.step)
    done = step - 1 if catch_up else start
    stream = data.train_batches(
      source,
      settings,
      seed=config.seed,
      step=start if catch_up else step - 1,
      batch_size=config.batch_size,
      classes=needed_classes(run, source),
    )
    with stream:
      compiled = loop.compile_step(run, state, mesh)
      for _ in range(start, done):
        state, _ = compiled(state, sharding.put_batch(next(stream), mesh))
      rows = next(stream)
    said = _compared(workdir, step, rows['index'])
    batch = sharding.put_batch(rows, mesh)
    # The draws of the step are keyed on its number.
    state = state.replace(step=np.int32(step - 1))
    failed = Debugger(run.objective, run.step, config.seed, state, mesh).failed(state, batch)
    found = explain(run.objective, state, batch, config.seed)
  older = step - 1 - done
  lines = [
    f'step {step} of {workdir}: {rows["index"].size} images; {said}',
    f'weights after step {done} of it, {older} step{"s" * (older != 1)} older than the ones it had',
    *_table(found, rows['index'], source),
    *_verdict(found, failed, rows['index']),
  ]
  return lines, not failed and not found.bad_B.any()


def _read_config(workdir: str) -> ml_collections.ConfigDict:
  file = epath.Path(workdir).expanduser() / 'config.json'
  if not file.exists():
    raise UserError(
      f'--workdir={workdir} holds no run: {file} is missing; give the --workdir of a run'
    )
  return ml_collections.ConfigDict(_tuples(checkpoint.read_json(file)))


def _steps_folder(workdir: str) -> epath.Path:
  return reading.absolute(str(epath.Path(workdir).expanduser() / initial.LAST))


def _choose(workdir: str, step: int, at: int | None) -> int:
  """The step of the checkpoint to begin from, before `step`; 0 for the weights the run began with."""
  folder = _steps_folder(workdir)
  before = [found for found in reading.steps_on_disk(folder) if found < step]
  if at is None:
    return before[-1] if before else 0
  if at and at not in before:
    raise UserError(
      f'--at={at}: there is no such checkpoint before step {step} in {folder}; there are: '
      f'{", ".join(map(str, [0, *before]))}'
    )
  return at


def _config_of(workdir: str, at: int) -> ml_collections.ConfigDict | None:
  """The configuration that a checkpoint was trained with: a resumed run's may differ in what is free to."""
  kept = reading.read_meta(_steps_folder(workdir), at).get('config')
  return ml_collections.ConfigDict(_tuples(kept)) if isinstance(kept, dict) else None


def _tuples(node: Any) -> Any:
  """JSON's lists as the tuples that recipes have."""
  if isinstance(node, Mapping):
    return {key: _tuples(value) for key, value in node.items()}
  return tuple(map(_tuples, node)) if isinstance(node, list) else node


def _state(
  config: ml_collections.ConfigDict,
  run: Run,
  workdir: str,
  at: int,
  mesh: Any,
) -> TrainState:
  """The state of the checkpoint of step `at`, or, for 0, the one that the run began with."""
  if at:
    tree, _, _ = checkpoint.read_subtree(str(_steps_folder(workdir)), (), at)
    abstract = jax.eval_shape(run.new_state, jax.random.key(config.seed), {})
    state = jax.tree.map_with_path(lambda path, _: _at(tree, path), abstract)
    return jax.device_put(state, sharding.replicated(mesh))
  return loop.new_state(config, run, sharding.replicated(mesh))


def _at(tree: Any, path: tuple[Any, ...]) -> np.ndarray:
  for entry in path:
    name = jax.tree_util.keystr((entry,), simple=True)
    tree = tree[int(name)] if isinstance(tree, list | tuple) else tree[name]
  return tree


def _compared(workdir: str, step: int, index_B: np.ndarray) -> str:
  """What the step's file says of these images; the run of several processes has a file for each, in their order."""
  kept = faults.read(workdir, step)
  if not kept:
    return 'no file was kept of it'
  indices = [index for one in kept for index in one['indices']]
  if indices != index_B.tolist() and len(kept) == kept[0]['processes']:
    raise UserError(
      f'the images of step {step} are not the ones that {workdir}/{faults.FOLDER} notes: give the data of the run'
    )
  return f'the ones that {faults.FOLDER}/ notes'


def _table(found: Explanation, index_B: np.ndarray, source: data.Source) -> list[str]:
  """The images by loss: those that are not finite first, then the largest."""
  by_loss = np.where(np.isfinite(found.loss_B), found.loss_B, np.inf)
  order = sorted(range(index_B.size), key=lambda row: (not found.bad_B[row], -by_loss[row]))
  lines = [f'  {"image":>10}  {"loss":>12}  name']
  for row in order[:_SHOWN]:
    note = '  <- not finite' if found.bad_B[row] else ''
    number = int(index_B[row])
    lines.append(f'  {number:>10}  {found.loss_B[row]:>12.5g}  {source.name(number)}{note}')
  rest = found.loss_B[order[_SHOWN:]]
  if rest.size:
    least = f'down to {rest[-1]:.5g}' if np.isfinite(rest[-1]) else 'none of them finite'
    lines.append(f'  and {rest.size} more, {least}')
  return lines


def _verdict(found: Explanation, failed: Sequence[str], index_B: np.ndarray) -> list[str]:
  if not failed and not found.bad_B.any():
    return ['every check holds: the step is finite with these weights']
  lines = [f'check that fails first: {failed[0]}'] if failed else []
  if found.origin is not None:
    where = 'the batch as a whole' if found.row is None else f'image {int(index_B[found.row])}'
    lines.append(f'not finite first, in {where}: {found.origin}')
  return lines


if __name__ == '__main__':
  _define_flags()
  cli.run(main)
