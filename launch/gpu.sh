#!/usr/bin/env bash
# One host, one process, all of its GPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/gpu.sh [--gpus=0,1] [--dry-run] -- --config=RECIPE --workdir=DIR [flags of folk_jax.main]

Makes or reuses .venv with the extra gpu, and runs one process on all GPUs of this host, or on those named. The global
batch is split over them. SIGTERM saves and ends the run (status 143), and so does Ctrl-C (status 130); a second one
leaves at once. The same command resumes it.

  --gpus=0,1   these GPUs alone
  --dry-run    print what would be done
  --help       print this

Example: launch/gpu.sh -- --config=configs/vit_b.py:data=folder,path=/images --workdir=runs/vit_b
The driver must suit the CUDA version of the extra; setup.py says which. In a container: launch/docker/Dockerfile.gpu.
TEXT
}

gpus=
while (($#)); do
  case $1 in
    --gpus=*) gpus=$(value "$1") ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1: flags of the run stand after --; --help lists the others" ;;
  esac
  shift
done
check_run "$@"
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus=$gpus; expected numbers such as 0,1"
need nvidia-smi 'this host has no NVIDIA driver: see docs/scaling.md'

if $dry_run; then
  say 'would make or reuse .venv with the extra gpu'
else
  ensure_venv gpu
fi
[[ -z $gpus ]] || step export "CUDA_VISIBLE_DEVICES=$gpus"
cd "$ROOT"
run=("$VENV/bin/python" -m folk_jax.main "$@")
if $dry_run; then
  step "${run[@]}"
else
  exec "${run[@]}"  # In this shell's place: SIGTERM reaches the run.
fi
