"""The records that flow through ctcgrpo. Whoever knows these knows the program.

    Scenario -> Episode (Turn, Turn, ...) -> TurnSample -> rows of the trainer

All are frozen; everything else is a function from some of them to others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Scene = Literal["support", "defense", "repair", "charm"]
SCENES: tuple[Scene, ...] = ("support", "defense", "repair", "charm")

MAX_DELTA = 10
"""A turn changes each axis by at most this much."""


class UserState(NamedTuple):
    """The user's emotional state: two integers in [0, 100] whose meaning the scene sets (higher anger is worse)."""

    anger: int
    trust: int

    def plus(self, anger_delta: int, trust_delta: int) -> UserState:
        """The state after a turn: each delta is clipped to [-10, 10], the result is clamped to [0, 100]."""
        return UserState(_moved(self.anger, anger_delta), _moved(self.trust, trust_delta))


def _moved(value: int, delta: int) -> int:
    return min(100, max(0, value + min(MAX_DELTA, max(-MAX_DELTA, delta))))


class Anchors(NamedTuple):
    """Where a scenario starts, where it should end, and the worst it can come to."""

    initial: UserState
    target: UserState
    worst: UserState


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation: who the user is, which role the policy plays, and how the outcome is measured.

    `opening_line` is the user's first line; it is empty in charm, where the policy opens. `script` is what the
    scripted simulator knows beyond the personas (empty for records without it); `extras` holds every further key of
    the source record, unread and kept.
    """

    id: str
    title: str
    scene: Scene
    language: str
    user_persona: str
    opening_line: str
    policy_persona: str
    goal: str
    success_criteria: tuple[str, ...]
    must_avoid: tuple[str, ...]
    anchors: Anchors
    source: str = ""
    script: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    extras: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def policy_opens(self) -> bool:
        return not self.opening_line


@dataclass(frozen=True, slots=True)
class Completion:
    """What a policy engine returns for one request.

    `token_ids` (n,) are the sampled ids, end-of-turn token included when one was sampled. `logprobs` (n,) are natural
    logs under the distribution that was sampled from: temperature applied, top-p and top-k renormalised. `log_kept`
    (n,) is the log of the probability mass that top-p and top-k kept, so `logprobs + log_kept` is the log-probability
    at the sampling temperature without truncation; it is empty where the engine cannot tell.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    log_kept: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the policy and the user's answer to it.

    `reply` is the visible text, without reasoning; `reasoning` is None for a completion without a reasoning part.
    `faults` names what is wrong with the form of the completion ("broken_tags", "unclosed_reasoning",
    "empty_reasoning", "empty_reply", "cut"). `before` and `after` are the user's state around this turn.
    """

    prompt_ids: tuple[int, ...]
    completion: Completion
    reply: str
    reasoning: str | None
    faults: tuple[str, ...]
    before: UserState
    after: UserState
    user_line: str
    user_goes_on: bool
    why: str
    dropped_exchanges: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an episode is not a result. `kind` is one of `ctcgrpo.errors.EPISODE_ERRORS`' kinds."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Episode:
    """One dialogue between the policy and the simulated user: a result, or a failure with its reason.

    `outcome` is in [-1, 1], or NaN exactly when `failure` is set. `group` is the position of the scenario in its step
    and `rollout` the position of the episode in its group; both are global, not per process.
    """

    scenario: Scenario
    step: int
    group: int
    rollout: int
    turns: tuple[Turn, ...]
    outcome: float
    failure: Failure | None = None
    seconds_policy: float = 0.0
    seconds_simulator: float = 0.0

    @property
    def name(self) -> str:
        """How logs call this episode: step/scenario/rollout."""
        return f"{self.step}/{self.scenario.id}/{self.rollout}"

    @property
    def final_state(self) -> UserState:
        return self.turns[-1].after if self.turns else self.scenario.anchors.initial


@dataclass(frozen=True, slots=True)
class TurnSample:
    """What the trainer sees of a turn: context, sampled tokens, and one advantage for all of them, reasoning included.

    `old_logprobs` (n,) are log-probabilities at the sampling temperature, of the policy before the step's first update;
    None means that the current ones stand in for them (ratio 1).
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float
    old_logprobs: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)
