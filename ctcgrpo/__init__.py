"""Train language models to manage a user's emotions over several turns, with CTC-GRPO on TRL."""

__version__ = "0.1.0"
