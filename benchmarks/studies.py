"""What the study compares: sets of rows, each a method (or an ablation) with its recipe. benchmarks/study.py runs them.

Nothing here is tuned for one row: within a study all rows share backbone, batch, length, learning rate and evaluations,
and differ in what a method's recipe is. The parts of a row are separate commands, so that cheap ones come first.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Method:
  """A line of a study's tables.

  Attributes:
    name: as the tables have it.
    recipe: a file of configs/.
    arg: its arguments, without what the study adds.
    changes: fields of the configuration, by their dotted names.
    reference: the line of the same study that it is compared with: a random network that is judged by the same
      feature, or FOLK as it is; '' for the references themselves.
  """

  name: str
  recipe: str
  arg: str = ''
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  reference: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """Rows that may be compared with one another.

  Attributes:
    name: of the JSON, and of --study.
    title: a heading.
    about: sentences for the page: data, network, length.
    methods: its lines. The first one's computation is what 'equal compute' means.
    arg: argument of every recipe.
    evaluate: argument of configs/evaluate.py beside `arg`.
    steps: optimiser steps of every row at equal epochs.
    batch_size: images a step.
    seeds: default seeds.
    changes: fields of every training run.
    parts: name of an evaluation part -> flags of configs/evaluate.py; 'train' is no such part.
    stages: (budget, part) in the order in which they are run, each for all seeds and methods.
    data: which images --path must hold.
  """

  name: str
  title: str
  about: str
  methods: tuple[Method, ...]
  arg: str
  evaluate: str
  steps: int
  batch_size: int
  seeds: tuple[int, ...]
  changes: Mapping[str, Any]
  parts: Mapping[str, tuple[str, ...]]
  stages: tuple[tuple[str, str], ...]
  data: str


# What a random network scores is the line that every other has to beat: at a learning rate of 0 a step changes nothing.
_UNTRAINED = {
  'optimizer.learning_rate': 0.0,
  'optimizer.final_learning_rate': 0.0,
  'optimizer.warmup_epochs': 0.0,
  'optimizer.freeze_last_layer_epochs': 0.0,
}
_CLASS_TOKEN = 'random initialisation, class token'
_MEAN_OF_PATCHES = 'random initialisation, mean of patches'
_RANDOM = (
  Method(_CLASS_TOKEN, 'cifar10.py', '', _UNTRAINED),
  Method(_MEAN_OF_PATCHES, 'cifar10.py', '', _UNTRAINED | {'evaluation.feature': 'mean_patch'}),
)
UNTRAINED_STEPS = 1

# Methods with a teacher are judged by the class token, the others by the mean of patches: as their recipes have it.
_METHODS = (
  Method('FOLK', 'cifar10.py', reference=_CLASS_TOKEN),
  Method('MFM', 'mfm.py', reference=_MEAN_OF_PATCHES),
  Method('MFM with Com/RCom', 'mfm.py', 'filter=com_rcom', reference=_MEAN_OF_PATCHES),
  Method('super-resolution', 'restoration.py', 'task=super_resolution', reference=_MEAN_OF_PATCHES),
  Method('deblur', 'restoration.py', 'task=deblur', reference=_MEAN_OF_PATCHES),
  Method('denoise', 'restoration.py', 'task=denoise', reference=_MEAN_OF_PATCHES),
  Method('wavelet MIM', 'wavelet_mim.py', reference=_MEAN_OF_PATCHES),
  Method('MAE', 'mae.py', reference=_MEAN_OF_PATCHES),
  Method('DINO', 'dino.py', reference=_CLASS_TOKEN),
  Method('iBOT', 'ibot.py', reference=_CLASS_TOKEN),
)


def _resnets(depth: int) -> tuple[Method, ...]:
  random = f'random initialisation, ResNet-{depth}'
  size = {'model.depth': depth, 'model.width': 64}
  return (
    Method(f'FOLK, ResNet-{depth}', 'resnet50.py', '', size, random),
    Method(f'MFM, ResNet-{depth}', 'mfm.py', 'model=resnet50', size, random),
    Method(f'DINO, ResNet-{depth}', 'dino.py', 'model=resnet50', size, random),
    Method(random, 'resnet50.py', '', size | _UNTRAINED),
  )


def _full_size(methods: tuple[Method, ...], size: str) -> tuple[Method, ...]:
  """The same methods in their recipes for a ViT of full size: FOLK has a recipe a size, the others an argument."""
  return tuple(
    dataclasses.replace(m, recipe=f'{size}.py')
    if m.recipe == 'cifar10.py'
    else dataclasses.replace(m, arg=','.join(filter(None, (f'model={size}', m.arg))))
    for m in methods
  )


# Judged by the mean of patches, as what is compared with it: a line that is no ablation.
_NONE_BY_PATCHES = 'none, mean of patches'


def ablations(names: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> tuple[Method, ...]:
  """The lines of configs/ablations.py, all or those named, FOLK as it is first.

  What an ablation changes is said once more as fields, so that a study's own changes don't undo it.
  """
  spec = importlib.util.spec_from_file_location('ablations', ROOT / 'configs' / 'ablations.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  lines = [
    Method(
      name,
      'ablations.py',
      name,
      changes=module.ABLATIONS[name][1],
      reference={'none': '', 'no_distillation': _NONE_BY_PATCHES}.get(name, 'none'),
    )
    for name in names or module.ABLATIONS
    if name not in without
  ]
  patches = Method(
    _NONE_BY_PATCHES, 'ablations.py', 'none', changes={'evaluation.feature': 'mean_patch'}
  )
  return (lines[0], patches, *lines[1:])


_QUIET = {
  'log_every': 30,
  'logging.tensorboard': False,
  'checkpoint.permanent_every': 0,
  'report': False,
}
# Judged by the parts: during training only the loss is watched.
_UNJUDGED = {
  **_QUIET,
  'eval_every': 0,
  'evaluation.at_start': False,
  'evaluation.knn': (),
  'evaluation.held_out_images': 0,
}
# Judged at the end of training, on images held out of the training split: what a default may be chosen by.
_VALIDATED = {
  **_QUIET,
  'eval_every': 0,
  'evaluation.at_start': False,
  'data.validation': 0.1,
  'evaluation.split': 'validation',
  'evaluation.held_out_images': 0,
}

_FROZEN = ('--config.evaluations=("knn","low_shot","linear_cached")',)
_FEW = (
  '--config.low_shot.images_a_class=(1,5,10)',
  '--config.low_shot.shares=(0.01,0.1)',
  '--config.low_shot.draws=3',
)


def _corruptions(limit: int, severities: str) -> tuple[str, ...]:
  return (
    '--config.evaluations=("robustness",)',
    '--config.robustness.attacks=()',
    f'--config.robustness.severities={severities}',
    f'--config.robustness.limit={limit}',
  )


def _finetune(steps: int) -> tuple[str, ...]:
  return ('--config.evaluations=("finetune",)', f'--config.finetune.total_steps={steps}')


_EPOCHS_THEN_COMPUTE = (
  ('epochs', 'train'),
  ('epochs', 'frozen'),
  ('epochs', 'finetune'),
  ('epochs', 'corruptions'),
  ('compute', 'train'),
  ('compute', 'frozen'),
)

_VIT_S_4 = {'model.width': 384, 'model.depth': 12, 'model.heads': 6, 'model.patch': 4}
_LONGER = {
  # For thousands of steps where the small recipe has hundreds.
  'teacher.momentum': 0.99,
  'teacher.momentum_final': 1.0,
  'optimizer.learning_rate': 1e-3,
  'optimizer.warmup_epochs': 5.0,
}

STUDIES = {
  study.name: study
  for study in (
    Study(
      name='cpu',
      title='Every method, a small ViT, CIFAR-10 (JPEG)',
      about=(
        'A ViT of width 128, depth 4 and patch 8 at 32 px (16 tokens), one pass over the 50,000 training images in '
        'batches of 128, the recipe `:cifar10` of each method. Test images are looked at once, at the end; nothing was '
        'tuned. This is smoke scale: what holds here need not hold for ImageNet.'
      ),
      methods=_METHODS + _RANDOM,
      arg='cifar10',
      evaluate='',
      steps=390,
      batch_size=128,
      seeds=(0, 1, 2),
      changes=_UNJUDGED | {'checkpoint.every': 0},
      parts={
        # Two values of C and two folds, where the command has four and three: minutes of two cores a row.
        'frozen': (
          *_FROZEN,
          *_FEW,
          '--config.linear_cached.regularisers=(1e3,1e4)',
          '--config.linear_cached.folds=2',
        ),
        'finetune': _finetune(200),
        'corruptions': _corruptions(500, '(1,3,5)'),
      },
      stages=_EPOCHS_THEN_COMPUTE,
      data='CIFAR-10 (JPEG)',
    ),
    Study(
      name='cpu_ablations',
      title="FOLK's ablations, a small ViT, CIFAR-10 (JPEG)",
      about=(
        'The network, batch and length of the study above. Judged on a tenth of the training images that training did '
        'not see, by kNN and a linear classifier: test images chose nothing.'
      ),
      methods=ablations(
        (
          'none',
          'no_distillation',
          'no_reconstruction',
          'filter_com',
          'filter_rcom',
          'filter_random',
          'filter_radial',
          'filter_low_pass',
          'filter_high_pass',
          'filter_gabor',
          'filter_wavelet',
          'portion_low',
          'portion_middle',
          'portion_high',
          'portion_wide',
          'clamp',
          'filter_per_channel',
          'pooled',
          'squared',
          'blur',
          'patch_distillation',
        )
      ),
      arg='cifar10',
      evaluate='',
      steps=350,
      batch_size=128,
      seeds=(0, 1, 2),
      changes=_VALIDATED | {'checkpoint.every': 0, 'evaluation.linear_cached_every': 350},
      parts={},
      stages=(('epochs', 'train'),),
      data='CIFAR-10 (JPEG)',
    ),
    Study(
      name='cifar10',
      title='Every method, ViT-S/4, CIFAR-10 (JPEG)',
      about='ViT-S with patches of 4 pixels at 32 px (64 tokens), 100 epochs in batches of 512, on a GPU.',
      methods=_METHODS + _RANDOM,
      arg='cifar10',
      evaluate='',
      steps=9700,
      batch_size=512,
      seeds=(0, 1, 2),
      changes=_UNJUDGED | _VIT_S_4 | _LONGER | {'checkpoint.every': 2000, 'data.workers': 12},
      parts={
        'frozen': _FROZEN + _FEW,
        'finetune': _finetune(5000),
        'corruptions': _corruptions(0, '(1,2,3,4,5)'),
      },
      stages=_EPOCHS_THEN_COMPUTE,
      data='CIFAR-10 (JPEG)',
    ),
    Study(
      name='imagenet10',
      title='Every method, ViT-S/16, ten classes of ImageNet',
      about=(
        'ViT-S/16 at 224 px on 6,500 photographs of ten classes, 200 epochs in batches of 256, on a GPU; each method '
        'with its own ImageNet recipe, but one learning rate and warm-up.'
      ),
      methods=_full_size(_METHODS + _RANDOM, 'vit_s'),
      arg='data=folder',
      evaluate='model=vit_s',
      steps=5000,
      batch_size=256,
      seeds=(0,),
      changes=_UNJUDGED | _LONGER | {'checkpoint.every': 1000, 'data.workers': 14},
      parts={
        'frozen': _FROZEN + _FEW,
        'finetune': _finetune(2000),
        'corruptions': _corruptions(0, '(1,2,3,4,5)'),
      },
      stages=_EPOCHS_THEN_COMPUTE,
      data='the ten classes of ImageNet',
    ),
    Study(
      name='ablations',
      title="FOLK's ablations, ViT-S/4, CIFAR-10 (JPEG)",
      about=(
        'ViT-S with patches of 4 pixels at 32 px, 50 epochs in batches of 512, on a GPU. Judged on a tenth of the '
        'training images that training did not see.'
      ),
      # Views of 32 px have no blur, and a momentum from 0.99 on is this study's own.
      methods=ablations(without=('no_blur', 'momentum_low')),
      arg='cifar10',
      evaluate='',
      steps=4400,
      batch_size=512,
      seeds=(0, 1, 2),
      changes=_VALIDATED
      | _VIT_S_4
      | _LONGER
      | {
        'checkpoint.every': 2200,
        'data.workers': 12,
        'evaluation.linear_cached_every': 4400,
      },
      parts={},
      stages=(('epochs', 'train'),),
      data='CIFAR-10 (JPEG)',
    ),
    Study(
      name='cnn',
      title='Convolutions: ResNet-18 and ResNet-50, CIFAR-10 (JPEG)',
      about=(
        'Why a CNN gains less: the same methods on ResNets of CIFAR size, 50 epochs in batches of 512, on a GPU. '
        'A frequency that a filter removes from the whole image is missing from every receptive field; a patch that is '
        'masked is not.'
      ),
      methods=_resnets(18) + _resnets(50),
      arg='cifar10',
      evaluate='model=resnet50',
      steps=4850,
      batch_size=512,
      seeds=(0,),
      changes=_UNJUDGED | _LONGER | {'checkpoint.every': 2000, 'data.workers': 12},
      parts={'frozen': _FROZEN + _FEW, 'corruptions': _corruptions(0, '(1,2,3,4,5)')},
      stages=(('epochs', 'train'), ('epochs', 'frozen'), ('epochs', 'corruptions')),
      data='CIFAR-10 (JPEG)',
    ),
  )
}
