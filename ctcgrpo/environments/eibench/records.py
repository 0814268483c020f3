"""The records of EIBench's task: a scenario, and the state of its user."""

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
