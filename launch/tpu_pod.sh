#!/usr/bin/env bash
# One run on a Cloud TPU slice, or on several, from this machine: create, install, run, watch, fetch logs, delete.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [options] [-- flags of folk_jax.main]

  create    asks for the TPU and waits until it is there
  install   copies the commit that is checked out to all workers and makes .venv with the extra tpu there
  run       starts the run after -- on all workers, in the background
  status    the state of the TPU, and the last line that each slice's first worker has logged
  logs      fetches run.log of every worker into --out
  stop      tells the run to save and end
  keep      create, install and run, again after every preemption, until the run has ended
  delete    gives the TPU back

  --type=v5litepod-64     accelerator type: v4-*, v5litepod-*, v5p-*, v6e-* (for create and keep)
  --slices=1              how many slices of that type; all of them are one run
  --spot, --reserved      kind of capacity
  --direct                tpu-vm create, which fails at once where there is no capacity, instead of a queued resource
  --valid-until=6h        how long a queued resource may wait
  --version=NAME          runtime version of the TPU VM (default: the type's)
  --service-account=MAIL  of the VMs: it must be able to read the data's bucket and to write the workdir's
  --project=PROJECT       gcloud's own default otherwise
  --poll=60               seconds between looks (create, keep)
  --retries=3             on one TPU, start a run that failed, but not by a mistake (status 2), so often again (keep)
  --out=DIR               for logs (default: runs/NAME/logs)
  --dry-run               print the gcloud commands and run none
  --help                  print this

Example: launch/tpu_pod.sh keep --name=folk --zone=us-west4-a --type=v5litepod-64 --spot -- \
           --config=configs/vit_b.py:data=array_record,path=/mnt/data/in1k --workdir=gs://BUCKET/runs/vit_b
The workdir must be in a bucket, or on storage that all workers mount; the data must lie at one path on all workers.
docs/scaling.md says how, and what the project needs.
TEXT
}

command=${1:-}
case $command in
  create | install | run | status | logs | stop | keep | delete) shift ;;
  -h | --help) usage; exit 0 ;;
  '') fail 'which command? create, install, run, status, logs, stop, keep or delete; --help explains them' ;;
  *) fail "unknown command $command: expected create, install, run, status, logs, stop, keep or delete" ;;
esac

name='' zone='' type='' slices=1 capacity='' direct=false valid_until=6h version='' account='' project=''
poll=60 retries=3 out=''
while (($#)); do
  case $1 in
    --name=*) name=$(value "$1") ;;
    --zone=*) zone=$(value "$1") ;;
    --type=*) type=$(value "$1") ;;
    --slices=*) slices=$(value "$1") ;;
    --spot | --reserved) capacity=$1 ;;
    --direct) direct=true ;;
    --valid-until=*) valid_until=$(value "$1") ;;
    --version=*) version=$(value "$1") ;;
    --service-account=*) account=$(value "$1") ;;
    --project=*) project=$(value "$1") ;;
    --poll=*) poll=$(value "$1") ;;
    --retries=*) retries=$(value "$1") ;;
    --out=*) out=$(value "$1") ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1: flags of the run stand after --; --help lists the others" ;;
  esac
  shift
done
required name "$name"
required zone "$zone"
count slices "$slices"
count poll "$poll"
count retries "$retries"
! $direct || ((slices == 1)) || fail '--direct makes one slice; leave it out for several'
case $command in
  run | keep)
    check_run "$@"
    shared_cache "$@"
    ;;
  *) (($# == 0)) || fail "$command takes no flags of the run: unexpected $1" ;;
esac

runtime_version() {
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type=$type: no runtime version is known for it; give --version=NAME" ;;
  esac
}

case $command in
  create | keep)
    required type "$type"
    [[ -n $version ]] || version=$(runtime_version)
    ;;
esac
need gcloud 'https://cloud.google.com/sdk/docs/install'

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# ACTIVE, PROVISIONING, SUSPENDED (preempted), FAILED, ...; READY of a TPU made with --direct; NONE where there is none;
# UNKNOWN where gcloud cannot say, whose words are passed on.
state() {
  local found errors what=(queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  ! $direct || what=(tpu-vm describe "$name" "${where[@]}" '--format=value(state)')
  errors=$(mktemp)
  if ! found=$(gcloud compute tpus "${what[@]}" 2>"$errors"); then
    found=UNKNOWN
    if grep -q NOT_FOUND "$errors"; then found=NONE; else cat "$errors" >&2; fi
  fi
  rm -f "$errors"
  echo "$found"
}

# As `install` below, it says itself how it went: where its status is asked for, bash does not stop at a failure.
create() {
  local options=("${where[@]}" "--accelerator-type=$type") found=
  [[ -z $capacity ]] || options+=("$capacity")
  [[ -z $account ]] || options+=("--service-account=$account" --scopes=cloud-platform)
  if $direct; then
    step gcloud compute tpus tpu-vm create "$name" "${options[@]}" "--version=$version"
    return
  fi
  options+=("--runtime-version=$version" "--valid-until-duration=$valid_until")
  if ((slices > 1)); then
    options+=("--node-count=$slices" "--node-prefix=$name")
  else
    options+=("--node-id=$name")
  fi
  step gcloud compute tpus queued-resources create "$name" "${options[@]}" || return
  if $dry_run; then
    say "would look every $poll s until $name is ACTIVE"
    return
  fi
  while found=$(state) && [[ $found != ACTIVE ]]; do
    case $found in
      FAILED | SUSPENDED | NONE) fail "$name is $found; gcloud compute tpus queued-resources describe says why" ;;
    esac
    say "$(date +%T) $name: $found"
    sleep "$poll"
  done
}

# on_all COMMAND [OPTION...]: on every worker of every slice at once; fails where one of them does.
on_all() {
  local remote=$1 node jobs=() job failed=0
  shift
  for node in "${nodes[@]}"; do
    local ssh=(gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$remote" "$@")
    if $dry_run; then
      step "${ssh[@]}"
    else
      step "${ssh[@]}" &
      jobs+=("$!")
    fi
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

install() {
  local archive node
  archive=$(mktemp -d)/folk_jax.tgz
  step git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD || return
  for node in "${nodes[@]}"; do
    step gcloud compute tpus tpu-vm scp "$archive" "$node:folk_jax.tgz" "${where[@]}" --worker=all || return
  done
  rm -rf "$(dirname "$archive")"
  # The VMs' own Python is too old.
  # shellcheck disable=SC2016  # for the workers' shells
  on_all 'set -e
mkdir -p folk_jax && tar xzf folk_jax.tgz -C folk_jax && cd folk_jax
python3 -m pip install --quiet --user uv
python3 -m uv python install --quiet 3.12
export PYTHON=$(python3 -m uv python find 3.12)
bash -c "source launch/venv.sh; ensure_venv tpu"
.venv/bin/python -m pip install -qq --no-input -c constraints.txt gcsfs'
}

run() {
  local flags
  printf -v flags '%q ' "${run_flags[@]}"
  on_all "set -e
cd folk_jax
if [ -f run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then echo 'a run is under way: stop it first' >&2; exit 1; fi
rm -f run.status
nohup sh -c '.venv/bin/python -m folk_jax.main \"\$@\" & echo \$! >run.pid; wait \$!; echo \$? >run.status' \
run $flags>run.log 2>&1 </dev/null &"
}

# What the first worker says of the run: its exit status, running, none, or bare where nothing is installed; empty where
# it cannot be asked.
run_status() {
  # shellcheck disable=SC2016  # for the worker's shell
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 '--command=
if ! cd folk_jax 2>/dev/null; then echo bare
elif [ -f run.status ]; then cat run.status
elif [ -f run.pid ] && kill -0 $(cat run.pid) 2>/dev/null; then echo running
else echo none; fi' 2>/dev/null || true
}

show_status() {
  local node
  if $dry_run; then
    say "would ask for the state of $name"
  else
    echo "$name: $(state)"
  fi
  for node in "${nodes[@]}"; do
    step gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=0 '--command=tail -n 1 folk_jax/run.log'
  done
}

logs() {
  local node
  out=${out:-$ROOT/runs/$name/logs}
  for node in "${nodes[@]}"; do
    $dry_run || mkdir -p "$out/$node"
    step gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all '--command=cat folk_jax/run.log' \
      "--output-directory=$out/$node"
  done
}

stop() {
  # shellcheck disable=SC2016  # for the workers' shells
  on_all 'kill -TERM $(cat folk_jax/run.pid)'
}

delete() {
  if $direct; then
    step gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    step gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

# What a preemption leaves is deleted and made again; the run goes on from its newest checkpoint.
keep() {
  local found ended='' fresh=false looks=0 left=$retries
  if $dry_run; then
    create
    install
    run
    say "would look every $poll s: after a preemption delete, create, install and run again, until the run has ended"
    return
  fi
  while true; do
    found=$(state)
    ended=
    case $found in
      ACTIVE | READY) ended=$(run_status) ;;
      UNKNOWN) ;;
      *)
        say "$(date +%T) $name: $found"
        [[ $found == NONE ]] || delete || true
        fresh=false looks=0 left=$retries
        if (create); then fresh=true ended=bare; fi
        ;;
    esac
    case $ended in
      0) say "the run has ended; launch/tpu_pod.sh delete --name=$name --zone=$zone gives the TPU back"; return ;;
      2) give_up 2 ;;
      130) say 'the run was saved and ended by hand (SIGINT): not started again'; return 130 ;;
      '' | running) looks=0 ;;  # A worker may vanish at any moment: the next look starts over.
      143) (run) || true ;;
      none | bare)
        # Never over what may be running: only on a TPU that was made here, just now.
        if $fresh; then
          if (install); then fresh=false; fi
        elif [[ $ended == bare ]]; then
          fail "$name was there before, with nothing installed: launch/tpu_pod.sh install (or delete), and keep again"
        fi
        $fresh || (run) || true
        ;;
      *)
        # After a preemption jax ends the first worker some time before the TPU's state says so.
        looks=$((looks + 1))
        if ((looks < 3)); then
          say "$(date +%T) $name: the run has status $ended; looking again"
        elif ((left > 0)); then
          say "$(date +%T) $name: the run ended with status $ended; starting it again"
          (logs) || true
          (run) || true
          looks=0 left=$((left - 1))
        else
          give_up "$ended"
        fi
        ;;
    esac
    sleep "$poll"
  done
}

# give_up STATUS: of the run.
give_up() {
  (logs) || true
  fail "the run ended with status $1; its logs are in ${out:-$ROOT/runs/$name/logs}"
}

case $command in
  create) create ;;
  install) install ;;
  run) run ;;
  status) show_status ;;
  logs) logs ;;
  stop) stop ;;
  keep) keep ;;
  delete) delete ;;
esac
