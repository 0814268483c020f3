"""Which simulator a command talks to: servers by URL, or one of its own from a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctcgrpo.errors import RecipeError
from ctcgrpo.simulator.client import SimulatorClient
from ctcgrpo.simulator.config import SCRIPTED_USER, TOKEN_ENV, bearer_token, load_simulator_config
from ctcgrpo.simulator.server import SimulatorServer, running

_PATIENCE = 20.0
"""Seconds: a person waits."""


@contextmanager
def chosen_simulator(config: Path | None, urls: Sequence[str]) -> Iterator[SimulatorClient]:
    """A client, not entered yet, for as long as the context lasts; the scripted user where neither is given. The servers' token is
    the one in CTCGRPO_SIMULATOR_TOKEN. Raises RecipeError where both are given."""
    if urls and config is not None:
        raise RecipeError("--config and --url exclude each other: a server has a configuration of its own")
    if urls:
        yield SimulatorClient(list(urls), token=bearer_token(TOKEN_ENV), patience=_PATIENCE)
        return
    server = SimulatorServer(SCRIPTED_USER if config is None else load_simulator_config(config))
    deadline = server.config.llm.deadline if server.config.llm is not None else 0
    with running(server) as url:
        yield SimulatorClient(url, timeout=deadline + 30, patience=_PATIENCE)


def check_patience(says: Mapping[str, Any], timeout: float) -> None:
    """Refuse to wait for a turn no longer than the simulator may take for it, by what it says of itself."""
    if (says.get("deadline") or 0) >= timeout:
        raise RecipeError(
            f"simulator.timeout is {timeout:g} s, but the simulator may take {says['deadline']:g} s for a turn (llm.deadline); it "
            "must be larger"
        )


async def introduced(simulator: SimulatorClient) -> dict[str, Any]:
    """What the simulator says of itself. Raises SimulatorTransportError at once where none answers."""
    async with simulator:
        return await simulator.health()
