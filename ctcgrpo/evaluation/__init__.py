"""Benchmarks for any model. Inspect AI plays them (extra `eval`); reading, summing up and comparing results needs none of it."""
