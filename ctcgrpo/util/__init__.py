"""Helpers without dependencies on training, rollouts or simulators."""
