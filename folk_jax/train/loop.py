"""One pre-training run, from a configuration to a workdir: this file joins the rooms."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from absl import logging
from etils import epath
from jax.sharding import Mesh

from folk_jax import checkpoint, data, distributed
from folk_jax import config as config_lib
from folk_jax.errors import UserError
from folk_jax.models import attention
from folk_jax.report import at_end
from folk_jax.train import initial, metrics, sharding
from folk_jax.train import workdir as workdir_lib
from folk_jax.train.best import Best, check_metric
from folk_jax.train.debug import Debugger
from folk_jax.train.due import Due
from folk_jax.train.evaluation import Evaluation, needed_classes
from folk_jax.train.guard import GuardSettings, watch
from folk_jax.train.profile import Profile
from folk_jax.train.run import Run, data_settings, make_run
from folk_jax.train.state import TrainState
from folk_jax.train.watchdog import Watchdog

# What takes minutes in health may take this many times `watchdog.seconds` and `watchdog.limit`.
_PATIENCE = 10.0


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
) -> tuple[TrainState, dict[str, Any]]:
  """The newest checkpoint's state, or one at step 0, on the mesh; and what the checkpoint says of itself."""
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
    saw = about.get('data')  # A checkpoint of format 0 may not say it.
    if saw not in (None, workdir_lib.identity(source)):
      raise UserError(
        f'the run in this workdir saw {saw["images"]} images and config.data now gives '
        f'{len(source)}, or other classes: give the data of the run, or another --workdir.'
      )
    return state, about
  if aside := checkpoints.set_aside():
    raise UserError(
      f'{checkpoints.directory} holds damaged checkpoints alone ({", ".join(aside)}): bring a whole one back from a '
      'copy, or start again in another --workdir'
    )
  return new_state(config, run, shardings), {}


def new_state(config: ml_collections.ConfigDict, run: Run, shardings: Any) -> TrainState:
  """The state that a run begins with: fresh weights, or those that `config.init_from` names."""
  key = jax.random.key(config.seed)
  loaded = {}
  if config.init_from:
    loaded = initial.load(
      config.init_from,
      jax.eval_shape(run.new_state, key, {}).params,
      image_size=config.image_size,
      patch=run.objective.parts.patch,
      which=config.init_which,
      heads=getattr(run.objective.parts.backbone, 'heads', None),
    )
  return jax.jit(run.new_state, out_shardings=shardings)(key, loaded)


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
  workdir_lib.check_workdir(config, epath.Path(workdir).expanduser())
  with contextlib.ExitStack() as stack:
    # Entered first, left last: it watches the data's folder being listed, and the last checkpoint being written.
    waits = stack.enter_context(
      Watchdog(**config.watchdog, workdir=workdir, process=jax.process_index())
    )
    waits('the data to be listed', patience=_PATIENCE)
    settings = data_settings(config)
    source = data.make_source(settings, 'train')
    run = make_run(config, len(source), len(source.class_names))
    _check_kernel(run)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    waits('the other processes to agree on the workdir')
    check_held = stack.enter_context(workdir_lib.held(workdir))
    # Again, now that nobody else starts there. What checkpoints clear away is this run's from here on.
    workdir_lib.check_workdir(config, epath.Path(workdir).expanduser())
    checkpoints = checkpoint.Checkpoints(
      str(epath.Path(workdir).expanduser() / 'checkpoints'),
      config.checkpoint.every,
      config.checkpoint.keep,
      config.checkpoint.permanent_every,
      config.checkpoint.asynchronous,
      before_save=check_held,
    )
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(checkpoints)
    waits('the newest checkpoint to be read, or first weights', patience=_PATIENCE)
    state, meta = _first_state(config, run, source, checkpoints, mesh)
    begun = int(state.step)
    _train(config, workdir, run, state, meta, source, settings, checkpoints, mesh, timer, waits)
  if config.report and not jax.process_index():
    if begun < run.total_steps or at_end.page_missing(workdir):
      at_end.write_page(workdir, distributed.told)


def _check_kernel(run: Run) -> None:
  backbone = run.objective.parts.backbone
  kernels = {'tpu': 'pallas', 'gpu': 'cudnn'}
  name = getattr(backbone, 'attention', '')
  if name and name == kernels.get(jax.default_backend()):
    tokens = 1 + backbone.grid[0] * backbone.grid[1]
    # On one device, whatever mesh an evaluation has set: XLA can't cut a kernel.
    with jax.set_mesh(sharding.make_mesh(1, jax.local_devices()[:1])):
      attention.self_check(name, backbone.width, backbone.heads, tokens, backbone.dtype)


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
    checkpoint.Checkpoints(str(directory), 0, 1, read_only=True) as checkpoints,
  ):
    state, _ = _first_state(config, run, source, checkpoints, mesh)
    return Evaluation(config, run, settings, mesh, source)(state)


def _train(
  config: ml_collections.ConfigDict,
  workdir: str,
  run: Run,
  state: TrainState,
  meta: Mapping[str, Any],
  source: data.Source,
  settings: data.DataSettings,
  checkpoints: checkpoint.Checkpoints,
  mesh: Mesh,
  timer: metrics.StepTimer,
  waits: Watchdog,
) -> None:
  """Steps from `state` to the end: data, step, metrics a step late, guard, evaluations, checkpoints."""
  start, total = int(state.step), run.total_steps
  primary = jax.process_index() == 0
  if start == total:
    if primary:
      print(f'the run in {workdir} is complete: nothing is left to train')
      print(_summary(workdir, total))
    return
  waits('the evaluation to be prepared', patience=_PATIENCE)
  train_step = compile_step(run, state, mesh)
  debugger = Debugger(run.objective, run.step, config.seed, state, mesh) if config.debug else None
  evaluation = Evaluation(config, run, settings, mesh, source)
  if config.checkpoint.best:
    check_metric(config.checkpoint.best, evaluation.names(state))
  guard = watch(
    GuardSettings(**config.guard),
    workdir,
    seed=config.seed,
    start=start,
    learning_rate=run.schedules['learning_rate'],
  )
  due = Due(total, config.checkpoint.every, config.eval_every, evaluation.due)
  if start:
    guard.restore(meta)
    due.restore(meta)
  waits('metrics, and the best checkpoint, to be opened', patience=_PATIENCE)
  # From here on the workdir is this run's: no mistake of the user's is left that another config would mend.
  workdir_lib.write_config(config, epath.Path(workdir).expanduser())
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
  about = {'config': json.loads(config_lib.to_json(config)), 'data': workdir_lib.identity(source)}
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
    scalars['train/skipped_steps'] = guard.skipped_by(step)
    writer.write(step, scalars)
    progress.update(step, scalars)
    guard.check(step, values)

  def evaluate(step: int) -> None:
    waits(f'the evaluation at step {step}', data.waiting_for, patience=_PATIENCE)
    with timer.paused():
      if scalars := evaluation(state, due.evaluations):
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
    ledger=data.Ledger(workdir, jax.process_index()),
  )
  best = Best(config.checkpoint.best, workdir, about, config.checkpoint.asynchronous)
  with writer, progress, best, contextlib.closing(batches):
    preempted = distributed.preempted(start)  # Told so before it began: then nothing is compiled.
    if start == 0 and config.evaluation.at_start and not preempted:
      state = evaluation.recalibrated(state)
      evaluate(0)
    if (
      due.evaluations and not preempted
    ):  # Of the step that was saved; the run was told to leave before.
      evaluate(start)
      due.evaluated()
    for step in range(start + 1, total + 1):
      if preempted:
        raise distributed.Preempted(
          f'told to end after step {step - 1} of {total}; the same command goes on from there'
        )
      waits(f'the batch of step {step}', data.waiting_for)
      with timer.waiting():
        rows = next(batches)
        batch, index_B = sharding.put_batch(rows, mesh), rows['index']
        del rows  # Hundreds of megabytes that needn't wait for the next ones.
      if step == start + 1:
        waits.compiling('the train step')
        with timer.paused():
          train_step = train_step.lower(state, batch).compile()
      if debugger:
        waits(f'the checks of step {step}', patience=_PATIENCE)
        debugger.check(step, state, batch)
      if profile.begins(step):
        with timer.paused():
          profile.start()
      waits(f'step {step} on the device')
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        state, values = train_step(state, batch)
      guard.launched(step, index_B, values)
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
      waits(f'the other processes after step {step}')
      preempted = distributed.preempted(step)
      if not due.falls(step, preempted):
        continue
      waits(f'step {step} on the device')
      report(late.flush())
      if not (guard.settle(step) or last or preempted):
        continue  # Judged and saved once a step counts again: that these weights can make one isn't known.
      waits(f'statistics at step {step}', data.waiting_for, patience=_PATIENCE)
      with timer.paused():
        state = evaluation.recalibrated(state)
      # The evaluation first: a step that is saved has been evaluated, whenever the run is killed. A run that is told
      # to leave has no time for it: the next start makes up for it.
      if due.evaluations and (last or not preempted):
        evaluate(step)
        due.evaluated()
      if due.saves:
        waits(f'the checkpoint of step {step}, or one before, to be written', patience=_PATIENCE)
        with timer.paused():
          best.wait()
          kept = {'step': step, 'guard': guard.kept(), 'due': due.kept()}
          checkpoints.save(step, state, about | kept, force=True)
        due.saved()
    waits('the last checkpoint to be written', patience=_PATIENCE)
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
