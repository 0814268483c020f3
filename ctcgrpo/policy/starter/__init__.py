"""The starter: a small Qwen3 that a machine teaches itself to speak in about two minutes, from a bundled corpus."""
