"""Several users in one run: each group of episodes has one of them, drawn by weight.

All episodes of a group have the same user: they are compared with each other, and a difference between users would be credited to
the policy.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctcgrpo.environments.eibench.environment import EIBench, SharedUser
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.types import Message


@dataclass(frozen=True, slots=True)
class Part:
    """The scenarios that one of several users plays: of these scenes and languages (None: all), with this weight among the users of
    a scenario."""

    name: str
    weight: float = 1.0
    scenes: Sequence[str] | None = None
    languages: Sequence[str] | None = None

    def plays(self, scenario: Scenario) -> bool:
        scene = self.scenes is None or scenario.scene in self.scenes
        return scene and (self.languages is None or scenario.language in self.languages)


def shares(parts: Sequence[Part], scenario: Scenario) -> dict[str, float]:
    """The probability of each user that plays a scenario; empty where none does."""
    weights = {part.name: part.weight for part in parts if part.plays(scenario)}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def drawn(parts: Sequence[Part], scenario: Scenario, group_seed: int) -> str:
    """The user of a group, the same for the same seed. At least one part plays the scenario."""
    found = shares(parts, scenario)
    return random.Random(group_seed).choices(list(found), list(found.values()))[0]


def mean_shares(parts: Sequence[Part], scenarios: Iterable[Scenario]) -> dict[str, float]:
    """The expected share of episodes of each user, where all scenarios are played equally often."""
    found = [shares(parts, scenario) for scenario in scenarios]
    return {part.name: sum(of.get(part.name, 0.0) for of in found) / max(1, len(found)) for part in parts}


class MixedEIBench(EIBench):
    """EIBench with one of several `users`, by name. The start's info names it as `user`."""

    def __init__(self, parts: Sequence[Part], users: Mapping[str, SharedUser], **options: Any) -> None:
        super().__init__(next(iter(users.values())), **options)
        self._parts, self._users = parts, users

    async def reset(self, task: Mapping[str, Any], *, seed: int) -> Sequence[Message]:
        name = drawn(self._parts, task["scenario"], self.group_seed)
        self._user = self._users[name]
        observation = await super().reset(task, seed=seed)
        self.info = {**self.info, "user": name}
        return observation


class MixedEpisodes(contextlib.AbstractAsyncContextManager["MixedEpisodes"]):
    """Makes the environment of each episode; the `users` are entered while a batch is played. `options`: of `EIBench`."""

    def __init__(self, parts: Sequence[Part], users: Mapping[str, SharedUser], **options: Any) -> None:
        self._parts, self._users, self._options = parts, users, options
        self._open = contextlib.AsyncExitStack()

    def __call__(self) -> MixedEIBench:
        return MixedEIBench(self._parts, self._users, **self._options)

    async def __aenter__(self) -> MixedEpisodes:
        for user in self._users.values():
            await self._open.enter_async_context(user)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._open.aclose()
