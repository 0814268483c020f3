"""The users of a run: of training, one or several, and the other one of validations; their servers, and their record."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from ctcgrpo.environments.eibench import EIBenchEpisodes
from ctcgrpo.environments.eibench.mixture import MixedEpisodes, Part, shares
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import RecipeError
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.simulator.choice import SimulatorChoice, check_timeout, read_health, simulator_of
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.logs import json_log
from ctcgrpo.types import Environment
from ctcgrpo.util.processes import on_main
from ctcgrpo.util.terminal import LogLine

OTHER = "other user"
"""What the user of validation.simulator is called."""
SIMULATOR, VALIDATED_WITH = "simulator", "validation.simulator"
"""The sections of the only user of training, and of the other user."""
_OF_THE_SERVER = ("status", "version", "deadline")  # what a health answer says of the server, and not of the user


@dataclass(frozen=True, slots=True)
class Player:
    """A user: the scenarios that it plays, and who plays it. `field` of the recipe names it. `port`: of its embedded server.
    `several`: whether it is one of several users of training."""

    part: Part
    choice: SimulatorChoice
    field: str
    port: int = 0
    several: bool = False

    @property
    def name(self) -> str:
        return self.part.name


def trained_on(recipe: Recipe) -> tuple[Player, ...]:
    """The users of training. Raises RecipeError for a configuration that cannot be read."""
    section = recipe.simulator
    if not section.users:
        return (Player(Part(section.label), simulator_of(section), SIMULATOR, section.port),)
    parts = [Part(user.label, user.weight, user.scenes, user.languages) for user in section.users]
    return tuple(
        Player(part, simulator_of(user), f"simulator.users.{k}", several=True)
        for k, (part, user) in enumerate(zip(parts, section.users, strict=True))
    )


def other_of(recipe: Recipe) -> Player | None:
    """The other user of validations; None without one."""
    if recipe.validation is None or recipe.validation.simulator is None:
        return None
    return Player(Part(OTHER), simulator_of(recipe.validation.simulator), VALIDATED_WITH)


def refuse_unplayed(players: Sequence[Player], scenarios: Iterable[Scenario]) -> None:
    """Raises RecipeError for a scenario that none of several users plays."""
    parts = [player.part for player in players]
    for scenario in scenarios:
        if not shares(parts, scenario):
            what = f"scenario {scenario.id!r} (scene {scenario.scene!r}, language {scenario.language!r})"
            raise RecipeError(f"simulator.users: none plays {what}; expected one; extend scenes and languages of a user")


@dataclass(frozen=True, slots=True)
class Opened:
    """A user whose server runs: its client, and its description of itself."""

    player: Player
    client: SimulatorClient
    about: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, and what it plays; a resumed run requires the same."""
        part, about = self.player.part, {k: v for k, v in self.about.items() if k not in _OF_THE_SERVER}
        if not self.player.several:
            return about
        limits = {"scenes": part.scenes, "languages": part.languages}
        return {**about, "weight": part.weight, **{name: list(plays) for name, plays in limits.items() if plays is not None}}

    def facts(self) -> dict[str, Any]:
        """For summary.json, at the end of the run."""
        return {**self.about, **self.identity, "spent": asyncio.run(_account(self.client))}


async def _account(client: SimulatorClient) -> dict[str, Any]:
    async with client:
        return await client.account()


def opened(
    player: Player,
    recipe: Recipe,
    scenarios: Sequence[Scenario],
    stack: ExitStack,
    state: PartialState,
    folder: RunFolder,
    log_line: LogLine,
) -> Opened:
    """Connects to a user on every process; the main one starts its embedded server, which `stack` stops."""
    settings, choice = recipe.simulator, player.choice
    options: dict[str, Any] = {"timeout": settings.timeout, "patience": settings.patience, "log_line": log_line}
    client = choice.client(_urls(player, scenarios, stack, state, folder), settings.token_env, **options)
    about = asyncio.run(read_health(client))
    check_timeout(about, settings.timeout)
    return Opened(player, client, about)


def _urls(
    player: Player, scenarios: Sequence[Scenario], stack: ExitStack, state: PartialState, folder: RunFolder
) -> tuple[str, ...]:
    """The URLs of a user's servers, for all processes."""
    choice = player.choice
    if choice.urls:
        return choice.urls
    if state.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)):
        raise RecipeError(
            f"{player.field}.url is 'embedded', which other nodes cannot reach; start `ctcgrpo serve CONFIG --host 0.0.0.0` with a "
            f"token, and set {player.field}.url=http://HOST:8765; launch/slurm.sbatch does both for simulator.url"
        )

    def start() -> tuple[str, ...]:
        file = folder.simulator_log("" if player.field == SIMULATOR else player.name)
        log = json_log(stack.enter_context(file.open("a", encoding="utf-8")))
        mine = [scenario for scenario in scenarios if player.part.plays(scenario)]
        return stack.enter_context(choice.served(mine, log=log, port=player.port))

    return tuple(on_main(state, start))


def episodes_with(users: Sequence[Opened], **options: Any) -> Callable[[], Environment]:
    """The factory of an episode's environment with one user or several. `options`: of `EIBench`."""
    if not users[0].player.several:
        return EIBenchEpisodes(users[0].client, **options)
    parts = [user.player.part for user in users]
    return MixedEpisodes(parts, {user.player.name: user.client for user in users}, **options)


def recorded(users: Sequence[Opened], other: Opened | None, of: Callable[[Opened], dict[str, Any]]) -> dict[str, Any]:
    """The record of a run's users: of the only one, or of all by name; with that of the other user."""
    found = {"users": {user.player.name: of(user) for user in users}} if users[0].player.several else of(users[0])
    return found if other is None else {**found, "validation": of(other)}
