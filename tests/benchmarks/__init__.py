"""Benchmarks: each is a command that runs both sides in one process or in alternation, and prints their ratio."""
