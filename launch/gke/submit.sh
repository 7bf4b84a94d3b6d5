#!/usr/bin/env bash
# Submits one run to the TPU slices of a GKE cluster that has JobSet installed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"

usage() {
  cat <<'TEXT'
Usage: launch/gke/submit.sh COMMAND --name=NAME [options] [-- flags of folk_jax.main]

  render    prints the manifest
  submit    applies it with kubectl, in the cluster of kubectl's current context
  status    shows the JobSet and its pods
  logs      follows the first pod, which is the one that speaks
  delete    ends the run; submitted again, it goes on from its newest checkpoint

  --image=IMAGE          built from launch/docker/Dockerfile.tpu, where the cluster can pull it
  --type=v5e             v4, v5e, v5p or v6e
  --topology=4x4         chips of a slice, as its node pool has them
  --slices=1             how many slices; all of them are one run
  --chips-a-host=4       of the node pool's machine type: its name ends in 1t, 4t or 8t
  --data-claim=NAME      a PersistentVolumeClaim that holds the data: pods see it, read-only, as /data
  --spot                 on node pools of spot capacity
  --service-account=NAME of Kubernetes, allowed to use the buckets (default: default)
  --namespace=default    of Kubernetes
  --restarts=100         after so many preemptions and failures, give up
  --dry-run              print the kubectl commands and the manifest, and run none
  --help                 print this

Example: launch/gke/submit.sh submit --name=folk --type=v5e --topology=4x4 --slices=2 --data-claim=in1k \
           --image=REGISTRY/folk_jax:tpu -- \
           --config=configs/vit_b.py:data=array_record,path=/data/in1k --workdir=gs://BUCKET/runs/vit_b
TEXT
}

command=${1:-}
case $command in
  render | submit | status | logs | delete) shift ;;
  -h | --help) usage; exit 0 ;;
  '') fail 'which command? render, submit, status, logs or delete; --help explains them' ;;
  *) fail "unknown command $command: expected render, submit, status, logs or delete" ;;
esac

name='' image='' type=v5e topology='' slices=1 chips=4 claim='' spot=false account=default namespace=default restarts=100
while (($#)); do
  case $1 in
    --name=*) name=$(value "$1") ;;
    --image=*) image=$(value "$1") ;;
    --type=*) type=$(value "$1") ;;
    --topology=*) topology=$(value "$1") ;;
    --slices=*) slices=$(value "$1") ;;
    --chips-a-host=*) chips=$(value "$1") ;;
    --data-claim=*) claim=$(value "$1") ;;
    --spot) spot=true ;;
    --service-account=*) account=$(value "$1") ;;
    --namespace=*) namespace=$(value "$1") ;;
    --restarts=*) restarts=$(value "$1") ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1: flags of the run stand after --; --help lists the others" ;;
  esac
  shift
done
required name "$name"
# Pods are called NAME-slice-0-0-xxxxx, and a name in DNS has 63 characters.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name; expected at most 40 lower-case letters, digits and dashes, from a letter on"

accelerator() {
  case $type in
    v4) echo tpu-v4-podslice ;;
    v5e) echo tpu-v5-lite-podslice ;;
    v5p) echo tpu-v5p-slice ;;
    v6e) echo tpu-v6e-slice ;;
    *) fail "unknown --type=$type: expected v4, v5e, v5p or v6e" ;;
  esac
}

# quoted TEXT: as YAML's and JSON's double-quoted string.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
  local text kind total hosts args='' argument selector='' data='emptyDir: {}' number
  kind=$(accelerator)
  total=$((${topology//x/*}))
  ((total % chips == 0)) || fail "--topology=$topology has $total chips, no multiple of --chips-a-host=$chips"
  hosts=$((total / chips))
  for argument in "${run_flags[@]}"; do args+="${args:+, }$(quoted "$argument")"; done
  ! $spot || selector='cloud.google.com/gke-spot: "true"'
  [[ -z $claim ]] || data="persistentVolumeClaim: {claimName: $(quoted "$claim"), readOnly: true}"
  text=$(<"$ROOT/launch/gke/jobset.yaml")
  for number in "NAME $name" "NAMESPACE $namespace" "RESTARTS $restarts" "SLICES $slices" "HOSTS $hosts" \
    "SERVICE_ACCOUNT $account" "ACCELERATOR $kind" "TOPOLOGY $topology" "SPOT $selector" "DATA $data" "IMAGE $image" \
    "CHIPS $chips" "ARGS [$args]"; do
    text=${text//"@${number%% *}@"/"${number#* }"}
  done
  echo "$text"
}

case $command in
  render | submit)
    required image "$image"
    required topology "$topology"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology=$topology; expected such as 4x4 or 2x2x4"
    for pair in "slices $slices" "chips-a-host $chips" "restarts $restarts"; do
      count "${pair% *}" "${pair#* }"
    done
    check_run "$@"
    shared_cache "$@"
    [[ $(flag_value workdir "$@") == gs://* || $(flag_value workdir "$@") == /* ]] ||
      fail 'the workdir must be in a bucket (gs://...), or an absolute path that all pods mount'
    ;;
  *) (($# == 0)) || fail "$command takes no flags of the run: unexpected $1" ;;
esac
[[ $command == render ]] || need kubectl 'https://kubernetes.io/docs/tasks/tools'

case $command in
  render) manifest ;;
  submit)
    text=$(manifest)
    if $dry_run; then
      echo '+ kubectl apply -f - <<MANIFEST'
      echo "$text"
      echo MANIFEST
    else
      say "+ kubectl apply -f - ($name)"
      kubectl apply -f - <<<"$text"
    fi
    ;;
  status)
    step kubectl get jobset "$name" "--namespace=$namespace"
    step kubectl get pods "--namespace=$namespace" "--selector=jobset.sigs.k8s.io/jobset-name=$name" -o wide
    ;;
  logs) step kubectl logs "--namespace=$namespace" -f "job/$name-slice-0" ;;
  delete) step kubectl delete jobset "$name" "--namespace=$namespace" ;;
esac
