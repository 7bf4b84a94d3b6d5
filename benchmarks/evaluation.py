"""Judges a checkpoint by configs/evaluate.py and keeps the scores with machine, date and command.

  python benchmarks/evaluation.py --checkpoint=runs/methods/folk --out=benchmarks/results/evaluation_cpu.json \\
    --workdir=runs/evaluation -- --config.linear.total_steps=300 --config.finetune.total_steps=500

What follows `--` goes to folk_jax.main. Killed and started again with the same command, it goes on: finished
evaluations stand in the workdir's results.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import report

from folk_jax.errors import UserError


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--checkpoint', required=True, help='a workdir, or a timm .safetensors')
  add('--arg', default='cifar10', help="the recipe's argument (default cifar10)")
  add('--out', type=pathlib.Path, required=True, help='JSON')
  add('--workdir', type=pathlib.Path, required=True, help='where the evaluations live')
  add('flags', nargs='*', metavar='-- FLAGS', help='further flags of folk_jax.main')
  flags = parser.parse_args()

  command = [sys.executable, '-m', 'folk_jax.main', f'--config=configs/evaluate.py:{flags.arg}']
  command += [f'--config.checkpoint={flags.checkpoint}', f'--workdir={flags.workdir}', *flags.flags]
  environment = os.environ | {'GLIBC_TUNABLES': report.KEEP_MEMORY}
  if subprocess.run(command, env=environment, check=False).returncode:
    raise UserError('an evaluation failed: its message stands above; start this again to go on')
  results = json.loads((flags.workdir / 'results.json').read_text(encoding='utf-8'))
  result = {'what': 'All evaluations of one checkpoint', **report.context()}
  result |= {'scores': results['scores']}
  report.write_json(flags.out, result)
  print(f'written to {flags.out}')


if __name__ == '__main__':
  report.main(main)
