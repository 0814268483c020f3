"""The quality gate: a scenario is played with a good, a mediocre and a bad canned policy against the scripted user. If their
outcomes hardly differ, the scenario with this user gives no training signal.

The good policy is an oracle: it reads the scenario's `script`, and of its canned sentences chooses the one with the best effect. So
the gate shows that good replies exist, not how hard they are to find."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import cycle, islice
from typing import Any, NamedTuple

from ctcgrpo.environments.eibench import EIBench, task_of
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import ScenarioCard
from ctcgrpo.simulator.scripted import ScriptedBackend
from ctcgrpo.util.strict_yaml import load_yaml

Candidates = Sequence[Sequence[str]]  # by turn: a policy's possible replies; the one with the best effect is used
ROUNDS = 6
MARGIN = 0.3  # outcome (in [-1, 1]) by which the good policy must exceed both others


class Verdict(NamedTuple):
    """Outcomes in [-1, 1]; `problem` is empty where the gate is passed."""

    id: str
    good: float
    mediocre: float
    bad: float
    problem: str


def gate(scenario: Scenario) -> Verdict:
    """Play a scenario. Where it cannot be played, or has no script, the outcomes are NaN and `problem` gives the reason."""
    nan = float("nan")
    nothing = (nan, nan, nan)
    details, lines = scenario.script.get("details"), canned().get(scenario.language)
    if lines is None:
        return Verdict(scenario.id, *nothing, f"there are no canned policies in {scenario.language!r}")
    if not details:
        return Verdict(scenario.id, *nothing, "its record has no script, which the good policy needs (an LLM user does not)")
    try:
        ScriptedBackend().check(ScenarioCard.of(scenario))
        good = asyncio.run(played(scenario, _fillings(scenario, details, lines["good"])))
        others = [[[line] for line in islice(cycle(lines[name]), ROUNDS)] for name in ("mediocre", "bad")]
        mediocre, bad = (asyncio.run(played(scenario, turns)) for turns in others)
    except SimulatorReplyError as error:
        return Verdict(scenario.id, *nothing, str(error))
    close = [name for name, other in (("mediocre", mediocre), ("bad", bad)) if good < other + MARGIN]
    problem = f"the good policy is not {MARGIN:g} ahead of the {' and the '.join(close)} one" if close else ""
    return Verdict(scenario.id, good, mediocre, bad, problem)


@cache
def canned() -> Mapping[str, Mapping[str, list[str]]]:
    """The sentences of the three policies, by language."""
    return dict(load_yaml((files("ctcgrpo.factory") / "canned.yaml").read_text(encoding="utf-8")))


async def played(scenario: Scenario, turns: Candidates) -> float:
    """The outcome of a dialogue."""
    dialogue = EIBench(max_turns=len(turns))
    await dialogue.reset(task_of(scenario).data, seed=0)
    used: set[str] = set()
    for replies in turns:
        tried = {reply: dialogue.branch(seed=0) for reply in [r for r in replies if r not in used] or replies}
        for reply, continued in tried.items():
            await continued.step(reply)
        best = max(tried, key=lambda reply: tried[reply].answer.trust_delta - tried[reply].answer.anger_delta)
        used.add(best)
        dialogue = tried[best]
        if not dialogue.answer.goes_on:
            break
    return dialogue.outcome()


def _fillings(scenario: Scenario, details: Sequence[Mapping[str, Any]], frames: Sequence[str]) -> Candidates:
    """For each turn every frame, filled with words of the detail that the user has raised by then (in the first turn: of the next
    one), and with what the scene requires: a boundary and an offer, a fault and a remedy."""
    rng = random.Random(f"gate/{scenario.id}")
    asked = {**scenario.script.get("boundary", {}), **scenario.script.get("repair", {})}
    musts = [list(words) for words in asked.values() if words]
    turns: list[list[str]] = []
    for k in range(ROUNDS):
        detail = details[max(0, k - 1) % len(details)]
        words = list(detail["words"])
        sense = list(detail["sense"]) or words
        raised = [word for word in words if word.lower() in str(detail["line"]).lower()] or words
        turns.append([])
        for frame in frames:
            b, c = rng.choice(sense), rng.choice(sense)
            turns[-1].append(frame.format(a=rng.choice(raised), b=b, c=c))
            if musts:
                turns[-1].append(frame.format(a=rng.choice(raised), b=b, c=rng.choice(musts[k % len(musts)])))
    return turns
