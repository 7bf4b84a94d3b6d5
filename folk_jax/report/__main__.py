"""The command that draws: a run's page, or one's own photograph under every filter.

  python -m folk_jax.report --workdir=runs/quickstart                 # writes runs/quickstart/report.html
  python -m folk_jax.report --image=photo.jpg                         # writes photo_filters.html
  python -m folk_jax.report --image=photo.jpg --out=photo.png --portions=0.01,0.1

The page is one file that needs no network. It needs neither the devices of the run nor its data: without them its
pictures are of embedded photographs, and it says so.
"""

import sys
from collections.abc import Sequence

from absl import flags

from folk_jax import cli
from folk_jax.errors import UserError


def _define_flags() -> None:
  """The command's flags; not at import, where `workdir` and `out` would meet other commands' own."""
  flags.DEFINE_string(
    'workdir', None, 'The run to report on, finished or not; or a folder of evaluations.'
  )
  flags.DEFINE_string(
    'image', None, 'Instead of a run: an image, or a folder of them, to show under every filter.'
  )
  flags.DEFINE_string(
    'out',
    None,
    'The file: .html, for --image also .png or .jpg. By default WORKDIR/report.html or IMAGE_filters.html.',
  )
  flags.DEFINE_enum(
    'which',
    'teacher',
    ['teacher', 'student'],
    "Whose features a run's page shows; a run without a teacher has one.",
  )
  flags.DEFINE_enum(
    'checkpoint',
    'last',
    ['last', 'best'],
    'Of which checkpoint (best: where config.checkpoint.best kept one).',
  )
  flags.DEFINE_list(
    'results',
    [],
    "More evaluations of the run: workdirs of task 'evaluate', or their results.json.",
  )
  flags.DEFINE_list(
    'portions', ['0.005', '0.01', '0.05'], 'With --image: shares of the coefficients, in (0, 1).'
  )
  flags.DEFINE_integer('size', 224, 'With --image: pixels a side.')
  flags.DEFINE_list('filters', [], 'With --image: which filters, by name (default all).')


def main(argv: Sequence[str]) -> None:
  """Writes what the flags ask for and says where it is."""
  del argv
  values = flags.FLAGS
  if (values.workdir is None) == (values.image is None):
    raise UserError(
      'give --workdir=DIR for the page of a run, or --image=FILE for the filters on a photograph'
    )

  def say(line: str) -> None:
    print(f'{line} ...', file=sys.stderr, flush=True)

  if values.image is not None:
    portions = _numbers(values.portions)
    from folk_jax.report import explorer  # It imports jax, for which --help needn't wait.

    chosen = {'filters': values.filters} if values.filters else {}
    written = explorer.explore(
      values.image, values.out, portions=portions, size=values.size, say=say, **chosen
    )
    print(f'wrote {written}')
    return
  from folk_jax.report import of_run

  written = of_run.report(
    values.workdir,
    values.out,
    which=values.which,
    best=values.checkpoint == 'best',
    results=values.results,
    say=say,
  )
  print(f'wrote {written}')


def _numbers(texts: Sequence[str]) -> tuple[float, ...]:
  try:
    return tuple(map(float, texts))
  except ValueError as error:
    raise UserError(
      f'--portions={",".join(texts)}: give numbers between 0 and 1, such as 0.01,0.05'
    ) from error


if __name__ == '__main__':
  _define_flags()
  cli.run(main)
