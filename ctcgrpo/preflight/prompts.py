"""Prompts: whether the first and the last of an episode fit, under the policy's tokenizer and chat template."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from ctcgrpo.environments.eibench import opening_messages
from ctcgrpo.preflight.subject import LINE_TOKENS, REPLY_TOKENS, Finding, Subject, sample
from ctcgrpo.run.settings import briefing
from ctcgrpo.types import Completion, Heard, Message

_MEASURED = 48
"""Scenarios of each scene whose prompts are measured, at most."""


def context(s: Subject) -> Iterator[Finding]:
    """Whether contexts stay a prefix under the template was found out when they were made; whether they fit is found out here."""
    if s.contexts is None:
        return
    openings: Mapping[str, Sequence[Message]]
    if s.recipe.environment is None:
        told, noun, lines = briefing(s.recipe), "scenario", f"lines of {LINE_TOKENS}"
        openings = {scenario.id: opening_messages(scenario, told) for scenario in [*s.scenarios, *s.held_out]}
        measured = [x.id for x in sample(s.scenarios, _MEASURED)]
    else:
        noun, lines, openings = "task", "lines as in the episode that was played", s.openings
        measured = list(openings)
    if not measured:
        return
    s.contexts.check(openings, noun)
    for note in s.contexts.notes(openings.values()):
        yield Finding("context", "warning", note)
    last = [_last_prompt(s, openings[name]) for name in measured]
    dropped = sum(n > 0 for _, n in last) / len(last)
    reply = min(REPLY_TOKENS, s.recipe.rollout.max_new_tokens)
    text = (
        f"the last of {s.recipe.rollout.max_turns} turns has a prompt of {max(n for n, _ in last)} tokens at most, "
        f"{statistics.mean(n for n, _ in last):.0f} on the average (replies of {reply} tokens, {lines})"
    )
    if dropped:
        share = f"{dropped:.0%} of the {noun}s would drop exchanges by then; raise rollout.max_prompt_tokens"
        yield Finding("context", "warning", f"{text}; {share}")
    else:
        yield Finding("context", "ok", text)


def _last_prompt(s: Subject, opening: Sequence[Message]) -> tuple[int, int]:
    assert s.contexts is not None
    dialogue = s.contexts.start(opening)
    reply = Completion((0,) * min(REPLY_TOKENS, s.recipe.rollout.max_new_tokens), (), (), "stop")
    for turn in range(s.recipe.rollout.max_turns - 1):
        if s.recipe.environment is None:
            heard: Heard = "word " * LINE_TOKENS
        elif not s.heard:  # the episode that was played has one turn
            break
        else:
            heard = s.heard[min(turn, len(s.heard) - 1)]
        dialogue = s.contexts.extend(dialogue, reply, heard)
    ids, dropped = s.contexts.prompt(dialogue)
    return len(ids), dropped
