#!/usr/bin/env bash
# A vLLM server that plays the policy for rollout.engine=vllm_server, on GPUs that do not train: it takes new weights over NCCL.
#   launch/serve_policy.sh Qwen/Qwen3-32B --gpus 0,1,2,3,4,5,6,7 [--host 0.0.0.0] [--port 8000] [-- further options of vllm serve]
# --max-model-len must be at least rollout.max_prompt_tokens + rollout.max_new_tokens. vLLM's development endpoints are on, which
# weights travel by: let nobody else reach the port. vLLM runs from $CTCGRPO_VLLM_BIN (default: vllm on the PATH).
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { sed -n 2,5p "$0"; exit 2; }
model="$1"
shift
gpus=0 host=127.0.0.1 port=8000
while [ $# -gt 0 ]; do
  case "$1" in
    --gpus) gpus="$2"; shift 2 ;;
    --host) host="$2"; shift 2 ;;
    --port) port="$2"; shift 2 ;;
    --) shift; break ;;
    *) echo "serve_policy.sh: unknown option $1" >&2; exit 2 ;;
  esac
done
export CUDA_VISIBLE_DEVICES="$gpus" VLLM_SERVER_DEV_MODE=1
exec "${CTCGRPO_VLLM_BIN:-vllm}" serve "$model" --host "$host" --port "$port" \
  --tensor-parallel-size "$(awk -F, '{print NF}' <<< "$gpus")" --enable-prefix-caching \
  --logprobs-mode processed_logprobs --weight-transfer-config '{"backend":"nccl"}' "$@"
