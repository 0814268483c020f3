"""Blind reading of held-out dialogues by a judge that was not trained against; `python -m tests.blind --help`."""
