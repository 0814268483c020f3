#!/usr/bin/env bash
# Installs, builds a small policy, trains it on a simulated user, and shows what it learned: some ten minutes on two
# cores, without a GPU, a key or a download of a model. Ctrl-C saves; the same command goes on.
#   ./launch/quickstart.sh                                     checkpoints/quickstart
#   ./launch/quickstart.sh run.seed=1 run.name=quickstart-1    another starter, trained with other samples
# Arguments are overrides of recipes/quickstart.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."

name=quickstart
folder=checkpoints
for argument in "$@"; do
  case "$argument" in
    run.name=*) name="${argument#*=}" ;;
    run.output_dir=*) folder="${argument#*=}" ;;
  esac
done

./launch/install.sh
bin="${CTCGRPO_VENV:-.venv}/bin"
# Two threads at most: more do not help so small a model, and with another number sums are rounded otherwise.
cores=$(getconf _NPROCESSORS_ONLN)
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 2 ? cores : 2))}"
if [ -f "$folder/$name/final/COMPLETE" ]; then
  echo "$folder/$name is finished; remove it to train again"
else
  "$bin/ctcgrpo" train recipes/quickstart.yaml "$@"
fi
"$bin/ctcgrpo" show "$folder/$name"
