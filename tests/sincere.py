"""How the scripted user takes sincere replies: single ones, each at one point of a dialogue.

    python -m tests.sincere [FILE]

FILE (by default tests/data/replies/sincere.json) holds lists of {"scenario", "turn", "reply"} by language. Turn 0 answers the
opening line, or is the opener in charm; turn k answers what the user brings up k-th. Before it come the user's own lines and,
between them, the good replies of tests/data/replies; the state is the initial one. Prints the share that is taken badly (anger
up or trust down), by scene and by reason, and the mean progress. short.json holds short replies of the same form.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TypedDict

from ctcgrpo.environments.eibench.records import SCENES, Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.simulator.protocol import Reaction, ScenarioCard, Utterance, turn_request
from ctcgrpo.simulator.scripted.backend import react
from tests.dialogue import ROUNDS

DATA = Path(__file__).parent / "data/replies"
SINCERE = DATA / "sincere.json"


class Said(TypedDict):
    scenario: str
    turn: int
    reply: str


@cache
def scenarios(language: str) -> dict[str, Scenario]:
    return {s.id: s for split in ("train", "test") for s in load_scenarios(f"{language}/{split}", split)}


@cache
def good_replies(language: str) -> dict[str, list[str]]:
    folder = DATA / "chinese" if language == "chinese" else DATA
    by_scene = [json.loads((folder / f"{scene}.json").read_text(encoding="utf-8")) for scene in SCENES]
    return {name: replies["good"] for scene in by_scene for name, replies in scene.items()}


def reaction(language: str, said: Said) -> Reaction:
    """How the user takes a reply."""
    scenario = scenarios(language)[said["scenario"]]
    lines = [detail["line"] for detail in scenario.script["details"]]
    lines = [scenario.opening_line, *lines[1:]] if scenario.opening_line else ["", *lines]
    history = []
    for line, reply in zip(lines, [*good_replies(language)[scenario.id][: said["turn"]], said["reply"]], strict=False):
        history += [Utterance(speaker="user", text=line)] if line else []
        history.append(Utterance(speaker="policy", text=reply))
    card, state = ScenarioCard.of(scenario), scenario.anchors.initial
    return react(turn_request(card, history, state, request_id="t", max_rounds=ROUNDS, seed=0))


def progress(reaction: Reaction) -> float:
    """The mean of anger lost and trust won."""
    return (reaction.trust_delta - reaction.anger_delta) / 2


def is_taken_badly(reaction: Reaction) -> bool:
    return reaction.anger_delta > 0 or reaction.trust_delta < 0


def main(file: Path) -> None:
    for language, replies in json.loads(file.read_text(encoding="utf-8")).items():
        taken = [(said, reaction(language, said)) for said in replies]
        badly = [(said, how) for said, how in taken if is_taken_badly(how)]
        of_scene = Counter(scenarios(language)[said["scenario"]].scene for said, _ in badly)
        reasons = Counter(reason for _, how in badly for reason in how.why.split("; "))
        print(f"{language}: {len(badly)} of {len(taken)} taken badly ({len(badly) / len(taken):.1%})")
        print(f"  mean progress: {mean(progress(how) for _, how in taken):+.2f}")
        print(f"  by scene: {', '.join(f'{scene} {of_scene[scene]}' for scene in SCENES)}")
        for reason, count in reasons.most_common():
            print(f"  {count:3d}  {reason}")
        for said, how in badly:
            print(f"  {said['scenario']} {said['turn']}: {said['reply']}\n    {how.why}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SINCERE)
