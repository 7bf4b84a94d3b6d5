#!/usr/bin/env bash
# Trains FOLK on photographs that ship inside scikit-image and scikit-learn, and exports the result.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

workdir=$ROOT/runs/quickstart

usage() {
  cat <<'TEXT'
Usage: launch/quickstart.sh [--workdir=DIR] [flags of folk_jax.main]

Makes or reuses .venv with the tested versions (constraints.txt), trains a small FOLK model on the
embedded photographs, prints its kNN accuracy before and after, and exports the teacher for timm.
Run again, it continues the run that DIR holds.

  --workdir=DIR   where the run is kept (default: runs/quickstart in this checkout)
  --help          print this

Example: launch/quickstart.sh --workdir=/tmp/folk --config.seed=1
PYTHON=/path/to/python3.12 names the interpreter for a new .venv.
TEXT
}

arguments=()
while (($#)); do
  case $1 in
    --workdir=*) workdir=${1#*=} ;;
    --workdir)
      (($# > 1)) || fail '--workdir needs a folder: --workdir=DIR'
      workdir=$2
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ -n $workdir ]] || fail '--workdir needs a folder: --workdir=DIR'

# shellcheck disable=SC2119  # no extras are asked for
ensure_venv
python=$VENV/bin/python

"$python" -m folk_jax.main --config="$ROOT/configs/quickstart.py" --workdir="$workdir" \
  ${arguments[@]+"${arguments[@]}"}

weights=$workdir/export/teacher.safetensors
"$python" -m folk_jax.export --workdir="$workdir" --which=teacher --format=timm --out="$weights"

cat <<TEXT

The run is in $workdir: metrics.jsonl, tensorboard/, checkpoints/ and export/.
Its curves:    $VENV/bin/tensorboard --logdir $workdir
In PyTorch, where torch, timm and safetensors are installed:

  import json, timm, safetensors.torch
  weights = '$weights'
  about = json.load(open(weights.replace('.safetensors', '.json')))
  model = timm.create_model(about['model'], **about['args'])
  model.load_state_dict(safetensors.torch.load_file(weights))

Next, on your own images: configs/vit_s.py:data=folder,path=/path/to/images; see README.md.
TEXT
