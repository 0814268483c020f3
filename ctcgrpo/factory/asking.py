"""Answers that are paid for once: kept in the store, and taken from there when the same is asked again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ctcgrpo.simulator.llm.backend import ChatModel
from ctcgrpo.simulator.llm.prompts import Message
from ctcgrpo.simulator.store import Store


async def answer_once(
    llm: ChatModel,
    store: Store,
    key: bytes,
    messages: Sequence[Message],
    *,
    dialogue: str,
    schema: dict[str, Any],
    seconds: float,
) -> str:
    """The text of an answer, within so many seconds; `key` says what is asked, and decides the seed. Raises what `llm` raises."""
    if (kept := store.get(key)) is not None:
        return kept.decode()
    seed = int.from_bytes(key[:4], "big") >> 1
    deadline = time.monotonic() + seconds
    answer = await llm.complete(messages, dialogue=dialogue, seed=seed, schema=schema, deadline=deadline)
    store.put(key, answer.text.encode("utf-8", "replace"))
    return answer.text
