"""The starter: a small Qwen3 that a machine teaches itself to speak in about a minute, from a bundled corpus."""
