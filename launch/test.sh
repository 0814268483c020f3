#!/usr/bin/env bash
# Installs what the tests need (launch/install.sh) and runs lint, types and tests, in two processes. Arguments go to pytest
# (-n 0 for one process).
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/install.sh dev
bin="${CTCGRPO_VENV:-.venv}/bin"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/python" -m pytest -n 2 --dist loadfile --durations=8 "$@"
