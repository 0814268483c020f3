"""EIBench over OpenEnv (`ctcgrpo serve --openenv`): a server that plays whole dialogues, with a simulator in the same process.

The dialogue is `EIBench`'s, OpenEnv's endpoints are environments/openenv_server.py's, limits and shutdown are the simulator
server's. /v1/turn and the simulator's other endpoints are not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette

from ctcgrpo.environments.eibench import EIBenchEpisodes, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.openenv_server import openenv_app
from ctcgrpo.simulator.config import SimulatorConfig
from ctcgrpo.simulator.protocol import TurnReply, TurnRequest
from ctcgrpo.simulator.server import SimulatorServer

NAME = "eibench"
_PING_SECONDS, _PONG_SECONDS = 60.0, 600.0  # a client that trains between two replies answers late


class OpenEnvServer(SimulatorServer):
    """A server of dialogues on `scenarios`, of at most `max_turns` replies. Raises as SimulatorServer, and ScenarioError for a
    scenario that its backend cannot play."""

    def __init__(
        self, config: SimulatorConfig, scenarios: Sequence[Scenario], *, briefing: Briefing, max_turns: int, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self.check(scenarios)
        self._scenarios, self._briefing, self._max_turns = scenarios, briefing, max_turns

    @property
    def title(self) -> str:
        return f"OpenEnv server of {len(self._scenarios)} scenarios, {super().title},"

    @property
    def websockets(self) -> Mapping[str, Any]:
        return {
            "ws": "websockets-sansio",
            "ws_max_size": int(self.config.server.max_body_mb * 1_000_000),
            "ws_ping_interval": _PING_SECONDS,
            "ws_ping_timeout": _PONG_SECONDS,
            "ws_per_message_deflate": False,
        }

    def app(self) -> Starlette:
        episodes = EIBenchEpisodes(_InProcess(self), briefing=self._briefing, max_turns=self._max_turns)
        tasks = [task_of(scenario) for scenario in self._scenarios]
        most_bytes = int(self.config.server.max_body_mb * 1_000_000)
        return openenv_app(episodes, tasks, name=NAME, token=self.token, most_bytes=most_bytes)


class _InProcess:
    """The user of all dialogues: the server's own, closed with it."""

    def __init__(self, server: SimulatorServer) -> None:
        self._server = server

    async def turn(self, request: TurnRequest) -> TurnReply:
        return await self._server.service.turn(request)

    async def __aenter__(self) -> _InProcess:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._server.close()
