#!/usr/bin/env bash
# Builds the documentation as a site: the pages of docs/, and the API from the docstrings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

usage() {
  cat <<'TEXT'
Usage: launch/docs.sh [--serve]

Makes or reuses .venv with the tested versions (constraints.txt) and builds site/, whose pages open
from the disk: site/index.html. A link that leads nowhere fails the build.

  --serve   serve it at http://127.0.0.1:8000 instead, rebuilt at every change
  --help    print this

PYTHON=/path/to/python3.12 names the interpreter for a new .venv.
TEXT
}

command=(build --strict --quiet)
for argument in "$@"; do
  case $argument in
    --serve) command=(serve) ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown argument $argument; --help lists them" ;;
  esac
done

ensure_venv docs
cd "$ROOT"
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
"$VENV/bin/mkdocs" "${command[@]}"
[[ ${command[0]} == serve ]] || echo "open $ROOT/site/index.html"
