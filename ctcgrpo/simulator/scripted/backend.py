"""The scripted user: the state change, the next message and the end of the dialogue. Deterministic, without an LLM."""

import asyncio
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Self

from ctcgrpo.simulator.config import SimulatorConfig
from ctcgrpo.simulator.protocol import Reaction, ScenarioCard, SimulatorBackend, State, TurnRequest, Utterance
from ctcgrpo.simulator.scripted.knowledge import Knowledge
from ctcgrpo.simulator.scripted.language import load_language
from ctcgrpo.simulator.scripted.reading import Reading
from ctcgrpo.simulator.scripted.rules import Finding, ReplyContext, findings

_MAX_GAIN = 9  # points of one axis in a turn
_BAD_STATE_FACTOR = 1.5  # multiplies losses while the state is bad
_MAX_HISTORY = 100  # the last messages, with which a reply is compared
_MAX_LENGTH = 20_000  # in characters; longer messages are truncated


class ScriptedBackend(SimulatorBackend):
    """Plays any scenario in a language of `languages/`. Equal requests get equal reactions."""

    name = "scripted"

    def __init__(self, reluctance: float = 0.0) -> None:
        self._reluctance = reluctance

    @classmethod
    def configured(cls, config: SimulatorConfig, *_: Any, **__: Any) -> Self:
        return cls(config.scripted.reluctance)

    def check(self, card: ScenarioCard) -> None:
        """Raises SimulatorReplyError for an unsupported language, or an invalid `script`."""
        Knowledge(card, load_language(card.language))

    def about(self) -> dict[str, Any]:
        return {"backend": self.name, **({"reluctance": self._reluctance} if self._reluctance else {})}

    async def react(self, request: TurnRequest) -> Reaction:
        return await asyncio.to_thread(react, request, self._reluctance)


def react(request: TurnRequest, reluctance: float = 0.0) -> Reaction:
    """The reaction to the last reply in the history. Raises SimulatorReplyError for a language without rules."""
    card_json = request.scenario.model_dump_json()
    knowledge, readings = _knowledge(card_json), _readings(card_json, request.history)
    last = len(readings) - 1

    def findings_of(reply: int) -> list[Finding]:
        return findings(ReplyContext(readings[reply], tuple(readings[:reply]), knowledge, request.round - last + reply))

    found = findings_of(last)
    if reluctance:
        found = _deferred(found, findings_of(last - 1) if last else [], reluctance)
    anger_delta, trust_delta = _temper(found, request.state)
    mood = _mood(found, request.state.plus(anger_delta, trust_delta), request)
    return Reaction(
        reply=_line(mood, knowledge, request.round),
        anger_delta=anger_delta,
        trust_delta=trust_delta,
        goes_on=mood not in ("thanks", "leaves"),
        why="; ".join(f"{f.why} ({f.anger:+.0f}/{f.trust:+.0f})" for f in found) or "neither here nor there",
    )


@lru_cache(maxsize=4096)
def _knowledge(card_json: str) -> Knowledge:
    card = ScenarioCard.model_validate_json(card_json)
    return Knowledge(card, load_language(card.language))


def _readings(card_json: str, history: Sequence[Utterance]) -> list[Reading]:
    """The features of each of the policy's replies so far, given the messages before it."""
    messages = tuple((utterance.speaker, _truncated(utterance.text)) for utterance in history)
    ends = [k + 1 for k, (speaker, _) in enumerate(messages) if speaker == "policy"]
    return [_reading(card_json, messages[max(0, end - _MAX_HISTORY) : end], reply) for reply, end in enumerate(ends, 1)]


def _truncated(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else text[:_MAX_LENGTH] + "…"


@lru_cache(maxsize=16384)
def _reading(card_json: str, messages: tuple[tuple[str, str], ...], reply: int) -> Reading:
    """The features of the last message, which is the policy's reply number `reply` (from 1). Cached, since every request of a
    dialogue needs those of all earlier replies."""
    knowledge = _knowledge(card_json)
    user_messages = [text for speaker, text in messages[:-1] if speaker == "user"]
    earlier = [text for speaker, text in messages[:-1] if speaker == "policy"]
    return Reading(
        messages[-1][1],
        knowledge=knowledge,
        context=[_truncated(knowledge.card.policy_persona), *user_messages],
        last_message=user_messages[-1] if user_messages else "",
        earlier_replies=list(dict.fromkeys(earlier)),
        raised=knowledge.detail_raised(reply),
    )


def _deferred(now: Sequence[Finding], before: Sequence[Finding], reluctance: float) -> list[Finding]:
    """Findings of a user with reluctance (config.Scripted): gains are delayed by a turn, losses are not. The last reply's gain is
    lost."""
    resisted = [
        Finding(-reluctance * f.anger, -reluctance * f.trust, f"{f.why}, which is hard to hear") if f.is_credit else f
        for f in now
    ]
    factor = 1 + reluctance
    delayed = [Finding(factor * f.anger, factor * f.trust, f"it has sunk in: {f.why}") for f in before if f.is_credit]
    return sorted(resisted + delayed, key=lambda f: f.trust - f.anger)


def _temper(found: Sequence[Finding], before: State) -> tuple[int, int]:
    """The sum of findings as (anger change, trust change). Gains are capped; losses weigh more in a bad state."""
    temper = _BAD_STATE_FACTOR if before.anger > 60 or before.trust < 20 else 1.0
    anger = max(-_MAX_GAIN, sum(min(0.0, f.anger) for f in found)) + temper * sum(max(0.0, f.anger) for f in found)
    trust = min(_MAX_GAIN, sum(max(0.0, f.trust) for f in found)) + temper * sum(min(0.0, f.trust) for f in found)
    return max(-10, min(10, round(anger))), max(-10, min(10, round(trust)))


def _mood(found: Sequence[Finding], after: State, request: TurnRequest) -> str:
    """The mood of the next message; "thanks" and "leaves" end the dialogue."""
    initial, target, worst = request.scenario.anchors
    if after.anger <= target.anger and after.trust >= target.trust:
        return "thanks"
    patience_gone = request.round > request.max_rounds / 2 and after.trust < initial.trust - 15
    if after.anger >= worst.anger or after.trust <= worst.trust or patience_gone:
        return "leaves"
    if any(f.why == "I cannot make sense of it" for f in found):
        return "puzzled"
    balance = sum(f.trust - f.anger for f in found)
    return "warmer" if balance >= 5 else "colder" if balance <= -4 else "flat"


def _line(mood: str, knowledge: Knowledge, round: int) -> str:
    def one_of(lines: Sequence[str], name: str) -> str:
        digest = hashlib.sha256(f"{knowledge.card.id}/{name}/{round}".encode()).digest()
        return lines[int.from_bytes(digest[:4], "big") % len(lines)]

    language = knowledge.language
    reaction = one_of(knowledge.lines.get(mood) or language.lines[mood], mood)
    if mood in ("thanks", "leaves"):
        return reaction
    following = knowledge.detail_raised(round + 1)
    return f"{reaction} {(following and following.line) or one_of(language.lines['raise'], 'raise')}"
