"""Answers that are paid for once: kept in the store, and taken from there when the same is asked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.llm_client.endpoints import Deadline
from ctcgrpo.llm_client.store import Store
from ctcgrpo.simulator.llm.backend import ChatModel
from ctcgrpo.types import Message


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
    """The text of an answer, within so many seconds; `key` says what is asked, and decides the seed. Raises what `llm` raises, and
    SimulatorReplyError for an answer without a text."""
    if (kept := store.get(key)) is not None:
        return kept.decode()
    seed = int.from_bytes(key[:4], "big") >> 1
    answer = await llm.complete(messages, dialogue=dialogue, seed=seed, schema=schema, deadline=Deadline(seconds))
    if answer.ended in ("content_filter", "refusal"):
        raise SimulatorReplyError(
            f"{answer.endpoint} refused the request ({answer.ended}): {answer.note or 'without a reason'}"
        )
    if answer.note:
        raise SimulatorReplyError(f"{answer.endpoint} gave no usable answer: {answer.note}")
    store.put(key, answer.text.encode("utf-8", "replace"))
    return answer.text
