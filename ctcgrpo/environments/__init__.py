"""Environments to train a policy in: each module has an `Environment`."""
