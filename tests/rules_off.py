"""Does a run's held-out gain hang on one rule of the scripted user?

    python -m tests.rules_off RUN [RUN ...]

The recorded dialogues of the validations before and after training are judged again, with all rules and then with each rule
of `simulator/scripted/rules.py` switched off. Replies and lines of the user stay as they were; the states follow from what the
other rules find. With all rules on, states and figures must equal the recorded ones; else the program stops.

Prints the gain (mean over scenarios of after - before, with its 95 % interval) without each rule, those first that take the
largest part of it with them, and in how many replies before and after training a rule has a say. The parts need not add up to
the whole: rules overlap, and each axis is clamped. Several runs are printed together as well. A few seconds a run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctcgrpo.environments.eibench import task_of
from ctcgrpo.environments.eibench.records import Scenario, UserState
from ctcgrpo.environments.eibench.scoring import Variant, outcome_score
from ctcgrpo.errors import OutputError
from ctcgrpo.run.run_records import disagreement, read_summary, same
from ctcgrpo.run.scores import Improvement, Validation, improvement
from ctcgrpo.run.validation import validation_of
from ctcgrpo.simulator.protocol import ScenarioCard, Utterance, turn_request
from ctcgrpo.simulator.scripted.backend import react
from ctcgrpo.simulator.scripted.rules import RULES, SPOILERS, Rule
from ctcgrpo.util.files import read_json
from tests.held_out import HeldOut, Stage, Trace, pooled, read_held_out


@dataclass(frozen=True, slots=True)
class Judged:
    """Both validations by one set of rules. `reasons` are those of every reply, in the order of the dialogues."""

    before: Validation
    after: Validation
    reasons: tuple[Sequence[str], Sequence[str]]

    @property
    def gain(self) -> Improvement:
        return improvement(self.before, self.after)


def every_rule() -> list[Rule]:
    return [*SPOILERS, *RULES]


@contextmanager
def without(rule: Rule) -> Iterator[None]:
    """The scripted user of this process without one of its rules, for as long as the context lasts."""
    registry = SPOILERS if rule in SPOILERS else RULES
    place = registry.index(rule)
    registry.pop(place)
    try:
        yield
    finally:
        registry.insert(place, rule)


def judged_dialogue(
    scenario: Scenario, dialogue: Trace, *, max_rounds: int, reluctance: float = 0.0
) -> tuple[list[UserState], list[str]]:
    """The states after each recorded reply by the rules that are on, and the reasons for them."""
    card, state = ScenarioCard.of(scenario), scenario.anchors.initial
    history = [Utterance(speaker="user", text=scenario.opening_line)] if scenario.opening_line else []
    states, reasons = [], []
    for turn in dialogue["turns"]:
        history.append(Utterance(speaker="policy", text=turn["reply"]))
        request = turn_request(card, history, state, request_id="rules_off", max_rounds=max_rounds, seed=0)
        reaction = react(request, reluctance)
        state = state.plus(reaction.anger_delta, reaction.trust_delta)
        states.append(state)
        reasons.append(reaction.why)
        history.append(Utterance(speaker="user", text=turn["message"]))
    return states, reasons


def judged(run: HeldOut, reluctance: float = 0.0) -> Judged:
    """The run by the rules that are on."""
    (before, why_before), (after, why_after) = (_judged(run, stage, reluctance) for stage in (run.before, run.after))
    return Judged(before, after, (why_before, why_after))


def _judged(run: HeldOut, stage: Stage, reluctance: float) -> tuple[Validation, list[str]]:
    variant: Variant = run.recipe.scoring.variant
    outcomes, reasons = [], list[str]()
    for dialogue in stage.dialogues:
        scenario = run.scenarios[dialogue["task"]]
        states, why = judged_dialogue(scenario, dialogue, max_rounds=run.recipe.rollout.max_turns, reluctance=reluctance)
        reasons += why
        outcomes.append(
            (scenario.id, outcome_score(states[-1] if states else scenario.anchors.initial, scenario.anchors, variant))
        )
    scenarios = [run.scenarios[name] for name in stage.validation.outcomes]
    return validation_of(stage.validation.step, [task_of(s) for s in scenarios], outcomes), reasons


def refuse_others(run: HeldOut, all_on: Judged, reluctance: float) -> None:
    """Raises OutputError where the rules, all on, do not give what the run recorded."""
    for stage in (run.before, run.after):
        for dialogue in stage.dialogues:
            scenario = run.scenarios[dialogue["task"]]
            states, _ = judged_dialogue(scenario, dialogue, max_rounds=run.recipe.rollout.max_turns, reluctance=reluctance)
            for k, (turn, state) in enumerate(zip(dialogue["turns"], states, strict=True), 1):
                after = (turn["info"]["anger"], turn["info"]["trust"])
                if after != state:
                    raise OutputError(
                        f"{run.path}/traces: step {stage.validation.step}, {scenario.id}, rollout {dialogue['rollout']}, turn {k}: "
                        f"after = {list(after)}; expected {list(state)} by the rules as they are; another version of "
                        "the scripted user or of the scenarios played it"
                    )
    recorded, found = improvement(run.before.validation, run.after.validation), all_on.gain
    figures = [(recorded.overall, found.overall), *zip(recorded.ci95 or (), found.ci95 or (), strict=True)]
    if not all(same(a, b) for a, b in figures):
        raise OutputError(f"{run.path}/validation.jsonl: improvement = {recorded}; expected {found} by the traces")
    summary = read_summary(run.path)
    problem = None if summary is None else disagreement(summary, [run.before.validation, run.after.validation])
    if problem is not None:
        raise OutputError(f"{run.path}/{problem}")


def reluctance_of(run: HeldOut) -> float:
    """Raises OutputError for a run whose user was not the scripted one."""
    about = read_json(run.path / "simulator.json")
    if not isinstance(about, dict) or about.get("backend") != "scripted":
        raise OutputError(f"{run.path}/simulator.json: {str(about)[:80]}; expected a run with the scripted user")
    return float(about.get("reluctance", 0.0))


def ablation(run: HeldOut) -> tuple[Judged, dict[str, Judged]]:
    """By all rules, and by all but the named one. Raises OutputError where all rules together do not give the run's own figures."""
    reluctance = reluctance_of(run)
    all_on = judged(run, reluctance)
    refuse_others(run, all_on, reluctance)
    off = {}
    for rule in every_rule():
        with without(rule):
            off[rule.__name__] = judged(run, reluctance)
    return all_on, off


def together(runs: Sequence[tuple[Judged, dict[str, Judged]]]) -> tuple[Judged, dict[str, Judged]]:
    """Several runs as one, by scenario."""

    def one(found: Sequence[Judged]) -> Judged:
        before, after = ([why for judged in found for why in judged.reasons[k]] for k in (0, 1))
        return Judged(pooled([j.before for j in found]), pooled([j.after for j in found]), (before, after))

    return one([run[0] for run in runs]), {name: one([run[1][name] for run in runs]) for name in runs[0][1]}


def ablation_table(title: str, all_on: Judged, off: dict[str, Judged]) -> Table:
    """Sorted by the part of the gain that goes with a rule, the largest first."""
    table = Table(title=f"{escape(title)}: held-out gain without one rule of the scripted user")
    for name in ("rule off", "gain", "95 % interval", "goes with it", "share of the gain", "has a say before", "after"):
        table.add_column(name)
    whole = all_on.gain.overall or 0.0
    table.add_row("none", *_gain(all_on), "", "", *(str(len(why)) for why in all_on.reasons), end_section=True)
    for name, found in sorted(off.items(), key=lambda item: item[1].gain.overall or 0.0):
        lost = whole - (found.gain.overall or 0.0)
        part = f"{lost / whole:.0%}" if whole else "-"
        changed = [
            sum(a != b for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in zip(all_on.reasons, found.reasons, strict=True)
        ]
        table.add_row(name, *_gain(found), f"{lost:+.3f}", part, *map(str, changed))
    return table


def _gain(found: Judged) -> tuple[str, str]:
    low, high = found.gain.ci95 or (math.nan, math.nan)
    return f"{found.gain.overall:+.3f}", f"{low:+.3f} to {high:+.3f}"


def main(folders: Sequence[Path], console: Console) -> None:
    runs = []
    for folder in folders:
        runs.append(ablation(read_held_out(folder)))
        console.print(ablation_table(str(folder), *runs[-1]))
    if len(runs) > 1:
        console.print(ablation_table(f"all {len(runs)} runs together", *together(runs)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main([Path(argument) for argument in sys.argv[1:]], Console(width=130))
    except OutputError as problem:
        sys.exit(f"error: {problem}")
