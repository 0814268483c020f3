"""Answers turns: from the store, by joining the same request in progress, or by calling the configured backend.

Only the service computes the user's new state. A repeated request costs nothing: the first one continues even when its client has
disconnected, and its answer is stored.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ctcgrpo.environments.eibench.records import MAX_DELTA
from ctcgrpo.errors import CtcGrpoError, OutputError, RecipeError
from ctcgrpo.llm_client.endpoints import CallRecord
from ctcgrpo.llm_client.store import Store, content_key
from ctcgrpo.simulator.config import BACKENDS, SimulatorConfig
from ctcgrpo.simulator.protocol import Reaction, SimulatorBackend, TurnReply, TurnRequest
from ctcgrpo.util.importing import blame, load_object

_REMEMBERED = 4096


def make_backend(
    config: SimulatorConfig, store: Store | None, on_call: Callable[[CallRecord], None], log_line: Callable[[str], None]
) -> SimulatorBackend:
    """The backend of a configuration; see SimulatorBackend.configured. Raises RecipeError for a class that cannot be loaded, is no
    SimulatorBackend, or cannot be instantiated."""
    where = f"backend = {config.backend!r}"
    found: Any = load_object(BACKENDS.get(config.backend, config.backend), "backend", config.folder)
    if not (isinstance(found, type) and issubclass(found, SimulatorBackend)):
        raise RecipeError(f"{where}; expected a subclass of ctcgrpo.simulator.protocol.SimulatorBackend")
    if not hasattr(found, "name"):
        raise RecipeError(f"{where}: {found.__name__} has no `name`; expected a text, which health answers and summaries report")
    try:
        return found.configured(config, store, on_call, log_line)
    except CtcGrpoError:
        raise
    except Exception as error:  # a user's own class may raise anything; abstract methods and wrong options included
        if config.backend in BACKENDS:
            raise
        raise RecipeError(f"{where}: its constructor failed with options {dict(config.options)}: {blame(error)}") from error


async def answer(backend: SimulatorBackend, request: TurnRequest) -> TurnReply:
    """One turn: the backend reacts, its deltas are clipped to [-10, 10], the state is clamped to [0, 100]."""
    return turn_reply(request, await backend.react(request))


def turn_reply(request: TurnRequest, reaction: Reaction) -> TurnReply:
    anger_delta, trust_delta = (max(-MAX_DELTA, min(MAX_DELTA, d)) for d in (reaction.anger_delta, reaction.trust_delta))
    return TurnReply(
        reply=reaction.reply,
        anger_delta=anger_delta,
        trust_delta=trust_delta,
        state=request.state.plus(anger_delta, trust_delta),
        goes_on=reaction.goes_on and request.round < request.max_rounds,
        why=reaction.why,
        reflection=reaction.reflection,
        usage=reaction.usage,
    )


class InProcess:
    """A user in this process, without a store."""

    def __init__(self, backend: SimulatorBackend) -> None:
        self._backend = backend

    async def turn(self, request: TurnRequest) -> TurnReply:
        """Raises SimulatorReplyError and SimulatorTransportError, which make the episode a failed one."""
        self._backend.check(request.scenario)
        return await answer(self._backend, request)

    async def about(self) -> dict[str, Any]:
        """What decides how the user reacts."""
        return self._backend.about()


class TurnService:
    """Answers turns with one backend. `store` keeps its answers. `on_source` gets the source of each answer: backend, store, or
    joined (an earlier request for the same turn). `on_error` gets the error of a failed write to the store."""

    def __init__(
        self,
        backend: SimulatorBackend,
        store: Store | None,
        on_source: Callable[[str], None],
        on_error: Callable[[str], None],
    ) -> None:
        self.backend, self._store = backend, store
        self._on_source, self._on_error = on_source, on_error
        self._identity = json.dumps(backend.about(), sort_keys=True)
        self._under_way: dict[bytes, asyncio.Task[TurnReply]] = {}
        self._recent: OrderedDict[bytes, TurnReply] = OrderedDict()

    async def turn(self, request: TurnRequest) -> TurnReply:
        """The reply to one request. Raises the backend's errors."""
        key = content_key(request.model_dump_json())
        if key in self._recent or key in self._under_way:
            self._on_source("joined")
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        if key not in self._under_way:
            task = self._under_way[key] = asyncio.create_task(self._answer(request))
            task.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(self._under_way[key])

    async def _answer(self, request: TurnRequest) -> TurnReply:
        if self._store is None:
            self._on_source("backend")
            return await answer(self.backend, request)
        key = content_key(self._identity, request.model_dump_json(exclude={"request_id"}))
        try:
            if (kept := self._store.get(key)) is not None:
                reaction = Reaction(**json.loads(kept))
                self._on_source("store")
                return turn_reply(request, reaction)
        except (OutputError, ValueError, TypeError) as error:
            self._on_error(f"a stored answer is damaged, and is requested again: {error}")
        self._on_source("backend")
        reaction = await self.backend.react(request)
        # Without its usage: an answer from the store costs nothing.
        kept_fields = {name: value for name, value in asdict(reaction).items() if name != "usage"}
        try:
            self._store.put(key, json.dumps(kept_fields).encode())
        except OutputError as error:  # the answer is paid for, and is returned in any case
            self._on_error(str(error))
        return turn_reply(request, reaction)

    def _finished(self, key: bytes, task: asyncio.Task[TurnReply]) -> None:
        del self._under_way[key]
        # Reading the exception also keeps asyncio from logging it where nobody waits any more.
        if not task.cancelled() and task.exception() is None:
            self._recent[key] = task.result()
            while len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
