"""Rollouts: policy engines, the runner that plays episodes, and their traces."""
