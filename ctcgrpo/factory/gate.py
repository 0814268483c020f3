"""The quality gate: the scripted user plays a scenario with a good, a mediocre and a bad canned policy. Where it cannot tell them
apart, no policy can be trained on it, with that user.

The good policy is an oracle: it knows the scenario's `script`, and says of its canned sentences the one that does most good. So the
gate says that there is something to find in a scenario, not how hard it is to find.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import ScenarioCard, TurnReply, TurnRequest
from ctcgrpo.simulator.scripted.backend import react
from ctcgrpo.simulator.scripted.knowledge import Knowledge
from ctcgrpo.simulator.scripted.language import load_language
from ctcgrpo.simulator.service import turn_reply
from ctcgrpo.util.strict_yaml import load_yaml

ROUNDS = 6
MARGIN = 0.3
"""Outcome (in [-1, 1]) by which the good policy has to be ahead of both others."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcomes in [-1, 1]; `problem` is empty where the gate is passed."""

    id: str
    good: float
    mediocre: float
    bad: float
    problem: str


def gate(scenario: Scenario) -> Verdict:
    """Play a scenario. One that cannot be played, or has no script, has a problem that says so, and outcomes of NaN."""
    nothing = float("nan")
    if scenario.language not in canned():
        return Verdict(scenario.id, nothing, nothing, nothing, f"there are no canned policies in {scenario.language!r}")
    details = scenario.script.get("details") or ()
    if not details:
        return Verdict(scenario.id, nothing, nothing, nothing, "its record has no script that a good policy could know")
    lines = canned()[scenario.language]
    try:
        Knowledge(ScenarioCard.of(scenario), load_language(scenario.language))
        good = asyncio.run(played(scenario, _fillings(scenario, details, lines["good"])))
        mediocre, bad = (asyncio.run(played(scenario, _in_turn(lines[name]))) for name in ("mediocre", "bad"))
    except SimulatorReplyError as error:
        return Verdict(scenario.id, nothing, nothing, nothing, str(error))
    told = [name for name, other in (("mediocre", mediocre), ("bad", bad)) if good < other + MARGIN]
    problem = f"the good policy is not {MARGIN:g} ahead of the {' and the '.join(told)} one" if told else ""
    return Verdict(scenario.id, good, mediocre, bad, problem)


@cache
def canned() -> Mapping[str, Mapping[str, list[str]]]:
    """By language: what the three policies say."""
    data: dict[str, dict[str, list[str]]] = load_yaml((files("ctcgrpo.factory") / "canned.yaml").read_text(encoding="utf-8"))
    return data


Candidates = Sequence[Sequence[str]]
"""For each turn the replies that a policy has for it; the one that does most good is said."""


class _Scripted:
    async def turn(self, request: TurnRequest) -> TurnReply:
        return turn_reply(request, react(request))


async def played(scenario: Scenario, turns: Candidates) -> float:
    """The outcome of a dialogue."""
    dialogue = EIBench(_Scripted(), briefing=Briefing(), max_turns=len(turns))
    await dialogue.reset(task_of(scenario).data, seed=0)
    said: set[str] = set()
    for replies in turns:
        tried = {}
        for reply in [r for r in replies if r not in said] or replies:
            tried[reply] = copy.copy(dialogue)
            await tried[reply].step(reply)
        best = max(tried, key=lambda reply: tried[reply].answer.trust_delta - tried[reply].answer.anger_delta)
        said.add(best)
        dialogue = tried[best]
        if not dialogue.answer.goes_on:
            break
    return dialogue.outcome()


def _in_turn(lines: Sequence[str]) -> Candidates:
    return [[lines[k % len(lines)]] for k in range(ROUNDS)]


def _fillings(scenario: Scenario, details: Sequence[Mapping[str, Any]], frames: Sequence[str]) -> Candidates:
    """For each turn every frame, filled with words of the detail that the user has raised by then (in the first turn of the one to
    come), and with what the scene wants to hear by name: a boundary and an offer, a fault and a remedy."""
    rng = random.Random(f"gate/{scenario.id}")
    asked = {**scenario.script.get("boundary", {}), **scenario.script.get("repair", {})}
    musts = [list(words) for words in asked.values() if words]
    told = []
    for k in range(ROUNDS):
        detail = details[max(0, k - 1) % len(details)]
        words = list(detail["words"])
        sense = list(detail["sense"]) or words
        raised = [word for word in words if word.lower() in str(detail["line"]).lower()] or words
        candidates = []
        for frame in frames:
            b, c = rng.choice(sense), rng.choice(sense)
            candidates.append(frame.format(a=rng.choice(raised), b=b, c=c))
            if musts:
                candidates.append(frame.format(a=rng.choice(raised), b=b, c=rng.choice(musts[k % len(musts)])))
        told.append(candidates)
    return told
