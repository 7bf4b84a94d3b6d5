#!/usr/bin/env bash
# Checks the code and runs the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

usage() {
  cat <<'TEXT'
Usage: launch/test.sh [--parity] [pytest arguments]

Makes or reuses .venv with the tested versions (constraints.txt), checks the code with ruff, and runs
the tests on the CPU: in two processes, or, in one, those that pytest arguments choose.

  --parity   also install PyTorch, torchvision and timm, and run the tests that compare with them
  --help     print this

Examples: launch/test.sh tests/signal      launch/test.sh -k fourier -x
PYTHON=/path/to/python3.12 names the interpreter for a new .venv.
TEXT
}

parity=false
arguments=()
for argument in "$@"; do
  case $argument in
    --parity) parity=true ;;
    -h | --help) usage; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done

if $parity; then
  # One command for torch, torchvision and timm: timm alone would choose a torch of its own. Where pip
  # offers a CUDA build first this fetches several GB; for a CPU build install torch and torchvision
  # into .venv beforehand, as https://pytorch.org/get-started/locally says.
  ensure_venv dev parity
  select=()
else
  ensure_venv dev
  select=(-m 'not parity')
  echo 'Tests that compare with PyTorch and timm are left out; launch/test.sh --parity runs them.'
fi

if ((${#arguments[@]} == 0)); then
  # A file stays in one process, so that what its tests share is made once.
  arguments=(-n 2 --dist loadfile)
fi

cd "$ROOT"
"$VENV/bin/ruff" check --quiet .
"$VENV/bin/ruff" format --check --quiet . || fail 'unformatted files: .venv/bin/ruff format . cures it'
exec "$VENV/bin/python" -m pytest ${select[@]+"${select[@]}"} "${arguments[@]}"
