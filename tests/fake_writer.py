"""A hosted LLM that writes scenarios, as tests see it: right most of the time, and wrong in the ways that models are."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ctcgrpo.environments.eibench.scenarios import load_scenarios
from tests.fake_llm import FakeLlm, answered


@cache
def vocabulary() -> list[str]:
    return sorted({w for s in load_scenarios("english/train") for w in re.findall(r"[a-z]{4,9}", s.user_persona.lower())})


@dataclass
class FakeWriter(FakeLlm):
    """`mistakes` maps what is wrong with a first answer to its probability: fenced, missing, ranges, refusal, copy, truncated. A
    corrected answer is right, but that a refusal stays one. Answers depend on what is asked alone. `told` counts the mistakes."""

    mistakes: Mapping[str, float] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    """By the user message of a request: the mistake that its first answer had, "" for none."""

    def completion(self, body: dict[str, Any], fault: str = "") -> dict[str, Any]:
        messages = body["messages"]
        asked = messages[1]["content"]
        if "section titles" in messages[0]["content"]:
            return answered(body, self.laid_out(messages))
        rng = random.Random(hashlib.sha256(asked.encode()).digest())
        mistake = self._mistake(rng)
        first = len(messages) == 2
        if first:
            self.told[asked] = mistake
        draft = self._draft(rng, messages[0]["content"])
        if mistake == "copy":
            draft = self._draft(random.Random(7), messages[0]["content"])
        text = json.dumps(draft)
        if mistake == "refusal":
            text = "I'm sorry, but I can't assist with that."
        elif mistake == "fenced":
            text = f"Here you are:\n```json\n{text}\n```"
        elif mistake == "ranges":
            draft["anchors"] |= {"initial_anger": 57, "worst_trust": draft["anchors"]["initial_trust"], "worst_anger": 120}
            text = json.dumps(draft)
        elif mistake == "missing" and first:
            del draft["details"], draft["user"]["aim"]
            text = json.dumps(draft)
        elif mistake == "truncated" and first:
            text = text[: len(text) // 2]
        return answered(body, text)

    def laid_out(self, messages: list[dict[str, str]]) -> str:
        """Spreads the lines of a persona over the titles, or, for one that says so, writes something else."""
        titles = re.findall(r"'([^']+)'", messages[0]["content"])
        lines = [line for line in messages[1]["content"].splitlines() if line.strip() and not line.startswith("#")]
        n = len(titles)
        found = {title: "\n".join(lines[k * len(lines) // n : (k + 1) * len(lines) // n]) for k, title in enumerate(titles)}
        if "UNFAITHFUL" in messages[1]["content"]:
            found[titles[0]] = "A different person altogether, with a boat and three dogs and no worries at all in the world."
        found["Known facts"] = "1. " + found["Known facts"].replace("\n", "\n2. ")
        return json.dumps(found)

    def _mistake(self, rng: random.Random) -> str:
        point = rng.random()
        for name, rate in self.mistakes.items():
            point -= rate
            if point < 0:
                return name
        return ""

    def _draft(self, rng: random.Random, system: str) -> dict[str, Any]:
        def words(n: int) -> list[str]:
            return rng.sample(vocabulary(), n)

        def prose(n: int) -> str:
            return f"You are {' '.join(words(n))}."

        charm, defense, repair = ("speaks first, so" in system, "hold the limit" in system, "making up" in system)
        details = []
        for _ in range(6):
            named, line = words(4), words(8)
            details.append(
                {
                    "about": f"the {named[0]}",
                    "words": named,
                    "sense": words(8),
                    "line": f"The {named[0]} and {' '.join(line)}.",
                }
            )
        return {
            "title": " ".join(words(3)),
            "user": {k: prose(25) for k in ("background", "stance", "style", "behaviour", "aim")}
            | {"facts": [prose(8) for _ in range(4)]},
            "opening_line": "" if charm else prose(12),
            "policy": {k: prose(25) for k in ("background", "stance", "core_goal")} | {"facts": [prose(8) for _ in range(4)]},
            "goal": prose(6),
            "success_criteria": [prose(4) for _ in range(3)],
            "must_avoid": [prose(4) for _ in range(3)],
            "anchors": {
                "initial_anger": 60,
                "initial_trust": 35,
                "target_anger": 25,
                "target_trust": 70,
                "worst_anger": 85,
                "worst_trust": 10,
            },
            "worst_reason": prose(5),
            "details": details,
            "reactions": {k: [prose(3)] * 2 for k in ("warmer", "flat", "colder", "thanks", "leaves")},
            "limit": words(6) if defense else [],
            "offer": words(6) if defense else [],
            "fault": words(6) if repair else [],
            "remedy": words(6) if repair else [],
        }
