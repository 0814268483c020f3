"""The learning rate of a step."""

from __future__ import annotations

import torch
from transformers import TrainingArguments, get_scheduler


def learning_rate_at(arguments: TrainingArguments, step: int) -> float:
    """The learning rate of the optimizer step after `step` of them."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        int(arguments.warmup_steps),
        arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    return float(arguments.learning_rate * schedule.lr_lambdas[0](step))
