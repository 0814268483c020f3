"""A conversation of a person with one or more policies, as terminal and page share it: one record, and pure functions.

All policies get the same user messages. Each has its own history with its own replies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ctcgrpo.policy.context import ContextBuilder, Dialogue
from ctcgrpo.types import Completion, Message


@dataclass(frozen=True, slots=True)
class Reply:
    """A policy's reply. `text`: what it says aloud; `reasoning` is None without any. `seconds`: how long it took."""

    text: str
    reasoning: str | None
    faults: tuple[str, ...]
    completion: Completion
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """`role`: the policy's system message, or nothing. `policies`: their names. `lines`: the person's; the first one is empty where
    `policy_opens`. `replies`: of each line, a reply of each policy; the last line may have none yet."""

    policies: tuple[str, ...]
    role: tuple[Message, ...] = ()
    policy_opens: bool = False
    lines: tuple[str, ...] = ()
    replies: tuple[tuple[Reply, ...], ...] = ()


def say_line(conversation: Conversation, line: str) -> Conversation:
    """The conversation after a line of the person. Raises ValueError for an empty line."""
    if not line.strip() and not awaits_opening(conversation):
        raise ValueError("the line is empty")
    assert len(conversation.lines) == len(conversation.replies), "the last line has no reply yet"
    return replace(conversation, lines=(*conversation.lines, line.strip()))


def awaits_opening(conversation: Conversation) -> bool:
    """Whether the policies say something next, without a line of the person: an empty one lets them."""
    return conversation.policy_opens and not conversation.lines


def add_replies(conversation: Conversation, replies: Sequence[Reply]) -> Conversation:
    """The conversation after the replies of all policies to the last line."""
    assert len(replies) == len(conversation.policies) and len(conversation.lines) == len(conversation.replies) + 1
    return replace(conversation, replies=(*conversation.replies, tuple(replies)))


def dialogue_of(conversation: Conversation, policy: int, contexts: ContextBuilder) -> Dialogue:
    """The conversation as that policy knows it, from the tokens that it sampled. Raises PolicyEngineError for roles that its chat
    template cannot render."""
    first, *others = conversation.lines
    opening: list[Message] = [{"role": "user", "content": first}] if first else []
    dialogue = contexts.start([*conversation.role, *opening])
    for replies, line in zip(conversation.replies, others, strict=True):
        dialogue = contexts.extend(dialogue, replies[policy].completion, line)
    return dialogue


def shown(conversation: Conversation) -> dict[str, Any]:
    """What a page shows, as JSON."""
    turns = [
        {"line": line, "replies": [_shown(reply) for reply in replies]}
        for line, replies in zip(conversation.lines, conversation.replies, strict=True)
    ]
    return {"policies": list(conversation.policies), "turns": turns}


def _shown(reply: Reply) -> dict[str, Any]:
    return {"text": reply.text, "reasoning": reply.reasoning, "note": note_of(reply)}


def note_of(reply: Reply) -> str:
    """Length, time and faults of a reply, in words."""
    tokens = len(reply.completion.token_ids)
    return ", ".join([f"{tokens} token{'' if tokens == 1 else 's'}", f"{reply.seconds:.1f} s", *reply.faults])
