"""What a run asks of the simulator, and what that costs: pure arithmetic on counts and prices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Asked:
    """How much is asked for, at most: dialogues that end early cost less. `validations` counts those before and after training."""

    steps: int
    episodes_per_step: int
    turns: int
    validations: int
    episodes_per_validation: int
    calls_per_turn: int = 1

    @property
    def calls_per_step(self) -> int:
        return self.episodes_per_step * self.turns * self.calls_per_turn

    @property
    def calls(self) -> int:
        validation = self.validations * self.episodes_per_validation * self.turns * self.calls_per_turn
        return self.steps * self.calls_per_step + validation


@dataclass(frozen=True, slots=True)
class Tokens:
    """Mean tokens of a simulator call over a dialogue of full length."""

    prompt: float
    completion: float


def money(calls: float, tokens: Tokens, prompt_price: float, completion_price: float) -> float:
    """By prices per million tokens."""
    return calls * (tokens.prompt * prompt_price + tokens.completion * completion_price) / 1e6


def hours(asked: Asked, tokens_per_turn: float, tokens_per_second: float) -> float:
    """Of sampling alone, at the policy's measured throughput."""
    turns = asked.calls / asked.calls_per_turn
    return turns * tokens_per_turn / tokens_per_second / 3600
