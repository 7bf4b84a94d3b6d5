"""From a configuration to what it names: objective, optimiser, step, data settings. Only here is a ConfigDict read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from folk_jax import data, models
from folk_jax.models import attention, fused_attention
from folk_jax.objectives import LocalViews, Objective, Parts, make_objective
from folk_jax.objectives.base import with_statistics
from folk_jax.signal.augment import Augmentation
from folk_jax.train import state as state_lib
from folk_jax.train.optimizer import OptimizerSettings, make_optimizer
from folk_jax.train.state import TrainState
from folk_jax.train.step import Step, make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
  """What a configuration becomes, before any data is read or any parameter exists.

  Attributes:
    objective: the method.
    total_steps: optimiser steps of the whole run.
    new_state: jittable, (key, trees by name that replace fresh parameters) to a `TrainState` at step 0.
    step: the pure train step.
    schedules: functions of the step that are logged beside the metrics.
  """

  objective: Objective
  total_steps: int
  new_state: Callable[[jax.Array, Mapping[str, Any]], TrainState]
  step: Step
  schedules: Mapping[str, Callable[[Any], jax.Array]]


def make_run(config: ml_collections.ConfigDict, images: int, classes: int = 0) -> Run:
  """Builds objective, optimiser and step for a training set of `images` samples. Touches no device memory.

  `classes` is the number of its classes, 0 where it has no labels or none are needed.
  """
  steps_per_epoch = images / config.batch_size
  total_steps = config.total_steps or max(1, round(config.epochs * steps_per_epoch))
  dtype = compute_dtype(config.model.dtype)
  views = [config.views[name] for name in sorted(config.views)]
  backbone = make_backbone(config)
  parts = Parts(
    backbone=backbone,
    model=config.model.name,
    image_size=config.image_size,
    patch=backbone.stride,
    projection=dict(config.projection) if 'projection' in config else None,
    augmentations=tuple(from_config(Augmentation, view) for view in views),
    mean=tuple(config.data.mean),
    std=tuple(config.data.std),
    steps_per_epoch=steps_per_epoch,
    has_teacher=config.teacher.enabled,
    dtype=dtype,
    local_views=_local_views(config),
    classes=classes,
    spectral_backend=spectral_backend(config.spectral_backend),
  )
  settings = dict(config.objective)
  objective = make_objective(settings.pop('name'), parts, settings)
  optimizer, schedules = make_optimizer(
    OptimizerSettings(**config.optimizer),
    batch_size=config.batch_size,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
    teacher_parts=objective.teacher_parts if config.teacher.enabled else (),
    momentum=(config.teacher.momentum, config.teacher.momentum_final),
  )

  def new_state(rng: jax.Array, loaded: Mapping[str, Any]) -> TrainState:
    params, extra = objective.init(rng, None)
    loaded = dict(loaded)
    if (moments := loaded.pop('batch_stats', None)) is not None:
      extra = with_statistics(extra, moments)
    return state_lib.create(params | loaded, extra, optimizer)

  step = make_train_step(objective, optimizer, seed=config.seed, accumulate=config.accumulate)
  return Run(objective, total_steps, new_state, step, schedules)


def make_backbone(config: ml_collections.ConfigDict) -> Any:
  """The backbone that `config.model` describes; a layer_scale of 0 is none."""
  fields = dict(config.model) | {'dtype': compute_dtype(config.model.dtype)}
  name = fields.pop('name')
  if 'attention' in fields:
    fields['attention'] = _attention(fields)
  if 'scan_unroll' in fields:
    fields['scan_unroll'] = _scan_unroll(fields)
  if 'layer_scale' in fields:
    fields['layer_scale'] = fields['layer_scale'] or None
  return models.make_backbone(name, config.image_size, **fields)


def _local_views(config: ml_collections.ConfigDict) -> LocalViews | None:
  """The device's part of `config.local_views`, which recipes of methods with local crops have."""
  if 'local_views' not in config or not config.local_views.count:
    return None
  local = config.local_views
  return LocalViews(local.count, local.size, from_config(Augmentation, local))


def compute_dtype(name: str) -> str:
  """'auto' is bfloat16 on TPU and GPU and float32 on CPU, where XLA gains nothing from bfloat16."""
  return _chosen('model.dtype', name)


def spectral_backend(name: str) -> str:
  """'auto' is 'matmul' on TPU, where it moves fewer bytes, and 'fft' elsewhere."""
  return _chosen('spectral_backend', name)


# What 'auto' stands for, by platform.
_AUTO = {
  'model.dtype': {'tpu': 'bfloat16', 'gpu': 'bfloat16', 'cpu': 'float32'},
  'model.attention': {'tpu': 'pallas', 'gpu': 'cudnn', 'cpu': 'xla'},
  'spectral_backend': {'tpu': 'matmul', 'gpu': 'fft', 'cpu': 'fft'},
}


def _chosen(field: str, value: str, platform: str = '') -> str:
  if value != 'auto':
    return value
  choices = _AUTO[field]
  return choices.get(platform or jax.default_backend(), choices['gpu'])


def for_platform(config: ml_collections.ConfigDict, platform: str) -> ml_collections.ConfigDict:
  """A copy of `config` with what 'auto' stands for on 'tpu', 'gpu' or 'cpu', whatever this machine has."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.dtype = _chosen('model.dtype', config.model.dtype, platform)
    config.spectral_backend = _chosen('spectral_backend', config.spectral_backend, platform)
    if 'attention' in config.model:
      config.model.attention = _attention(config.model, platform)
    if 'scan_unroll' in config.model:
      config.model.scan_unroll = _scan_unroll(config.model, platform)
  return config


def _attention(model: Mapping[str, Any], platform: str = '') -> str:
  """'auto' is the kernel of TPUs or of NVIDIA's GPUs, where it takes these heads and products, and 'xla' elsewhere."""
  name = _chosen('model.attention', model['attention'], platform)
  if model['attention'] != 'auto':
    return name
  if name == 'cudnn':
    dtype = _chosen('model.dtype', model['dtype'], platform)
    taken = attention.takes_cudnn(dtype, model['width'] // model['heads'])
    taken &= bool(platform) or not attention.is_too_old(jax.devices()[0])
  else:
    taken = fused_attention.fits(model['width'], model['heads'])
  return name if taken else 'xla'


def _scan_unroll(model: Mapping[str, Any], platform: str = '') -> int:
  """0 is 1 on CPUs and all blocks elsewhere.

  TPUs and GPUs copy what a turn of a loop keeps for the backward pass into arrays of all layers, and out again: without
  the loop FOLK's ViT-B moves fewer bytes (docs/performance.md).
  """
  everything = 1 if (platform or jax.default_backend()) == 'cpu' else model['depth']
  return model['scan_unroll'] or everything


def data_settings(config: ml_collections.ConfigDict) -> data.DataSettings:
  """The data room's settings: `config.data` and the host's part of `config.views`."""
  views = tuple(from_config(data.ViewSettings, config.views[name]) for name in sorted(config.views))
  fields = {k: v for k, v in config.data.items() if k not in ('mean', 'std')}
  if 'local_views' in config and config.local_views.count:
    local = config.local_views
    view = from_config(data.ViewSettings, local)
    fields['local_views'] = data.LocalViewSettings(local.count, local.size, view)
  return data.DataSettings(image_size=config.image_size, views=views, **fields)


def from_config(kind: type, config: Mapping[str, Any]) -> Any:
  """A dataclass from those keys of `config` that it knows; a view's keys are shared between host and device."""
  return kind(**{field.name: config[field.name] for field in dataclasses.fields(kind)})
