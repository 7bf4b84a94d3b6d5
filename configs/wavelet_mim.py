"""Wavelet MIM, after WaMIM (arXiv 2503.00782, AAAI 2025), on ImageNet-1K.

  python -m folk_jax.main --config=configs/wavelet_mim.py --workdir=runs/wavelet_mim_vit_b
  python -m folk_jax.main --config=configs/wavelet_mim.py:model=vit_s --workdir=runs/wavelet_mim_vit_s
  python -m folk_jax.main --config=configs/wavelet_mim.py:cifar10,path=DIR --workdir=runs/wavelet_mim_cifar10

No code and no body text of the paper could be had: fields marked [D] are our decisions. The recipe is mae.py's [D].
"""

import ml_collections

from folk_jax import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """`arg`: what mae.py takes."""
  c = config_lib.sibling(__file__, 'mae.py', arg)
  small = c.image_size <= 32
  c.objective = ml_collections.ConfigDict()
  c.objective.name = 'wavelet_mim'
  c.objective.mask_ratio = 0.75  # [D] As MAE; masked patches are dropped from the encoder.
  c.objective.wavelet = 'haar'  # [D]
  # Finest level first: the layer (counted from 1) that predicts it, and its weight in the loss.
  c.objective.layers = (3, 6, 9, 12)  # [D] Deeper layer, coarser level.
  c.objective.level_weights = (0.125, 0.25, 0.5, 1.0)  # [D]
  c.objective.decoder_width = 64 if small else 512  # [D]
  c.objective.decoder_depth = 1  # [D] One light block, shared by the levels.
  c.objective.decoder_heads = 4 if small else 16
  if small:  # 8-pixel patches have three levels.
    c.model.depth = max(3, c.model.depth)
    c.objective.layers = tuple(range(c.model.depth - 2, c.model.depth + 1))
    c.objective.level_weights = (0.25, 0.5, 1.0)
  return c
