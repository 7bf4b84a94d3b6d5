"""Times self-attention forwards and backwards, by every implementation that this machine has.

  python benchmarks/attention.py                      # ViT-S, B and L at 224 px
  python benchmarks/attention.py --models=vit_b --tokens=1025 --batch=32

The sublayer as a block runs it: packed projection, attention, output projection. All implementations run by turns in
one process. `xla` is measured everywhere, `cudnn` on NVIDIA GPUs in bfloat16, `pallas` on TPUs.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import report

from folk_jax.errors import UserError
from folk_jax.models import fused_attention
from folk_jax.models.layers import Attention

# Width and heads.
MODELS = {'vit_s': (384, 6), 'vit_b': (768, 12), 'vit_l': (1024, 16)}
_ON = {'cpu': ('xla',), 'gpu': ('xla', 'cudnn'), 'tpu': ('xla', 'pallas')}


def program(
  implementation: str, width: int, heads: int, dtype: str, tokens_BTD: jax.Array
) -> Callable[[], jax.Array]:
  """The sublayer with its gradient for tokens and parameters, compiled."""
  module = Attention(heads, jnp.dtype(dtype), implementation)
  params = jax.jit(module.init)(jax.random.key(0), tokens_BTD)

  def loss(params, tokens_BTD):
    return jnp.mean(jnp.square(module.apply(params, tokens_BTD).astype(jnp.float32)))

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, tokens_BTD).compile()
  return lambda: compiled(params, tokens_BTD)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--models', default=','.join(MODELS), help=f'of {", ".join(MODELS)}')
  parser.add_argument(
    '--batch', type=int, default=0, help='views (default 8 on CPUs, 256 elsewhere)'
  )
  parser.add_argument(
    '--tokens', type=int, default=197, help='a view (default 197: 224 px, patch 16)'
  )
  parser.add_argument('--dtype', default='', help='default float32 on CPUs, bfloat16 elsewhere')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--out', type=pathlib.Path, default=None)
  flags = parser.parse_args()
  device = jax.devices()[0]
  on_cpu = device.platform == 'cpu'
  batch, dtype = (
    flags.batch or (8 if on_cpu else 256),
    flags.dtype or ('float32' if on_cpu else 'bfloat16'),
  )
  rows = []
  for model in flags.models.split(','):
    if model not in MODELS:
      raise UserError(f'unknown model {model!r}: known are {", ".join(MODELS)}')
    width, heads = MODELS[model]
    shape = (batch, flags.tokens, width)
    tokens_BTD = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    programs = {
      name: program(name, width, heads, dtype, tokens_BTD)
      for name in _ON.get(device.platform, ('xla',))
      if (name != 'pallas' or fused_attention.fits(width, heads))
      and (name != 'cudnn' or dtype == 'bfloat16')
    }
    times = {
      name: float(np.median(ms)) for name, ms in report.measure(programs, flags.rounds).items()
    }
    # Two products of the projections (4 D^2 a token) and two of attention (2 T D), three passes.
    flops = 3 * 2 * batch * flags.tokens * (4 * width**2 + 2 * flags.tokens * width)
    rows += [
      {
        'model': model,
        'attention': name,
        'median_ms': round(ms, 3),
        'tflops': round(flops / ms / 1e9, 2),
      }
      for name, ms in times.items()
    ]
  what = f'self-attention and its gradient, {batch} views of {flags.tokens} tokens, {dtype}'
  result = {'what': what} | report.context(device.device_kind) | {'rows': rows}
  print(what)
  print(
    report.table(
      ('model', 'attention', 'median ms', 'TFLOP/s'), [tuple(row.values()) for row in rows]
    )
  )
  out = flags.out or report.ROOT / 'benchmarks' / 'results' / f'attention_{device.platform}.json'
  report.write_json(out, result)
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
