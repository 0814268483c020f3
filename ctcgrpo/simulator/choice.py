"""Who plays the user: running servers, or a server that this process starts from a configuration. Only this module chooses;
`who_played` names the choice.

By a name (`named_simulator`: scripted, a configuration's file, a URL), by a recipe's section `simulator` (`simulator_of`), or by
the options --config and --url (`chosen_simulator`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ctcgrpo.errors import RecipeError
from ctcgrpo.simulator.config import SCRIPTED_USER, TOKEN_ENV, Llm, SimulatorConfig, bearer_token, load_simulator_config
from ctcgrpo.util.terminal import printable

if TYPE_CHECKING:  # these take a while to import, and names are read before anything is asked
    from rich.console import Console

    from ctcgrpo.environments.eibench.records import Scenario
    from ctcgrpo.run.recipe_users import PlayedBy, Simulator
    from ctcgrpo.simulator.client import SimulatorClient
    from ctcgrpo.simulator.logs import Log

SCRIPTED = "scripted"
_URL = ("http://", "https://")
_TIMEOUT = 240.0
_PATIENCE = 20.0  # Seconds: a person waits


@dataclass(frozen=True, slots=True)
class SimulatorChoice:
    """`urls` of running servers; without any, this process starts a server for `config`, which comes from the file `name`."""

    urls: tuple[str, ...] = ()
    config: SimulatorConfig = SCRIPTED_USER
    name: str = field(default=SCRIPTED, compare=False)

    @property
    def llm(self) -> Llm | None:
        """The LLM settings, where this process makes the calls; None for a running server, which has its own."""
        return None if self.urls else self.config.llm

    @property
    def timeout(self) -> float:
        """The limit of one request for a turn, in seconds."""
        return _TIMEOUT if self.llm is None else self.llm.deadline + 30

    @contextmanager
    def served(self, scenarios: Iterable[Scenario] = (), *, log: Log | None = None, port: int = 0) -> Iterator[tuple[str, ...]]:
        """The server URLs, valid within the context. Raises RecipeError for a backend that cannot be made, ScenarioError where a
        server started here cannot play one of `scenarios`."""
        if self.urls:
            yield self.urls
            return
        from ctcgrpo.simulator.server import SimulatorServer, running

        server = SimulatorServer(self.config, log=log)
        server.check(scenarios)
        with running(server, port) as url:
            yield (url,)

    def client(
        self, urls: Sequence[str], token_env: str = TOKEN_ENV, variables: Mapping[str, str] = os.environ, **options: Any
    ) -> SimulatorClient:
        """A client for the URLs that `served` gives; enter it with `async with`. `options` are SimulatorClient's."""
        from ctcgrpo.simulator.client import SimulatorClient

        name = None if self.urls else f"simulator {self.name}"
        options = {"timeout": self.timeout, **options}
        return SimulatorClient(urls, token=bearer_token(token_env, variables), name=name, **options)


def names_a_simulator(name: str) -> bool:
    """Whether a name is one that `named_simulator` reads, rather than a model's name."""
    return name == SCRIPTED or name.startswith(_URL) or name.endswith((".yaml", ".yml"))


def named_simulator(name: str) -> SimulatorChoice:
    """`name`: scripted, the URL of a server, or a configuration's file. Raises RecipeError for a file that cannot be read."""
    if name == SCRIPTED:
        return SimulatorChoice()
    return SimulatorChoice((name,)) if name.startswith(_URL) else _configured(name)


def _configured(file: str | Path) -> SimulatorChoice:
    return SimulatorChoice(config=load_simulator_config(file), name=str(file))


def simulator_of(section: PlayedBy) -> SimulatorChoice:
    """A user that a recipe names. Raises RecipeError for a configuration that cannot be read."""
    if section.urls:
        return SimulatorChoice(urls=section.urls)
    return SimulatorChoice() if section.config is None else _configured(section.config)


def name_of(section: Simulator) -> str | None:
    """The name of a recipe's simulator, as `named_simulator` reads it: the first of several servers. None for several users."""
    if section.users:
        return None
    return section.urls[0] if section.urls else SCRIPTED if section.config is None else str(section.config)


@contextmanager
def chosen_simulator(config: Path | None, urls: Sequence[str], console: Console) -> Iterator[SimulatorClient]:
    """A client, valid within the context; of the scripted user where neither option is given. Enter it with `async with`. The
    token is read from CTCGRPO_SIMULATOR_TOKEN. On a terminal `console` shows that a server starts. Raises RecipeError where both
    are given."""
    if urls and config is not None:
        raise RecipeError("--config and --url: both given; expected one, since a running server has its own configuration")
    choice = SimulatorChoice(tuple(urls)) if config is None else _configured(config)
    with ExitStack() as stack:
        with console.status(Text(f"starting the simulator {choice.name}")):
            found = stack.enter_context(choice.served())
        yield choice.client(found, patience=_PATIENCE)


def check_timeout(health: Mapping[str, Any], timeout: float) -> None:
    """Raises RecipeError for a timeout within the simulator's own deadline for a turn, which its health answer gives."""
    if (most := health.get("deadline") or 0) >= timeout:
        expected = f"more than {most:g} s, which the simulator may take for a turn (llm.deadline)"
        raise RecipeError(f"simulator.timeout = {timeout:g}; expected {expected}; try {2 * most:g}")


async def read_health(simulator: SimulatorClient) -> dict[str, Any]:
    """The simulator's health answer. Raises SimulatorTransportError at once where no server answers."""
    async with simulator:
        return await simulator.health()


def who_played(about: Mapping[str, Any] | None) -> str:
    """Who played the user or the judge, in words: the models, or else the backend, and the prompts; "unknown" without either.
    `about` is a health answer, an evaluation's record of it, or a run's record of several `users`. A third party's server may send
    anything: values that are not text are left out."""
    about = about or {}
    if isinstance(users := about.get("users"), Mapping):
        return "; ".join(f"{printable(str(name))}: {who_played(of)}" for name, of in users.items() if isinstance(of, Mapping))
    models = about.get("models")
    names = [name for name in models if isinstance(name, str) and name] if isinstance(models, list | tuple) else []
    backend, prompts = (about[key] if isinstance(about.get(key), str) else "" for key in ("backend", "prompts"))
    text = ", ".join(names) or backend or "unknown"
    text += f", prompts {prompts}" if prompts else ""
    reluctance = about.get("reluctance")
    text += f", reluctance {reluctance:g}" if isinstance(reluctance, int | float) else ""
    return " ".join(printable(text).split())
