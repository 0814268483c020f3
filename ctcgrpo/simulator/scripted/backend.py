"""The scripted user: reads a reply, changes state, answers, and decides whether to continue. No LLM, no randomness."""

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
from ctcgrpo.simulator.scripted.rules import Finding, Heard, findings

_MOST_CREDIT = 9
_SHORT_TEMPER = 1.5
_MEMORY = 100  # recent lines of the dialogue that a reply is compared with
_LONGEST_LINE = 20_000  # characters; the rest of a longer line is ignored


class ScriptedBackend(SimulatorBackend):
    """Plays any scenario in a language that `languages/` has; the same request always gets the same reaction."""

    name = "scripted"

    def __init__(self, reluctance: float = 0.0) -> None:
        self._reluctance = reluctance

    @classmethod
    def configured(cls, config: SimulatorConfig, *_: Any, **__: Any) -> Self:
        return cls(config.scripted.reluctance)

    def check(self, card: ScenarioCard) -> None:
        """Raises SimulatorReplyError for a scenario that it cannot play: its language, or the form of its `script`."""
        Knowledge(card, load_language(card.language))

    def about(self) -> dict[str, Any]:
        return {"backend": self.name, **({"reluctance": self._reluctance} if self._reluctance else {})}

    async def react(self, request: TurnRequest) -> Reaction:
        return await asyncio.to_thread(react, request, self._reluctance)


def react(request: TurnRequest, reluctance: float = 0.0) -> Reaction:
    """The reaction to the last reply in the history. Raises SimulatorReplyError for a language without rules."""
    card_json = request.scenario.model_dump_json()
    knowledge, readings = _known(card_json), _readings(card_json, request.history)
    last = len(readings) - 1

    def made_of(reply: int) -> list[Finding]:
        return findings(Heard(readings[reply], tuple(readings[:reply]), knowledge, request.round - last + reply))

    found = made_of(last)
    if reluctance:
        found = _deferred(found, made_of(last - 1) if last else [], reluctance)
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
def _known(card_json: str) -> Knowledge:
    card = ScenarioCard.model_validate_json(card_json)
    return Knowledge(card, load_language(card.language))


def _readings(card_json: str, history: Sequence[Utterance]) -> list[Reading]:
    """A reading of each of the policy's replies so far, given the dialogue before it."""
    said = tuple((utterance.speaker, _heard(utterance.text)) for utterance in history)
    ends = [k + 1 for k, (speaker, _) in enumerate(said) if speaker == "policy"]
    return [_reading(card_json, said[max(0, end - _MEMORY) : end], reply) for reply, end in enumerate(ends, 1)]


def _heard(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else text[:_LONGEST_LINE] + "…"


@lru_cache(maxsize=16384)
def _reading(card_json: str, said: tuple[tuple[str, str], ...], reply: int) -> Reading:
    """The reading of the last line in `said`, the policy's `reply`-th from 1. Cached, since the next request of a dialogue needs
    all earlier ones."""
    knowledge = _known(card_json)
    heard = [text for speaker, text in said[:-1] if speaker == "user"]
    earlier = [text for speaker, text in said[:-1] if speaker == "policy"]
    return Reading(
        said[-1][1],
        knowledge=knowledge,
        heard=[_heard(knowledge.card.policy_persona), *heard],
        latest=heard[-1] if heard else "",
        earlier=list(dict.fromkeys(earlier)),
        raised=knowledge.raised(reply),
    )


def _deferred(now: Sequence[Finding], before: Sequence[Finding], reluctance: float) -> list[Finding]:
    """Findings of a user with reluctance (config.Scripted): gains come a turn late, losses at once. The gain of the last reply is
    never paid."""
    resisted = [
        Finding(-reluctance * f.anger, -reluctance * f.trust, f"{f.why}, which is hard to hear") if f.is_credit else f
        for f in now
    ]
    paid = 1 + reluctance
    sunk_in = [Finding(paid * f.anger, paid * f.trust, f"it has sunk in: {f.why}") for f in before if f.is_credit]
    return sorted(resisted + sunk_in, key=lambda f: f.trust - f.anger)


def _temper(found: Sequence[Finding], before: State) -> tuple[int, int]:
    """Findings as a change of state: gains are capped, and losses weigh more in a bad state."""
    temper = _SHORT_TEMPER if before.anger > 60 or before.trust < 20 else 1.0
    anger = max(-_MOST_CREDIT, sum(min(0.0, f.anger) for f in found)) + temper * sum(max(0.0, f.anger) for f in found)
    trust = min(_MOST_CREDIT, sum(max(0.0, f.trust) for f in found)) + temper * sum(min(0.0, f.trust) for f in found)
    return max(-10, min(10, round(anger))), max(-10, min(10, round(trust)))


def _mood(found: Sequence[Finding], after: State, request: TurnRequest) -> str:
    """The mood of the next line; "thanks" and "leaves" end the dialogue."""
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
    following = knowledge.raised(round + 1)
    return f"{reaction} {(following and following.line) or one_of(language.lines['raise'], 'raise')}"
