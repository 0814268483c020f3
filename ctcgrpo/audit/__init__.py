"""Compares kinds of credit on the same rollouts, by the gradients that they make."""
