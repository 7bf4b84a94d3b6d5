"""Times the informed filter and the augmentation on this machine.

`python benchmarks/filter.py --help` lists the flags. The plain filter beside ours is the same one
as most would write it: `jnp.fft.fft2`, the last of `jax.lax.top_k` over the magnitudes,
`jnp.fft.ifft2`; `plain_gather` draws a k for each image, as ours does, and gathers it. All programs
run by turns in one process, so that whatever else the machine does hits each alike.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import report

from folk_jax.signal import augment, fourier

PORTIONS = (0.005, 0.01, 0.05)
# The second view's recipe in DINO (arXiv 2104.14294), with the first one's blur on every image.
VIEW = augment.Augmentation(
  brightness=0.4,
  contrast=0.4,
  saturation=0.2,
  hue=0.1,
  jitter_probability=0.8,
  grayscale_probability=0.2,
  blur_probability=1.0,
  solarise_probability=0.2,
)


def plain_threshold(magnitude_BHW: jax.Array, k: int) -> jax.Array:
  """The k-th largest, one static k for all images.

  XLA merges the slice into `top_k` and sorts everything: it finds no top-k call to make of it.
  """
  top_BK, _ = jax.lax.top_k(magnitude_BHW.reshape(magnitude_BHW.shape[0], -1), k)
  return top_BK[:, -1, None, None]


def plain_threshold_gather(magnitude_BHW: jax.Array, k_B: jax.Array, largest_k: int) -> jax.Array:
  """The k-th largest with a k for each image: gathered from the largest k of the list."""
  top_BK, _ = jax.lax.top_k(magnitude_BHW.reshape(magnitude_BHW.shape[0], -1), largest_k)
  return jnp.take_along_axis(top_BK, k_B[:, None] - 1, axis=1)[:, :, None]


def plain_filter(
  image_BHWC: jax.Array, com_B: jax.Array, threshold: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Com or RCom on the full complex spectrum."""
  spectrum_BHWC = jnp.fft.fft2(image_BHWC, axes=(1, 2))
  magnitude_BHW = jnp.sum(jnp.abs(spectrum_BHWC), axis=-1)
  top_BHW = magnitude_BHW >= threshold(magnitude_BHW)
  kept_BHWC = (top_BHW == com_B[:, None, None])[..., None]
  return jnp.fft.ifft2(jnp.where(kept_BHWC, spectrum_BHWC, 0), axes=(1, 2)).real


def programs(batch: int, size: int) -> dict[str, Callable[[], jax.Array]]:
  """Compiled programs by name, each closed over its inputs."""
  random = np.random.default_rng(0)
  # A spectrum that falls as a photograph's does; the speed of top_k depends on the values.
  noise_BHWC = random.standard_normal((batch, size, size, 3), dtype=np.float32)
  distance_HF = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 1 / size
  spectrum_BHFC = np.fft.rfft2(noise_BHWC, axes=(1, 2)) / distance_HF[:, :, None]
  image_BHWC = np.fft.irfft2(spectrum_BHFC, s=(size, size), axes=(1, 2))
  image_BHWC -= image_BHWC.min()
  image_BHWC = jnp.asarray(image_BHWC / image_BHWC.max(), jnp.float32)

  keys_B = jax.random.split(jax.random.key(0), batch)
  k_B, com_B = fourier.draw_filters(keys_B, PORTIONS, 0.5, size, size)
  counts = [fourier.coefficient_count(portion, size, size) for portion in PORTIONS]

  def plain(magnitude_BHW):
    return plain_threshold(magnitude_BHW, counts[1])

  def gather(magnitude_BHW):
    return plain_threshold_gather(magnitude_BHW, k_B, max(counts))

  half_BHF1 = fourier.ranking_magnitude(fourier.half_spectrum(image_BHWC), size)
  full_BHW = jnp.sum(jnp.abs(jnp.fft.fft2(image_BHWC, axes=(1, 2))), axis=-1)
  masked_BHF1 = ~fourier.top_mask(half_BHF1, k_B, size)

  def distance(prediction_BHWC, target_BHWC):
    total_B, count_B = fourier.frequency_distance(prediction_BHWC, target_BHWC, masked_BHF1)
    return jnp.mean(total_B / count_B)

  jobs = {
    'filter': (fourier.filter_images, image_BHWC, k_B, com_B),
    'filter_plain': (lambda *args: plain_filter(*args, plain), image_BHWC, com_B),
    'filter_plain_gather': (lambda *args: plain_filter(*args, gather), image_BHWC, com_B),
    'threshold': (lambda *args: fourier.kth_largest(*args, width=size), half_BHF1, k_B),
    'threshold_plain': (plain, full_BHW),
    'threshold_plain_gather': (gather, full_BHW),
    'distance_and_gradient': (jax.value_and_grad(distance), 0.5 * image_BHWC, image_BHWC),
    'augment': (lambda *args: augment.augment(*args, settings=VIEW), image_BHWC, keys_B),
  }
  compiled = {
    name: (jax.jit(fn).lower(*inputs).compile(), inputs) for name, (fn, *inputs) in jobs.items()
  }
  return {
    name: lambda program=program, inputs=inputs: program(*inputs)
    for name, (program, inputs) in compiled.items()
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--batch', type=int, default=64, help='images in a batch (default 64)')
  parser.add_argument('--size', type=int, default=224, help='side in pixels (default 224)')
  parser.add_argument('--rounds', type=int, default=15, help='runs of each program (default 15)')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=None,
    help='JSON file (default benchmarks/results/filter_<platform>.json)',
  )
  flags = parser.parse_args()
  device = jax.devices()[0]
  out = flags.out or (pathlib.Path(__file__).parent / 'results' / f'filter_{device.platform}.json')

  milliseconds = report.measure(programs(flags.batch, flags.size), flags.rounds)
  median = {name: float(np.median(times)) for name, times in milliseconds.items()}
  ratios = {
    name: median[name] / median[name.partition('_')[0]] for name in median if '_plain' in name
  }
  result = {
    'what': f'{flags.batch} images of {flags.size}x{flags.size}x3, float32',
    **report.context(device.device_kind),
    'portions': PORTIONS,
    'median_ms': {name: round(value, 2) for name, value in median.items()},
    'best_ms': {name: round(min(times), 2) for name, times in milliseconds.items()},
    'plain_over_ours': {name: round(value, 2) for name, value in ratios.items()},
  }
  report.write_json(out, result)

  print(f'{result["what"]}, median of {flags.rounds} runs by turns, {device.device_kind}')
  rows = [(name, value, result['best_ms'][name]) for name, value in result['median_ms'].items()]
  print(report.table(('', 'median ms', 'best ms'), rows))
  for name, ratio in ratios.items():
    print(f'{name} takes {ratio:.1f} times as long as ours')
  print(f'written to {out}')


if __name__ == '__main__':
  report.main(main)
