"""One pre-training run, from a configuration to a workdir: this file joins the rooms."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath
from jax.sharding import Mesh

from folk_jax import checkpoint, data, distributed
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.models import fused_attention
from folk_jax.train import initial, metrics, sharding
from folk_jax.train.best import Best, check_metric
from folk_jax.train.evaluation import Evaluation, needed_classes
from folk_jax.train.guard import Guard, GuardSettings
from folk_jax.train.profile import Profile
from folk_jax.train.run import Run, data_settings, make_run
from folk_jax.train.state import TrainState


def _check_workdir(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Refuses a workdir that holds another run; writes nothing."""
  file = workdir / 'config.json'
  with _using(workdir):
    if file.exists():
      config_lib.check_same_run(json.loads(file.read_text()), config, str(workdir))


def _write_config(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Makes the workdir this run's. It keeps the first config.json: a resumed run differs in what is free to."""
  file = workdir / 'config.json'
  if jax.process_index() or file.exists():
    return
  with _using(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = workdir / 'config.json.tmp'
    fresh.write_text(config_lib.to_json(config))
    fresh.replace(file)


@contextlib.contextmanager
def _using(workdir: epath.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, json.JSONDecodeError) as error:
    raise UserError(
      f'cannot use workdir {workdir}: {error}. Give a --workdir that can be written.'
    ) from error


def set_compilation_cache(path: str) -> None:
  """Compiled programs are read from there, and kept there; '' for no such folder."""
  if path:
    jax.config.update('jax_compilation_cache_dir', str(epath.Path(path).expanduser()))


def _first_state(
  config: ml_collections.ConfigDict,
  run: Run,
  source: data.Source,
  checkpoints: checkpoint.Checkpoints,
  mesh: Mesh,
) -> TrainState:
  """The newest checkpoint's state, or one at step 0, on the mesh."""
  key = jax.random.key(config.seed)
  abstract = jax.eval_shape(run.new_state, key, {})
  shardings = sharding.state_shardings(abstract, mesh)
  if checkpoints.latest_step() is not None:
    placed = jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
      abstract,
      shardings,
    )
    state, about = checkpoints.restore(placed)
    if about['data'] != _identity(source):
      raise UserError(
        f'the run in this workdir saw {about["data"]["images"]} images and config.data now gives '
        f'{len(source)}, or other classes: give the data of the run, or another --workdir.'
      )
    return state
  loaded = {}
  if config.init_from:
    loaded = initial.load(
      config.init_from,
      abstract.params,
      image_size=config.image_size,
      patch=run.objective.parts.patch,
      which=config.init_which,
      heads=getattr(run.objective.parts.backbone, 'heads', None),
    )
  return jax.jit(run.new_state, out_shardings=shardings)(key, loaded)


def _identity(source: data.Source) -> dict[str, Any]:
  """What a resumed run's data must share with the run's: number of images, and names of classes."""
  names = hashlib.sha256('\n'.join(source.class_names).encode()).hexdigest()
  return {'images': len(source), 'classes': names[:16]}


def compile_step(run: Run, state: Any, mesh: Mesh) -> Any:
  """The jitted train step: state sharded and donated, images over all devices, metrics on every device."""
  shardings = sharding.state_shardings(state, mesh)
  return jax.jit(
    run.step,
    in_shardings=(shardings, sharding.batch_sharding(mesh)),
    out_shardings=(shardings, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def pretrain(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs `config` in `workdir` to its last step, from its newest checkpoint where there is one.

  Raises:
    UserError: for what the user can mend.
    RunStopped: where the guard stops the run.
  """
  timer = metrics.StepTimer()
  config_lib.check_layout(
    config.batch_size, config.accumulate, jax.device_count(), config.mesh.fsdp
  )
  set_compilation_cache(config.compilation_cache)
  _check_workdir(config, epath.Path(workdir).expanduser())
  settings = data_settings(config)
  source = data.make_source(settings, 'train')
  run = make_run(config, len(source), len(source.class_names))
  _check_kernel(run)
  mesh = sharding.make_mesh(config.mesh.fsdp)
  checkpoints = checkpoint.Checkpoints(
    str(epath.Path(workdir).expanduser() / 'checkpoints'),
    config.checkpoint.every,
    config.checkpoint.keep,
    config.checkpoint.permanent_every,
    config.checkpoint.asynchronous,
  )
  with jax.set_mesh(mesh), checkpoints:
    state = _first_state(config, run, source, checkpoints, mesh)
    _train(config, workdir, run, state, source, settings, checkpoints, mesh, timer)


def _check_kernel(run: Run) -> None:
  backbone = run.objective.parts.backbone
  if getattr(backbone, 'attention', '') == 'pallas' and jax.default_backend() == 'tpu':
    tokens = 1 + backbone.grid[0] * backbone.grid[1]
    # On one device, whatever mesh an evaluation has set: XLA can't cut a kernel.
    with jax.set_mesh(sharding.make_mesh(1, jax.local_devices()[:1])):
      fused_attention.self_check(backbone.width, backbone.heads, tokens, backbone.dtype)


def judged(config: ml_collections.ConfigDict, workdir: str, best: bool = False) -> dict[str, float]:
  """What the evaluation of `config` says of the newest checkpoint in `workdir`, or of its best, as `eval/<name>`.

  Raises:
    UserError: for what the user can mend, a best checkpoint that the run has not kept among it.
  """
  settings = data_settings(config)
  source = data.make_source(settings, 'train')
  run = make_run(config, len(source), len(source.class_names))
  mesh = sharding.make_mesh(config.mesh.fsdp)
  directory = epath.Path(workdir).expanduser() / (initial.BEST if best else initial.LAST)
  if best and not directory.is_dir():
    raise initial.no_best(workdir)
  with (
    jax.set_mesh(mesh),
    checkpoint.Checkpoints(str(directory), 0, 1, 0, False) as checkpoints,
  ):
    state = _first_state(config, run, source, checkpoints, mesh)
    return Evaluation(config, run, settings, mesh, source)(state)


def _train(
  config: ml_collections.ConfigDict,
  workdir: str,
  run: Run,
  state: TrainState,
  source: data.Source,
  settings: data.DataSettings,
  checkpoints: checkpoint.Checkpoints,
  mesh: Mesh,
  timer: metrics.StepTimer,
) -> None:
  """Steps from `state` to the end: data, step, metrics a step late, guard, evaluations, checkpoints."""
  start, total = int(state.step), run.total_steps
  primary = jax.process_index() == 0
  if start == total:
    if primary:
      print(f'the run in {workdir} is complete: nothing is left to train')
      print(_summary(workdir, total))
    return
  train_step = compile_step(run, state, mesh)
  evaluation = Evaluation(config, run, settings, mesh, source)
  if config.checkpoint.best:
    check_metric(config.checkpoint.best, evaluation.names(state))
  guard = Guard(GuardSettings(**config.guard))
  # From here on the workdir is this run's: no mistake of the user's is left that another config would mend.
  _write_config(config, epath.Path(workdir).expanduser())
  timer.begin()
  late, profile = metrics.Late(), Profile(config.profile_steps, workdir, start, total)
  writer = metrics.MetricWriter(
    workdir,
    tensorboard=config.logging.tensorboard,
    wandb=config.logging.wandb,
    config=config.to_dict(),
    start_step=start or -1,  # At 0 nothing counts yet, not even an evaluation of step 0.
    primary=primary,
  )
  progress = metrics.Progress(total, start, enabled=primary and config.logging.progress)
  about = {'config': json.loads(config_lib.to_json(config)), 'data': _identity(source)}
  if start:
    progress.say(f'resuming {workdir} at step {start} of {total}')

  def report(read: tuple[int, dict[str, float]] | None) -> None:
    """Logs and checks the metrics of a step that is over."""
    if read is None:
      return
    step, values = read
    scalars = {f'train/{name}': value for name, value in values.items()} | timer.scalars()
    scalars |= {
      f'train/{name}': float(schedule(step - 1)) for name, schedule in run.schedules.items()
    }
    writer.write(step, scalars)
    progress.update(step, scalars)
    guard.check(step, values)

  def evaluate(step: int) -> None:
    with timer.paused():
      if scalars := evaluation(state):
        writer.write(step, scalars)
        is_best = best.offer(step, scalars, state)
        progress.say(_evaluation_line(step, scalars) + '  (the best so far)' * is_best)

  batches = data.train_batches(
    source,
    settings,
    seed=config.seed,
    step=start,
    batch_size=config.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    classes=needed_classes(run, source),
  )
  best = Best(config.checkpoint.best, workdir, about, config.checkpoint.asynchronous)
  with writer, progress, best, contextlib.closing(batches):
    if start == 0 and config.evaluation.at_start:
      state = evaluation.recalibrated(state)
      evaluate(0)
    preempted = False
    for step in range(start + 1, total + 1):
      if preempted:
        raise distributed.Preempted(
          f'told to end after step {step - 1} of {total}; the same command goes on from the newest checkpoint'
        )
      with timer.waiting():
        batch = sharding.put_batch(next(batches), mesh)
      if step == start + 1:
        with timer.paused():
          train_step = train_step.lower(state, batch).compile()
      if profile.begins(step):
        with timer.paused():
          profile.start()
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, values = train_step(state, batch)
      if profile.ends(step):
        jax.block_until_ready(values)
        with timer.paused():
          if profile.stop():
            progress.say(f'{len(profile.steps)} steps were traced into {profile.directory}')
      timer.tick(config.batch_size)
      report(late.flush())  # The step before: reading it doesn't stall the one just launched.
      progress.update(step)
      last = step == total
      if last or step % config.log_every == 0:
        late.push(step, values)
      preempted = distributed.preempted(step)
      saves = last or preempted
      saves = saves or (config.checkpoint.every and step % config.checkpoint.every == 0)
      evaluates = last or (config.eval_every and step % config.eval_every == 0)
      evaluates = evaluates or evaluation.due(step)
      if not (saves or evaluates):
        continue
      report(late.flush())
      if not guard.check_finite(step, {name: float(value) for name, value in values.items()}):
        continue  # Neither judged nor saved: the last checkpoint stays the last good one.
      with timer.paused():
        state = evaluation.recalibrated(state)
      # The evaluation first: a step that is saved has been evaluated, whenever the run is killed.
      if evaluates:
        evaluate(step)
      if saves:
        with timer.paused():
          best.wait()
          checkpoints.save(step, state, about | {'step': step}, force=last or preempted)
    if batches.bad_count:
      logging.warning(
        '%d undecodable images were replaced: %s', batches.bad_count, batches.bad_names
      )
  if primary:
    print('\n'.join(filter(None, (_summary(workdir, total), best.line()))))


# What a person looks for in an evaluation, in this order.
_HEADLINES = {
  'eval/knn_top1': 'kNN top-1',
  'eval/top1': 'top-1',
  'eval/top5': 'top-5',
  'eval/linear_cached_top1': 'linear top-1',
  'eval/miou': 'mIoU',
  'eval/pixel_accuracy': 'pixel accuracy',
}


def _evaluation_line(step: int, scalars: Mapping[str, float]) -> str:
  fields = [f'evaluation at step {step}:']
  fields += [f'{name} {scalars[key]:.2%}' for key, name in _HEADLINES.items() if key in scalars]
  heads = [value for key, value in scalars.items() if key.startswith('eval/top1_')]
  if heads:
    fields.append(f'top-1 of {len(heads)} heads {min(heads):.2%} to {max(heads):.2%}')
  if 'eval/reconstruction' in scalars:
    share = scalars['eval/reconstruction'] / max(scalars['eval/reconstruction_of_mean'], 1e-12)
    fields.append(f'reconstruction error {share:.1%} of predicting the mean')
  return '  '.join(fields)


def _summary(workdir: str, total: int) -> str:
  """What a person wants to know at the end: the features before and after, and where everything is."""
  logged = metrics.read_metrics(workdir)
  lines = [f'done: {total} steps in {workdir}']
  for key, name in _HEADLINES.items():
    if found := [line for line in logged if key in line]:
      ends = found if len(found) < 2 else (found[0], found[-1])
      lines.append(
        f'{name}: ' + ', '.join(f'{line[key]:.2%} at step {line["step"]}' for line in ends)
      )
  return '\n'.join(lines)
