#!/usr/bin/env bash
# What benchmarks/ holds for one NVIDIA GPU, our step beside the PyTorch peer first, in so many minutes.
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

In this order, within the minutes given: the check of the peer's formulae; ViT-B/16 and ViT-S/16 at
224 px in bfloat16, first our step under several settings, then the best of them beside the peer,
eager and compiled; attention and filter by themselves; ViT-L; further batch sizes. One JSON a
measurement in DIR. What no time is left for is named and left out, and what fails (out of memory)
does not stop the others. benchmarks/performance_page.py makes tables of what is there.

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

bench=$ROOT/benchmarks

# step MODEL BATCHES SETTINGS: our step alone.
step() {
  run "the step of $1" "$python" "$bench/step.py" --config="configs/$1.py" --batches="$2" \
    --settings="$3" --steps=15 --out="$out/step_gpu_$1.json"
}

# The attention, remat and unrolling of the fastest row that step.py has found for a model.
best() {
  "$python" - "$out/step_gpu_$1.json" <<'PYTHON' 2>/dev/null || echo 'auto none 0'
import json, sys
rows = json.load(open(sys.argv[1]))['rows']
row = max(rows, key=lambda row: row['images_per_second'])
print(row['attention'], row['remat'], row['scan_unroll'])
PYTHON
}

# beside MODEL BATCH: our step and the peer's, by turns.
beside() {
  local attention=auto remat=none unroll=0
  $dry_run || read -r attention remat unroll < <(best "$1")
  run "$1 at batch $2" "$python" "$bench/peer.py" --peer="$peer" --device=cuda --model="$1" \
    --batch="$2" --dtype=bf16 --rounds=2 --steps=20 --warmup=5 --attention="$attention" \
    --remat="$remat" --scan-unroll="$unroll" --out="$out/peer_gpu_$1_$2.json"
}

run 'the check of the eager peer' "$python" "$peer" --check --no-compile --device=cuda
step vit_b 128,256 cudnn:none:12,cudnn:none,xla:none:12,cudnn:elementwise:12
beside vit_b 128
beside vit_b 256
step vit_s 256,512 cudnn:none:12,cudnn:none,xla:none:12,cudnn:elementwise:12
beside vit_s 256
beside vit_s 512
run attention "$python" "$bench/attention.py" --out="$out/attention_gpu.json"
run filter "$python" "$bench/filter.py" --batch=256 --out="$out/filter_gpu.json"
step vit_l 64,128 cudnn:none:24,cudnn:none,cudnn:elementwise:24
beside vit_l 64
beside vit_l 128
beside vit_b 64
beside vit_s 1024
