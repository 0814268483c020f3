"""Model answers with a cache: each is stored, and a repeated request is answered from the store."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.llm_client.account import Account
from ctcgrpo.llm_client.endpoints import Deadline, EndpointPool
from ctcgrpo.llm_client.store import Store
from ctcgrpo.types import Message


class Answers(contextlib.AbstractAsyncContextManager["Answers"]):
    """The answers of a configuration's writer; `pool` counts their cost. `log_line` logs when no endpoint is available."""

    def __init__(self, config: FactoryConfig, store: Store, log_line: Callable[[str], None]) -> None:
        self._store, self.pool = store, EndpointPool(config.writer, Account(config.budget, store), log_line=log_line)
        self._seconds = config.writer.deadline
        self._room = asyncio.Semaphore(sum(endpoint.concurrency for endpoint in config.writer.endpoints))

    async def ask(self, key: bytes, messages: Sequence[Message], *, dialogue: str, schema: dict[str, Any]) -> str:
        """The text of an answer; `key` identifies the request and determines its seed. Raises SimulatorTransportError where no
        endpoint answers, BudgetSpent when the budget is spent, SimulatorReplyError for a refusal or an answer without text."""
        async with self._room:
            if (kept := self._store.get(key)) is not None:
                return kept.decode()
            seed = int.from_bytes(key[:4], "big") >> 1
            deadline = Deadline(self._seconds)
            answer = await self.pool.complete(messages, dialogue=dialogue, seed=seed, schema=schema, deadline=deadline)
        if answer.ended in ("content_filter", "refusal"):
            why = answer.note or "without a reason"
            raise SimulatorReplyError(f"{answer.endpoint} refused the request ({answer.ended}): {why}")
        if answer.note:
            raise SimulatorReplyError(f"{answer.endpoint}: no valid answer: {answer.note}")
        self._store.put(key, answer.text.encode("utf-8", "replace"))
        return answer.text

    async def __aexit__(self, *error: object) -> None:
        await self.pool.close()
