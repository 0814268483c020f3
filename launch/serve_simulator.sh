#!/usr/bin/env bash
# An open model plays the user, on this machine's GPUs: a vLLM server for it, and the simulator server in front. Ctrl-C ends both.
#   launch/serve_simulator.sh Qwen/Qwen3-32B --gpus 4,5,6,7 [--host 0.0.0.0] [--port 8765] [-- further options of vllm serve]
# vLLM runs from $CTCGRPO_VLLM_BIN (default: vllm on the PATH). Beyond loopback set CTCGRPO_SIMULATOR_TOKEN.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { sed -n 2,4p "$0"; exit 2; }
model="$1"
shift
gpus=0 host=127.0.0.1 port=8765 vllm_port=8766
while [ $# -gt 0 ]; do
  case "$1" in
    --gpus) gpus="$2"; shift 2 ;;
    --host) host="$2"; shift 2 ;;
    --port) port="$2"; shift 2 ;;
    --vllm-port) vllm_port="$2"; shift 2 ;;
    --) shift; break ;;
    *) echo "serve_simulator.sh: unknown option $1" >&2; exit 2 ;;
  esac
done
tensor_parallel="$(awk -F, '{print NF}' <<< "$gpus")"
config="$(mktemp -d)/simulator.yaml"
# Under the model's own name: it is part of what summaries say, and of what answers are kept under.
sed -e "s#http://127.0.0.1:8766/v1#http://127.0.0.1:$vllm_port/v1#" -e "s#^\( *model: \).*#\1$model#" \
  configs/simulator/local_vllm.yaml > "$config"

children=()
stop() {
  trap - EXIT INT TERM
  # The simulator first: it lets the turns under way end.
  for ((k = ${#children[@]} - 1; k >= 0; k--)); do
    kill -TERM "${children[k]}" 2>/dev/null || true
    wait "${children[k]}" 2>/dev/null || true
  done
  rm -rf "$(dirname "$config")"
}
trap stop EXIT
trap 'stop; exit 130' INT TERM

CUDA_VISIBLE_DEVICES="$gpus" "${CTCGRPO_VLLM_BIN:-vllm}" serve "$model" --host 127.0.0.1 \
  --port "$vllm_port" --tensor-parallel-size "$tensor_parallel" --enable-prefix-caching --max-model-len 16384 "$@" &
children+=($!)
echo "waiting for vLLM to load $model on GPUs $gpus"
until curl --silent --fail "http://127.0.0.1:$vllm_port/health" > /dev/null; do
  kill -0 "${children[0]}" 2>/dev/null || { echo "vLLM exited before it was ready" >&2; exit 1; }
  sleep 2
done
"${CTCGRPO_VENV:-.venv}/bin/ctcgrpo" serve "$config" --host "$host" --port "$port" &
children+=($!)
wait -n "${children[@]}"
echo "one of the servers exited; stopping the other" >&2
exit 1
