"""Sweeps: many runs of one recipe, from a file in W&B's format, with or without W&B."""
