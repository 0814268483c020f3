"""Many runs of one recipe, from one file: a search over its fields (W&B's format), or variants of it that are compared."""
