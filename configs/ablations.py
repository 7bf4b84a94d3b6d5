"""FOLK's ablations, each by its name: a switch of the configuration, never other code.

  python configs/ablations.py                                                              # lists them
  python -m folk_jax.main --config=configs/ablations.py:no_distillation --workdir=runs/no_distillation
  python -m folk_jax.main --config=configs/ablations.py:filter_random,cifar10,path=DIR --workdir=runs/filter_random
  python -m folk_jax.main --config=configs/ablations.py:no_blur,portion_low,model=vit_b --workdir=runs/both

Several names are applied in the order of the table. The base is vit_s.py, or what model= names.
"""

import ml_collections

from folk_jax import config as config_lib

_NO_TEACHER = {
  'objective.distillation_weight': 0.0,
  'teacher.enabled': False,
  'evaluation.which': 'student',
  # No loss reaches the class token then.
  'evaluation.feature': 'mean_patch',
}
_FILTERS = {
  'com': 'Com alone: the strongest frequencies are kept',
  'rcom': 'RCom alone: the strongest frequencies are removed',
  'radial': "MFM's low- or high-pass by a disk",
  'low_pass': 'low-pass by a disk alone',
  'high_pass': 'high-pass by a disk alone',
  'random': 'as many frequencies at random',
  'random_block': 'a random square block of frequencies',
  'random_band': 'a random radial band',
  'magnitude_weighted': 'frequencies at random, by their magnitude',
  'gabor': "the image's strongest Gabor bands",
  'gabor_random': 'Gabor bands at random',
  'wavelet': "the image's strongest wavelet bands",
  'wavelet_random': 'wavelet bands at random',
}

# Name -> (what it asks, fields by their dotted names).
ABLATIONS = {
  'none': ('FOLK as it is, to compare with', {}),
  'no_distillation': ('what the teacher adds: reconstruction alone', _NO_TEACHER),
  'no_reconstruction': (
    'what the reconstruction adds: distillation from filtered views alone',
    {'objective.reconstruction_weight': 0.0},
  ),
  **{f'filter_{name}': (what, {'objective.filter': name}) for name, what in _FILTERS.items()},
  'filter_per_channel': (
    'Com and RCom with a mask for each channel',
    {'objective.ranking': 'per_channel'},
  ),
  'portion_low': ('a portion of 0.005 alone', {'objective.portions': (0.005,)}),
  'portion_middle': ('a portion of 0.01 alone', {'objective.portions': (0.01,)}),
  'portion_high': ('a portion of 0.05 alone', {'objective.portions': (0.05,)}),
  'portion_wide': (
    'a wider list of portions',
    {'objective.portions': (0.005, 0.01, 0.05, 0.1, 0.2)},
  ),
  'clamp': ("filtered views clamped to [0, 1], as in MFM's code", {'objective.clamp': True}),
  'pooled': ("one mean over the batch, as in MFM's code", {'objective.reduce': 'pooled'}),
  'squared': ('the squared frequency distance, gamma 2', {'objective.gamma': 2.0}),
  'no_blur': (
    'views without blur, which removes what RCom asks for',
    {'views.view_1.blur_probability': 0.0, 'views.view_2.blur_probability': 0.0},
  ),
  'blur': (
    'views with the blur of the ImageNet recipe, where a small recipe has none',
    {'views.view_1.blur_probability': 1.0, 'views.view_2.blur_probability': 0.1},
  ),
  'patch_distillation': ("iBOT's patch loss on all patches", {'objective.patch_weight': 1.0}),
  'prototypes_low': ('K = 1024', {'projection.outputs': 1024}),
  'prototypes_high': ('K = 65536', {'projection.outputs': 65536}),
  'momentum_low': ('a teacher momentum that starts at 0.99', {'teacher.momentum': 0.99}),
  'momentum_high': ('a teacher momentum that starts at 0.999', {'teacher.momentum': 0.999}),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: one or more names, model=vit_s|vit_b|vit_l|resnet50, cifar10, smoke, data=SOURCE, name=NAME, path=DIR."""
  names = dict.fromkeys(ABLATIONS, False)
  models = ('vit_s', 'vit_b', 'vit_l', 'resnet50')
  c, given = config_lib.base_recipe(__file__, arg, models=models, **names)
  for name, (_, fields) in ABLATIONS.items():
    if given[name]:
      c.update_from_flattened_dict(fields)
  return c


def _list() -> None:
  for name, (what, fields) in ABLATIONS.items():
    changes = ', '.join(f'{field}={value}' for field, value in fields.items()) or 'nothing'
    print(f'{name:26} {what}\n{"":26}   {changes}')


if __name__ == '__main__':
  _list()
