"""Telling a completion's reasoning from its visible reply."""

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class ParsedReply(NamedTuple):
    """`reasoning` is None where the completion has no reasoning part; `faults` as in `records.Turn`."""

    reply: str
    reasoning: str | None
    faults: tuple[str, ...]


def parse_completion(text: str, finish_reason: Literal["stop", "length"], opened: bool = False) -> ParsedReply:
    """Split a decoded completion (without end-of-turn token) into reasoning and reply, and name its faults.

    `opened` says that the generation prompt already opened the reasoning. Reasoning never closed leaves an empty reply;
    a tag anywhere else is "broken_tags". All of these are the policy's doing: outcomes, never failures."""
    body = (OPEN + text if opened else text).strip()
    begins = body.startswith(OPEN)
    before, closed, after = body.removeprefix(OPEN).partition(CLOSE)
    reasoning, reply = (before, after) if begins or closed else (None, body)
    broken = begins != bool(closed) or any(tag in part for tag in (OPEN, CLOSE) for part in (reasoning or "", reply))
    reply = reply.replace(OPEN, " ").replace(CLOSE, " ").strip()
    faults = {
        "broken_tags": broken,
        "unclosed_reasoning": begins and not closed,
        "empty_reasoning": reasoning is not None and not reasoning.strip(),
        "empty_reply": not reply,
        "cut": finish_reason == "length",
    }
    return ParsedReply(reply, None if reasoning is None else reasoning.strip(), tuple(k for k, v in faults.items() if v))
