"""The starter: a small Qwen3 that a machine teaches itself to speak in some minutes, from a bundled corpus."""
