"""Helpers that know nothing of training, rollouts or simulators."""
