#!/usr/bin/env bash
# Makes a virtual environment and installs this project into it; quick when nothing changed since.
#   ./launch/install.sh            what a run needs
#   ./launch/install.sh dev        and what the tests need (any extras of pyproject.toml, comma-separated)
# The environment is $CTCGRPO_VENV, by default .venv in the project. Without an NVIDIA GPU, PyTorch is a CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${CTCGRPO_VENV:-.venv}"
extras="${1:-}"
target=".${extras:+[$extras]}"

python=""
for candidate in python3.11 python3.12 python3.13 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    python="$candidate"
    break
  fi
done
[ -n "$python" ] || { echo "expected Python 3.11 to 3.13 on the PATH; none found" >&2; exit 1; }

stamp="$venv/.installed-${extras:-run}"
dev="$(sed -n 's/^ *"ctcgrpo\[\(.*\)\]",$/\1/p' pyproject.toml)"
# An earlier installation will do if it has all of the extras.
for found in "$venv"/.installed-*; do
  has=",${found##*/.installed-},"
  case "$has" in *,dev,*) has="$has$dev," ;; esac
  for extra in ${extras//,/ }; do
    case "$has" in *",$extra,"*) ;; *) continue 2 ;; esac
  done
  if [ -x "$venv/bin/python" ] && cmp -s pyproject.toml "$found"; then
    exit 0
  fi
done
echo "installing into $venv: this takes some minutes, mostly for PyTorch"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

# pip install. A terminal shows what it does in one line; elsewhere only what takes long is printed.
pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" | while IFS= read -r line; do
    if [ -t 1 ]; then
      printf '\r\033[K%.78s' "  $line"
    else
      case "$line" in *Downloading\ *[MG]B\) | Installing\ collected\ *) printf '  %.78s\n' "${line#"${line%%[! ]*}"}" ;; esac
    fi
  done
  local code="${PIPESTATUS[0]}"
  [ ! -t 1 ] || printf '\r\033[K'
  return "$code"
}

torch="$(sed -n 's/^ *"\(torch>=[^"]*\)".*/\1/p' pyproject.toml)"
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  echo "no NVIDIA GPU found: installing PyTorch's CPU build"
  oldest="${torch#*>=}"
  # Named exactly: a range would take the newest build with CUDA wherever both are on offer.
  pip_install --timeout 20 --retries 0 --index-url https://download.pytorch.org/whl/cpu "torch==${oldest%%,*}.*" 2>/dev/null \
    || pip_install "torch==${oldest%%,*}.0"
fi
pip_install --editable "$target"
cp pyproject.toml "$stamp"
