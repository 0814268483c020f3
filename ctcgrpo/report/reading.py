"""What a run left behind, read for its report: episodes with the credit that each turn was trained with, validations, metrics.

Credit is not in the traces: it is computed here by the trainer's own functions from the states that are, step by step as in
training. A run may still be going, and a killed one may end in half a line: what cannot be read is counted and said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctcgrpo.credit import SceneBaseline
from ctcgrpo.errors import OutputError
from ctcgrpo.files import is_complete, read_json_lines
from ctcgrpo.folders import require_run
from ctcgrpo.recipe import Recipe, resolved_recipe
from ctcgrpo.records import UserState
from ctcgrpo.scoring import shaped_outcome, turn_form, turn_score
from ctcgrpo.training.samples import CreditOptions, Summary, credit_options, step_credit

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """`episodes` are traces in the order of step, group and rollout, each with `kind` (step or validation) and, in those that
    were trained on, `advantages`, a number a turn; `unreadable` counts lines that are no trace."""

    name: str
    recipe: Recipe
    finished: bool
    episodes: Sequence[Trace]
    validations: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    unreadable: int


def read_run(path: Path, options: CreditOptions | None = None) -> Run:
    """Raises OutputError for a folder that holds no run, or one that has not played an episode yet."""
    folder = require_run(path)
    recipe = resolved_recipe(folder.recipe_file)
    episodes, unreadable = _episodes(folder.traces)
    if not episodes:
        raise OutputError(f"{path} holds no episode yet; there is nothing to report")
    if options is None:
        options = credit_options(recipe)
    return Run(
        name=path.resolve().name,
        recipe=recipe,
        finished=is_complete(folder.final),
        episodes=with_credit(episodes, options),
        validations=sorted(_lines(folder.validation_file)[0], key=lambda record: record["step"]),
        metrics=_lines(folder.metrics_file)[0],
        unreadable=unreadable,
    )


def _episodes(traces: Path) -> tuple[list[Trace], int]:
    found: list[Trace] = []
    unreadable = 0
    for file in sorted(traces.glob("*.jsonl")):
        match = re.fullmatch(r"(step|validation)-(\d+)\.rank-\d+", file.stem)
        if match:
            records, bad = _lines(file)
            unreadable += bad
            found += [{**record, "kind": match[1], "step": int(match[2])} for record in records if "turns" in record]
    found.sort(key=lambda e: (e["kind"], e["step"], e["group"], e["rollout"]))
    return found, unreadable


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a JSONL file, and how many lines are none."""
    if not file.exists():
        return [], 0
    bad: list[str] = []
    found = [record for _, record in read_json_lines(file, on_bad=lambda place, message: bad.append(place))]
    return found, len(bad)


def with_credit(episodes: Sequence[Trace], options: CreditOptions) -> list[Trace]:
    """Episodes with `advantages`, where they were trained on; None in the others (failed ones, groups of one, validations)."""
    by_step: dict[int, list[Trace]] = {}
    for episode in episodes:
        if episode["kind"] == "step":
            by_step.setdefault(episode["step"], []).append(episode)
    baseline = SceneBaseline()
    advantages: dict[tuple[int, int, int], tuple[float, ...]] = {}
    for step, of_step in sorted(by_step.items()):
        found = step_credit([summary_of(e, options) for e in of_step], options, baseline, step=step)
        baseline = found.baseline
        advantages |= {(step, *key): values for key, values in found.advantages.items()}
    return [
        {**e, "advantages": advantages.get((e["step"], e["group"], e["rollout"])) if e["kind"] == "step" else None}
        for e in episodes
    ]


def summary_of(episode: Trace, options: CreditOptions) -> Summary:
    """As `training.samples.summarise` makes it of an Episode, from its trace."""
    turns = episode["turns"]
    outcome = float("nan") if episode["outcome"] is None else float(episode["outcome"])
    reward = outcome
    if options.shaping is not None:
        no_reasoning, fault = options.shaping
        reward = shaped_outcome(
            outcome,
            [turn_form(turn["reasoning"], turn["faults"]) for turn in turns],
            no_reasoning=no_reasoning,
            fault=fault,
        )
    weights = (options.turn_weights or {}).get(episode["scene"], (0.5, 0.5))
    last = turns[-1]["after"] if turns else episode["initial_state"]
    return Summary(
        scene=episode["scene"],
        group=episode["group"],
        rollout=episode["rollout"],
        outcome=outcome,
        reward=reward,
        turn_scores=tuple(turn_score(UserState(*t["before"]), UserState(*t["after"]), weights) for t in turns),
        final_anger=last[0],
        final_trust=last[1],
        failure=episode["failure"]["kind"] if episode["failure"] else None,
        turn_tokens=tuple(turn["completion_tokens"] for turn in turns),
        cut_turns=sum("cut" in turn["faults"] for turn in turns),
        empty_turns=sum("empty_reply" in turn["faults"] for turn in turns),
        dropped_exchanges=max((turn["dropped_exchanges"] for turn in turns), default=0),
    )
