#!/usr/bin/env bash
# Installs, fetches SmolLM2-135M-Instruct (93 MB, once), trains it on a simulated user, and shows what it learned; without a GPU, a
# key or an account. Ctrl-C saves; the same command resumes.
#   ./launch/quickstart.sh                                     checkpoints/quickstart
#   ./launch/quickstart.sh run.seed=1 run.name=quickstart-1    with other samples
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

./launch/install.sh smollm2
bin="${CTCGRPO_VENV:-.venv}/bin"
cores=$(getconf _NPROCESSORS_ONLN)
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}"
if [ -f "$folder/$name/final/COMPLETE" ]; then
  echo "$folder/$name is finished; remove it to train again"
else
  if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    echo "this processor has bfloat16 instructions: adding rollout.dtype=bfloat16 training.bf16=true"
    set -- rollout.dtype=bfloat16 training.bf16=true "$@"
  fi
  echo "training: 16 steps, 10 to 20 minutes on two cores and less on more (this machine has $cores); each step says the time left"
  "$bin/ctcgrpo" train recipes/quickstart.yaml "$@"
fi
"$bin/ctcgrpo" show "$folder/$name"
cat <<NEXT

next
  $bin/ctcgrpo chat --instructions short            talk to the simulated user yourself
  $bin/ctcgrpo report $folder/$name                 every dialogue, credit and curve as one HTML page
  ./launch/install.sh eval                          what evaluations need, then
  $bin/ctcgrpo evaluate $folder/$name               base and trained policy on the benchmark, with intervals
  $bin/ctcgrpo train recipes/smollm2.yaml           the longer run: 40 steps
NEXT
