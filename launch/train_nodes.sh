#!/usr/bin/env bash
# One node's part of a run on several; run it on each, with its own NODE_RANK. The same commands again go on with the run.
#   NODES=2 NODE_RANK=0 MAIN_ADDRESS=node-0 launch/train_nodes.sh recipes/qwen3_32b.yaml rollout.vllm.urls=[http://node-2:8000]
# MAIN_ADDRESS is the node of rank 0; GPUS (default 8) a node, MAIN_PORT (default 29500). run.output_dir has to be on a disk that
# all nodes share.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 2,5p "$0"; exit 2; }
for name in NODES NODE_RANK MAIN_ADDRESS; do
  [ -n "${!name:-}" ] || { echo "train_nodes.sh: $name is not set" >&2; exit 2; }
done
gpus="${GPUS:-8}"
# Else the launcher kills what is saving 30 s after it was told to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}"
exec "${CTCGRPO_VENV:-.venv}/bin/accelerate" launch --config_file configs/accelerate/nodes.yaml --num_machines "$NODES" \
  --num_processes "$((NODES * gpus))" --machine_rank "$NODE_RANK" --main_process_ip "$MAIN_ADDRESS" \
  --main_process_port "${MAIN_PORT:-29500}" "$@"
