"""One turn, from a request to its answer: from the store, together with the same request already under way, or from the backend.

The service alone computes the user's new state. A request that comes again costs nothing: the first one goes on even when whoever
asked has gone, and its answer is kept.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ctcgrpo.environments.eibench.records import MAX_DELTA, UserState
from ctcgrpo.errors import OutputError
from ctcgrpo.llm_client.store import Store, content_key
from ctcgrpo.simulator.protocol import Reaction, SimulatorBackend, State, TurnReply, TurnRequest, Usage

_REMEMBERED = 4096


async def answer(backend: SimulatorBackend, request: TurnRequest) -> TurnReply:
    """One turn: the backend reacts, its deltas are clipped to [-10, 10], the state is clamped to [0, 100]."""
    return turn_reply(request, await backend.react(request))


def turn_reply(request: TurnRequest, reaction: Reaction) -> TurnReply:
    anger_delta, trust_delta = (max(-MAX_DELTA, min(MAX_DELTA, d)) for d in (reaction.anger_delta, reaction.trust_delta))
    after = UserState(request.state.anger, request.state.trust).plus(anger_delta, trust_delta)
    return TurnReply(
        reply=reaction.reply,
        anger_delta=anger_delta,
        trust_delta=trust_delta,
        state=State(anger=after.anger, trust=after.trust),
        goes_on=reaction.goes_on and request.round < request.max_rounds,
        why=reaction.why,
        reflection=reaction.reflection,
        usage=reaction.usage,
    )


class TurnService:
    """Answers turns with one backend. `store` keeps answers of an LLM where `cache` says so; `on_source` hears where each answer
    came from: backend, store, or joined (an earlier request for the same turn); `on_error` of a store that could not keep one."""

    def __init__(
        self,
        backend: SimulatorBackend,
        *,
        store: Store | None = None,
        cache: bool = False,
        on_source: Callable[[str], None] = lambda source: None,
        on_error: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.backend = backend
        self._store = store if cache else None
        self._on_source, self._on_error = on_source, on_error
        self._identity = json.dumps(backend.about(), sort_keys=True)
        self._under_way: dict[bytes, asyncio.Task[TurnReply]] = {}
        self._recent: OrderedDict[bytes, TurnReply] = OrderedDict()

    async def turn(self, request: TurnRequest) -> TurnReply:
        """Raises what the backend raises."""
        key = content_key(request.model_dump_json())
        if key in self._recent:
            self._on_source("joined")
            self._recent.move_to_end(key)
            return self._recent[key]
        task = self._under_way.get(key)
        if task is not None:
            self._on_source("joined")
        else:
            task = asyncio.create_task(self._answer(request))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(task)

    async def _answer(self, request: TurnRequest) -> TurnReply:
        if self._store is None:
            self._on_source("backend")
            return await answer(self.backend, request)
        key = content_key(self._identity, request.model_dump_json(exclude={"request_id"}))
        if (kept := self._kept_reaction(key)) is not None:
            self._on_source("store")
            return turn_reply(request, kept)
        self._on_source("backend")
        reaction = await self.backend.react(request)
        try:
            self._store.put(key, json.dumps(_kept(reaction)).encode())
        except OutputError as error:  # what is paid for is answered all the same
            self._on_error(str(error))
        return turn_reply(request, reaction)

    def _kept_reaction(self, key: bytes) -> Reaction | None:
        """From the store; None for an answer that is not there, or is damaged."""
        assert self._store is not None
        try:
            kept = self._store.get(key)
            return None if kept is None else Reaction(**json.loads(kept))
        except (OutputError, ValueError, TypeError) as error:
            self._on_error(f"an answer in the store cannot be read, and is asked for again: {error}")
            return None

    def _finished(self, key: bytes, task: asyncio.Task[TurnReply]) -> None:
        del self._under_way[key]
        # Asking for the exception also keeps asyncio from complaining where nobody waits any more.
        if not task.cancelled() and task.exception() is None:
            self._recent[key] = task.result()
            while len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)


def _kept(reaction: Reaction) -> dict[str, Any]:
    """Without what it cost: whoever is answered from the store pays nothing."""
    fields = asdict(replace(reaction, usage=Usage()))
    del fields["usage"]
    return fields
