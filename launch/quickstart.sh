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
precision=""
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
  precision="rollout.dtype=bfloat16 training.bf16=true"
fi
if [ -f "$folder/$name/final/COMPLETE" ]; then
  echo "$folder/$name is finished; remove it to train again"
else
  [ -z "$precision" ] || echo "this processor has bfloat16 instructions: adding $precision"
  echo "training 16 steps: about 10 minutes on two cores with bfloat16 instructions, 20 without (this machine has $cores cores)"
  # shellcheck disable=SC2086  # two overrides
  "$bin/ctcgrpo" train recipes/quickstart.yaml $precision "$@"
fi
"$bin/ctcgrpo" show "$folder/$name"
cat <<NEXT

next
  talk with the policy, before and after  $bin/ctcgrpo chat --policy $folder/$name/final --compare --web
  reply to the simulated user yourself    $bin/ctcgrpo chat --instructions short
  all dialogues and curves in a page      $bin/ctcgrpo report $folder/$name
  what evaluations need                   ./launch/install.sh eval
  the benchmark, before and after         $bin/ctcgrpo evaluate $folder/$name
  the longer run, 40 steps                $bin/ctcgrpo train recipes/smollm2.yaml $precision
NEXT
