#!/usr/bin/env bash
# Runs the tests of EIBench in verifiers. They need an environment of their own, since verifiers needs another openai than the extra
# `eval` does. The environment is $CTCGRPO_VERIFIERS, by default ~/.cache/ctcgrpo/verifiers. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export CTCGRPO_VENV="${CTCGRPO_VERIFIERS:-$HOME/.cache/ctcgrpo/verifiers}"
./launch/install.sh verifiers
mapfile -t needed < <("$CTCGRPO_VENV/bin/python" -c '
import tomllib
needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"]
print(*(need for need in needs if need.startswith(("pytest", "hypothesis"))), sep="\n")')
"$CTCGRPO_VENV/bin/python" -m pip --quiet --disable-pip-version-check install "${needed[@]}"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$CTCGRPO_VENV/bin/python" -m pytest tests/unit/test_verifiers.py "$@"
