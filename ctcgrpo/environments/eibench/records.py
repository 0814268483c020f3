"""The records of EIBench's task: a scenario, and the state of its user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple


class SceneRules(NamedTuple):
    """A scene's rules for its records. `policy_opens`: whether the policy speaks first; None where each record says so, by an
    `opening_line` or none. `anger_may_rise`: whether the target may lie at or above the initial anger. `script`: the part of a
    record's script that says what the scene wants to hear by name."""

    policy_opens: bool | None = None
    anger_may_rise: bool = True
    script: str | None = None


_PUBLISHED: Mapping[str, SceneRules] = {
    "support": SceneRules(policy_opens=False, anger_may_rise=False),
    "defense": SceneRules(policy_opens=False, script="boundary"),  # holding a boundary may cost some anger
    "repair": SceneRules(policy_opens=False, anger_may_rise=False, script="repair"),
    "charm": SceneRules(policy_opens=True, anger_may_rise=False),
}
SCENES = tuple(_PUBLISHED)  # the scenes of the published set. A set may have others: any name of SCENE_NAME's form
MAX_DELTA = 10  # a turn changes each axis by at most this much
SCENE_NAME = r"^[^\W_][\w-]{0,39}$"


def scene_rules(scene: str) -> SceneRules:
    return _PUBLISHED.get(scene, SceneRules())


def in_order(scenes: Iterable[str]) -> list[str]:
    """Each scene once: those of the published set in its order, then others by name."""
    found = set(scenes)
    return [*(scene for scene in SCENES if scene in found), *sorted(found - set(SCENES))]


class UserState(NamedTuple):
    """The user's emotional state: two integers in [0, 100] whose meaning the scene sets (higher anger is worse)."""

    anger: int
    trust: int

    def plus(self, anger_delta: int, trust_delta: int) -> UserState:
        """The state after a turn: each delta is clipped to [-10, 10], the result is clamped to [0, 100]."""
        deltas = (min(MAX_DELTA, max(-MAX_DELTA, delta)) for delta in (anger_delta, trust_delta))
        return UserState(*(min(100, max(0, value + delta)) for value, delta in zip(self, deltas, strict=True)))


class Anchors(NamedTuple):
    """Where a scenario starts, where it should end, and the worst it can come to."""

    initial: UserState
    target: UserState
    worst: UserState


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation: who the user is, which role the policy plays, and how the outcome is measured.

    `opening_line` is the user's first line; it is empty where the policy opens (as in charm). `script` is what the
    scripted simulator knows beyond the personas (empty for records without it); `extras` holds every further key of
    the source record, unread and kept."""

    id: str
    title: str
    scene: str
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
