"""Which scenarios each step plays, the same on every process and after a resume; and the learning rate of a step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from transformers import TrainingArguments, get_scheduler

from ctcgrpo.records import Scenario


def step_schedule(scenarios: Sequence[Scenario], *, steps: int, per_step: int, seed: int) -> list[list[int]]:
    """For every step, the indices of its `per_step` scenarios: equally many of each scene present, each scene dealt in
    shuffled rounds so that no scenario comes again before all of its scene have."""
    by_scene: dict[str, list[int]] = {}
    for index, scenario in enumerate(scenarios):
        by_scene.setdefault(scenario.scene, []).append(index)
    if per_step % len(by_scene):
        raise ValueError(f"per_step {per_step} is no multiple of the number of scenes {len(by_scene)}")
    share = per_step // len(by_scene)
    decks = [_deal(indices, random.Random(f"{seed}/{scene}")) for scene, indices in by_scene.items()]
    return [[next(deck) for deck in decks for _ in range(share)] for _ in range(steps)]


def _deal(indices: Sequence[int], rng: random.Random) -> Iterator[int]:
    while True:
        deck = list(indices)
        rng.shuffle(deck)
        yield from deck


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
