"""Many runs of one recipe: a search over its fields (W&B's format), or a comparison of variants."""
