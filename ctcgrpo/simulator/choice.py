"""Who plays the user: servers that run already, or a server of this process for a configuration. The one place that chooses, and
names who it was (`who_played`).

By a name (`named_simulator`: scripted, a configuration's file, a URL), by a recipe's section `simulator` (`simulator_of`), or by
the options --config and --url (`chosen_simulator`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctcgrpo.errors import RecipeError
from ctcgrpo.simulator.config import SCRIPTED_USER, TOKEN_ENV, Llm, SimulatorConfig, bearer_token, load_simulator_config
from ctcgrpo.util.terminal import printable

if TYPE_CHECKING:  # both take a while to import, and names are read before anything is asked
    from ctcgrpo.environments.eibench.records import Scenario
    from ctcgrpo.run.recipe import Simulator
    from ctcgrpo.simulator.client import SimulatorClient
    from ctcgrpo.simulator.logs import Log

SCRIPTED = "scripted"
EMBEDDED = "embedded"
_URL = ("http://", "https://")
_TIMEOUT = 240.0
_PATIENCE = 20.0  # Seconds: a person waits


@dataclass(frozen=True, slots=True)
class SimulatorChoice:
    """`urls` of servers that run already; without any, `config` is served by this process."""

    urls: tuple[str, ...] = ()
    config: SimulatorConfig = SCRIPTED_USER

    @property
    def llm(self) -> Llm | None:
        """The LLM that is called with settings from here; a server that runs already has its own."""
        return None if self.urls else self.config.llm

    @property
    def timeout(self) -> float:
        """Seconds that a request for a turn may take."""
        return _TIMEOUT if self.llm is None else self.llm.deadline + 30

    @contextmanager
    def served(self, scenarios: Iterable[Scenario] = (), *, log: Log | None = None, port: int = 0) -> Iterator[tuple[str, ...]]:
        """The URLs to ask, for as long as the context lasts. Raises RecipeError for a backend that cannot be made, ScenarioError
        for one of `scenarios` that an own server cannot play."""
        if self.urls:
            yield self.urls
            return
        from ctcgrpo.simulator.server import SimulatorServer, running

        server = SimulatorServer(self.config, log=log)
        server.check(scenarios)
        with running(server, port) as url:
            yield (url,)

    def client(self, urls: Sequence[str], *, patience: float = 600.0) -> SimulatorClient:
        """A client of what `served` gave, not entered yet."""
        from ctcgrpo.simulator.client import SimulatorClient

        return SimulatorClient(list(urls), token=bearer_token(TOKEN_ENV), timeout=self.timeout, patience=patience)


def names_a_simulator(name: str) -> bool:
    """Whether a name is one for `named_simulator`, and not a model's."""
    return name == SCRIPTED or name.startswith(_URL) or name.endswith((".yaml", ".yml"))


def named_simulator(name: str) -> SimulatorChoice:
    """scripted, the URL of a server, or the file of a configuration. Raises RecipeError for a configuration that cannot be read."""
    if name == SCRIPTED:
        return SimulatorChoice()
    return SimulatorChoice((name,)) if name.startswith(_URL) else SimulatorChoice(config=load_simulator_config(name))


def simulator_of(section: Simulator) -> SimulatorChoice:
    """The simulator of a recipe. Raises RecipeError for a configuration that cannot be read."""
    if section.url != EMBEDDED:
        return SimulatorChoice(urls=(section.url,) if isinstance(section.url, str) else section.url)
    return SimulatorChoice() if section.config is None else SimulatorChoice(config=load_simulator_config(section.config))


def name_of(section: Simulator) -> str:
    """The name of a recipe's simulator, as `named_simulator` reads it: the first of several servers."""
    if section.url != EMBEDDED:
        return section.url if isinstance(section.url, str) else section.url[0]
    return SCRIPTED if section.config is None else str(section.config)


@contextmanager
def chosen_simulator(config: Path | None, urls: Sequence[str]) -> Iterator[SimulatorClient]:
    """A client, not entered yet, for as long as the context lasts; the scripted user where neither is given. The servers' token is
    the one in CTCGRPO_SIMULATOR_TOKEN. Raises RecipeError where both are given."""
    if urls and config is not None:
        raise RecipeError("--config and --url exclude each other: a server has a configuration of its own")
    choice = SimulatorChoice(tuple(urls), SCRIPTED_USER if config is None else load_simulator_config(config))
    with choice.served() as found:
        yield choice.client(found, patience=_PATIENCE)


def check_patience(says: Mapping[str, Any], timeout: float) -> None:
    """Refuse to wait for a turn no longer than the simulator may take for it, by what it says of itself."""
    if (most := says.get("deadline") or 0) >= timeout:
        taken = f"the simulator may take {most:g} s for a turn (llm.deadline)"
        raise RecipeError(f"simulator.timeout is {timeout:g} s, but {taken}; it must be larger")


async def introduced(simulator: SimulatorClient) -> dict[str, Any]:
    """What the simulator says of itself. Raises SimulatorTransportError at once where none answers."""
    async with simulator:
        return await simulator.health()


def who_played(about: Mapping[str, Any] | None) -> str:
    """Who played the user (or the judge), by what a server or an evaluation said of it (`GET /health`): the models, or the backend
    where it has none, and its prompts; "unknown" where neither is said. A server of somebody else may say anything: what is not
    text is left out."""
    about = about or {}
    models = about.get("models")
    names = [name for name in models if isinstance(name, str) and name] if isinstance(models, list | tuple) else []
    backend, prompts = (about[key] if isinstance(about.get(key), str) else "" for key in ("backend", "prompts"))
    told = ", ".join(names) or backend or "unknown"
    told += f", prompts {prompts}" if prompts else ""
    reluctance = about.get("reluctance")
    told += f", reluctance {reluctance:g}" if isinstance(reluctance, int | float) else ""
    return " ".join(printable(told).split())
