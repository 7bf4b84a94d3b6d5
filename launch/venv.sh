# Sourced by the scripts beside it, not run: finds Python, and makes or reuses .venv.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

# On a CPU the step's temporary memory (hundreds of MB) goes back to the kernel after every step and is
# zeroed again, page by page, in the next: a quarter of the quickstart's processor time. Huge pages
# make that cheap. glibc reads this when a process starts; elsewhere it does nothing.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

is_suitable() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13; name one that is"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail 'found no Python 3.11, 3.12 or 3.13 on PATH; install one, or name it as PYTHON=/path/to/python3.12'
}

# What an installation depends on: where the checkout lies, and the files that say what is installed.
fingerprint() {
  echo "$ROOT"
  cat "$ROOT/constraints.txt" "$ROOT/setup.py"
}

# ensure_venv [EXTRA...]: on return, .venv holds the package and these extras in the tested versions.
# A stamp for each of them makes the next call instant, and lets it work without a network.
ensure_venv() {
  local stamps=("$VENV/.installed" "${@/#/$VENV/.installed-}") stamp missing=false
  for stamp in "${stamps[@]}"; do
    fingerprint | cmp -s - "$stamp" || missing=true
  done
  if ! $missing && is_suitable "$VENV/bin/python"; then
    return
  fi

  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    local python
    python=$(find_python)
    "$python" -m venv "$VENV" ||
      fail "$python -m venv failed; on Debian or Ubuntu, apt install python3-venv provides it"
  fi
  is_suitable "$VENV/bin/python" ||
    fail "$VENV does not hold Python 3.11, 3.12 or 3.13; move it away and run this again"

  # Stamps of other pins go first: if those pins came back, they would vouch for what is replaced now.
  for stamp in "$VENV"/.installed*; do
    fingerprint | cmp -s - "$stamp" || rm -f "$stamp"
  done
  local extras
  extras=$(IFS=, && echo "$*")
  echo "Installing folk_jax${extras:+[$extras]} from constraints.txt into .venv (once; a few minutes)" >&2
  # Two -q leave errors alone on the screen. setuptools comes first, pinned, because an isolated build
  # would fetch whichever is newest.
  local pip=("$VENV/bin/python" -m pip install -qq --no-input -c "$ROOT/constraints.txt")
  "${pip[@]}" setuptools </dev/null
  "${pip[@]}" --no-build-isolation -e "$ROOT${extras:+[$extras]}" </dev/null
  for stamp in "${stamps[@]}"; do
    fingerprint >"$stamp"
  done
}
