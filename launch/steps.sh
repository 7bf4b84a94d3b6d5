# Sourced by the scripts beside it, not run: commands that are printed before they run, or only printed.
# shellcheck shell=bash

dry_run=false

say() {
  echo "$*" >&2
}

# step COMMAND [ARGUMENT...]: prints the command as one could paste it, and runs it unless --dry-run was given.
step() {
  local words
  printf -v words '%q ' "$@"
  echo "+ ${words% }"
  $dry_run || "$@"
}

# need TOOL WHERE: fails unless the tool is there; a dry run needs none.
need() {
  $dry_run || command -v "$1" >/dev/null || fail "$1 is not on PATH; $2"
}

# value --NAME=VALUE: the value, or a failure where it is empty.
value() {
  [[ -n ${1#*=} ]] || fail "${1%%=*} is empty: write ${1%%=*}=VALUE"
  echo "${1#*=}"
}

# required NAME VALUE: fails where the value is empty.
required() {
  [[ -n $2 ]] || fail "--$1=... is missing; --help explains it"
}

# count NAME VALUE: fails unless the value is a number from 1 on.
count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--$1=$2 is no number; expected 1 or more"
}

# has_flag NAME ARGUMENT...: whether one of the arguments is --NAME or --NAME=...
has_flag() {
  local name=$1 argument
  shift
  for argument in "$@"; do
    [[ $argument == "--$name" || $argument == "--$name="* ]] && return
  done
  return 1
}

# flag_value NAME ARGUMENT...: the value of --NAME=VALUE among the arguments; empty where there is none.
flag_value() {
  local name=$1 argument found=
  shift
  for argument in "$@"; do
    [[ $argument == "--$name="* ]] && found=${argument#*=}
  done
  echo "$found"
}

# check_run ARGUMENT...: the flags of folk_jax.main name a recipe and a workdir.
check_run() {
  local name
  for name in config workdir; do
    [[ -n $(flag_value "$name" "$@") ]] || fail "after -- the run needs --$name=...; --help has an example"
  done
}

# shared_cache ARGUMENT...: sets run_flags to the arguments, with a compilation cache in the workdir unless they name
# one: all hosts read it, and a run that comes back after a preemption doesn't compile again.
shared_cache() {
  run_flags=("$@")
  has_flag config.compilation_cache "$@" ||
    run_flags+=("--config.compilation_cache=$(flag_value workdir "$@")/compilation_cache")
}
