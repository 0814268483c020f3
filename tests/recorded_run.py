"""A small run folder whose held-out dialogues the scripted user really judged, for tests of what reads such folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench import task_of
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.environments.eibench.scoring import turn_score
from ctcgrpo.run.validation import validation_of
from tests.dialogue import converse

HELD_OUT = {scenario.id: scenario for scenario in load_scenarios("english/test", "test")}
ROUNDS = 2
_RECIPE = f"""\
run: {{name: recorded}}
policy: {{model: builtin/tiny, persona_sections: [Core goal]}}
scenarios: {{train: english/train}}
rollout: {{max_turns: {ROUNDS}}}
validation: {{scenarios: english/test}}
"""
Replies = Mapping[str, Sequence[Sequence[str]]]
"""By scenario: one dialogue or more, each the policy's replies."""


def write_run(folder: Path, validations: Mapping[int, Replies]) -> Path:
    """A run with the given replies by step. Returns the folder."""
    (folder / "traces").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(_RECIPE)
    (folder / "simulator.json").write_text('{"backend": "scripted"}')
    lines = []
    for step, replies in validations.items():
        episodes = [
            _episode(HELD_OUT[name], group, rollout, said)
            for group, (name, dialogues) in enumerate(replies.items())
            for rollout, said in enumerate(dialogues)
        ]
        outcomes = [(episode["task"], episode["outcome"]) for episode in episodes]
        lines.append(validation_of(step, [task_of(HELD_OUT[name]) for name in replies], outcomes).model_dump_json() + "\n")
        traces = "".join(json.dumps(episode) + "\n" for episode in episodes)
        (folder / f"traces/validation-{step:06d}.rank-0.jsonl").write_text(traces)
    (folder / "validation.jsonl").write_text("".join(lines))
    return folder


def _episode(scenario: Scenario, group: int, rollout: int, replies: Sequence[str]) -> dict[str, Any]:
    outcome, judged = converse(scenario, replies, rounds=ROUNDS)
    state, turns = scenario.anchors.initial, []
    for (anger, trust, why, line), reply in zip(judged, replies, strict=False):
        after = state.plus(anger, trust)
        turn: dict[str, Any] = {
            "reasoning": None,
            "reply": reply,
            "faults": [],
            "completion_tokens": 9,
            "dropped_exchanges": 0,
        }
        info = {**after._asdict(), "why": why}
        turns.append({**turn, "message": line, "reward": turn_score(state, after), "info": info})
        state = after
    return {
        "task": scenario.id,
        "tag": scenario.scene,
        "group": group,
        "rollout": rollout,
        "outcome": outcome,
        "failure": None,
        "info": scenario.anchors.initial._asdict(),
        "opening": scenario.opening_line,
        "turns": turns,
    }
