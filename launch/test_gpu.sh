#!/usr/bin/env bash
# The first thing to run on a new GPU node: tries every way in which this project uses a GPU, and says what works and how fast. Some
# 10 to 15 minutes on one GPU, more with several. Needs no network.
#   launch/test_gpu.sh [--only NAME ...] [--out FOLDER] [--scratch FOLDER]     checks whose name contains NAME; --list names all
#   launch/test_gpu.sh --cpu                                                   what needs no GPU: under two minutes
# Takes the environment of launch/install.sh ($CTCGRPO_VENV, by default .venv) where it is there, else the python on the PATH, with
# the torch that it has (2.11 or newer). Ends with 1 where a check failed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${CTCGRPO_VENV:-.venv}/bin/python"
[ -x "$python" ] || python="$(command -v python3)"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TRL_EXPERIMENTAL_SILENCE=1
exec "$python" -m tests.gpu "$@"
