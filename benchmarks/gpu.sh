#!/usr/bin/env bash
# Times our train step beside the PyTorch peer on one NVIDIA GPU, within a number of minutes.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

minutes=30
out=$ROOT/benchmarks/results
peer=$ROOT/../shared/bench/torch_folk.py
python=${PYTHON:-python3}
dry_run=false

usage() {
  cat <<'TEXT'
Usage: benchmarks/gpu.sh [--minutes=N] [--out=DIR] [--peer=FILE] [--dry-run]

ViT-S/16 and ViT-B/16 at 224 px in bfloat16, several batch sizes each, beside the peer eager and
compiled: one JSON a size in DIR. Sizes that no time is left for are named and left out, and one that
fails (out of memory) does not stop the others. The peer's own check of its formulae comes first.

  --minutes=N   when to stop (default 30)
  --out=DIR     where the JSON goes (default benchmarks/results)
  --peer=FILE   the PyTorch script (default ../shared/bench/torch_folk.py)
  --dry-run     print the commands and run none
  --help        print this

Nothing is installed and no network is needed: PYTHON=... names an interpreter (default python3) that
has jax with CUDA, flax, optax, orbax-checkpoint, chex, ml_collections, grain, and torch with CUDA.
What its image lacks installs from a folder of wheels: pip install --no-index --find-links=DIR ...
TEXT
}

fail() {
  echo "gpu.sh: $*" >&2
  exit 2
}

for argument in "$@"; do
  case $argument in
    --minutes=*) minutes=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
    --peer=*) peer=${argument#*=} ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown argument $argument; --help lists them" ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes=$minutes: give a whole number above 0"

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if ! $dry_run; then
  [[ -f $peer ]] || fail "there is no PyTorch peer at $peer: name it with --peer=FILE"
  "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
    fail "$python has no torch that sees a GPU; name one that does as PYTHON=..."
  "$python" -c 'import jax; assert jax.default_backend() == "gpu"' 2>/dev/null ||
    fail "$python has no jax that sees a GPU; name one that does as PYTHON=..."
fi

# run LABEL COMMAND...: in what is left of the time; says so where it fails or does not fit.
run() {
  local label=$1 left=$((minutes * 60 - SECONDS))
  shift
  if $dry_run; then
    echo "$*"
  elif ((left < 60)); then
    echo "gpu.sh: no time left for $label" >&2
  else
    timeout "$left" "$@" || echo "gpu.sh: $label ended with status $?" >&2
  fi
}

run 'the check of the eager peer' "$python" "$peer" --check --no-compile --device=cuda
# The sizes that say most come first.
for size in vit_s:256 vit_b:128 vit_s:64 vit_b:64 vit_s:512 vit_b:256; do
  model=${size%:*} batch=${size#*:}
  run "$model at batch $batch" "$python" "$ROOT/benchmarks/peer.py" --peer="$peer" --device=cuda \
    --model="$model" --batch="$batch" --dtype=bf16 --rounds=2 --steps=20 --warmup=5 \
    --out="$out/peer_gpu_${model}_${batch}.json"
done
