"""Reads a run's files for its report: episodes with the credit of each turn, validations, metrics.

The run may still be training, and a killed one may end in half a line. `problems` lists unreadable lines, and contradictions
between the files.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ctcgrpo.audit.pooled import pooled
from ctcgrpo.audit.record import FILE, STEPS_FILE, Audit, read_audit, read_steps
from ctcgrpo.errors import OutputError
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import OTHER_USER, VALIDATION, checked_summary, read_metrics, read_traces, read_validations, same
from ctcgrpo.run.scores import Validation
from ctcgrpo.util.files import explained, is_complete, read_json, read_object
from ctcgrpo.util.intervals import means

Trace = dict[str, Any]  # run_records.Trace, with the keys kind and step


@dataclass(frozen=True, slots=True)
class Run:
    """A run's records. `episodes`: traces in the order of step, group and rollout, each with `kind` (step, validation, other_user).
    `unreadable`: the number of invalid lines in traces. `simulator`: the simulator's health answer (None where not recorded).
    `problems`: errors in the files, a sentence each."""

    name: str
    recipe: Recipe
    finished: bool
    episodes: Sequence[Trace]
    validations: Sequence[Validation]
    metrics: Sequence[Mapping[str, Any]]
    unreadable: int
    path: Path
    simulator: Mapping[str, Any] | None = None
    written: datetime | None = None  # time of the newest figures or dialogues
    audits: Sequence[Audit] = ()  # of the trained policy, and of steps of training
    problems: Sequence[str] = ()


class Trial(TypedDict):
    """A row of a sweep's table, as `experiments/table.py` makes it."""

    trial: str
    params: dict[str, Any]
    state: str
    reason: str
    score: float | None
    ci95: list[float] | None
    gain: float | None
    by_seed: dict[str, float]


_TRIALS = TypeAdapter(list[Trial])


def read_trials(file: Path) -> list[Trial]:
    """The table of a sweep. Raises OutputError for an invalid file."""
    try:
        return _TRIALS.validate_python(read_json(file))
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; run the sweep's command again to rewrite it") from None


def read_run(path: Path) -> Run:
    """The run in a folder. Raises OutputError for a folder without a run, and for a run without an episode."""
    folder = require_run(path)
    recipe = resolved_recipe(folder.recipe_file)
    episodes, bad = _episodes(folder.traces)
    if not episodes:
        readable = f" that can be read ({bad[0]})" if bad else ""
        raise OutputError(f"{path}: no episode yet{readable}; expected at least one; try again after the first step")
    validations, bad_figures = read_validations(folder.validation_file)
    metrics, bad_metrics = read_metrics(folder.metrics_file)
    simulator, bad_simulator = _simulator(path)
    audits, bad_audits = _audits(path, recipe.tasks_per_step)
    finished = is_complete(folder.final)
    try:
        _, bad_figures = checked_summary(path)
    except OutputError as error:
        bad_figures.append(str(error))
    problems = [*bad, *bad_figures, *bad_metrics, *bad_simulator, *bad_audits]
    problems += _disagreements(episodes, validations, metrics, finished=finished)
    problems += _other_credit(metrics, episodes, shuffled=recipe.credit.shuffle == "advantages")
    return Run(
        name=path.resolve().name,
        recipe=recipe,
        finished=finished,
        episodes=episodes,
        validations=validations,
        metrics=metrics,
        unreadable=len(bad),
        path=path,
        simulator=simulator,
        written=_written(folder),
        audits=audits,
        problems=problems,
    )


def _episodes(traces: Path) -> tuple[list[Trace], list[str]]:
    files: dict[tuple[str, int], list[Path]] = {}
    for file in sorted(traces.glob("*.jsonl")):
        if match := re.fullmatch(rf"(step|{VALIDATION}|{OTHER_USER})-(\d+)\.rank-\d+", file.stem):
            files.setdefault((match[1], int(match[2])), []).append(file)
    found: list[Trace] = []
    problems: list[str] = []
    for (kind, step), of_step in sorted(files.items()):
        records, bad = read_traces(of_step)
        found += [{**record, "kind": kind, "step": step} for record in records]
        problems += bad
    return found, problems


def _simulator(run: Path) -> tuple[dict[str, Any] | None, list[str]]:
    file = run / "simulator.json"
    try:
        return (read_object(file), []) if file.exists() else (None, [])
    except OutputError as error:
        return None, [str(error)]


def _audits(run: Path, batch: int) -> tuple[list[Audit], list[str]]:
    steps, problems = read_steps(run / STEPS_FILE)
    found = [audit] if (audit := pooled(steps, source=str(run), batch=batch)) else []
    try:
        return [*([read_audit(run / FILE)] if (run / FILE).exists() else []), *found], problems
    except OutputError as error:
        return found, [*problems, str(error)]


def _written(folder: RunFolder) -> datetime:
    files = [folder.recipe_file, folder.metrics_file, folder.validation_file, *folder.traces.glob("*.jsonl")]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files if file.exists()), UTC)


def _disagreements(
    episodes: Sequence[Trace],
    validations: Sequence[Validation],
    metrics: Sequence[Mapping[str, Any]],
    *,
    finished: bool,
) -> list[str]:
    """Contradictions between traces and figures. Episodes of a step in progress, or of one that was killed, have no figures yet."""
    played: dict[tuple[str, int], list[Trace]] = {}
    for e in episodes:
        played.setdefault((e["kind"], e["step"]), []).append(e)
    of_other = [v.other for v in validations if v.other is not None]
    steps = {"step": [m["step"] for m in metrics]}
    steps |= {kind: [v.step for v in of_kind] for kind, of_kind in ((VALIDATION, validations), (OTHER_USER, of_other))}
    problems = [
        f"{'metrics' if kind == 'step' else 'validation'}.jsonl: step {step} is missing, and traces have it"
        for kind, step in played
        if step not in steps[kind] and (finished or step < max(steps[kind], default=0))
    ]
    for m in metrics:
        problems += _other_metrics(m, [e for e in played.get(("step", m["step"]), ()) if e["failure"] is None])
    for v in validations:
        problems += _other_outcomes(v, played.get((VALIDATION, v.step), ()), f"validation after step {v.step}")
    for v in of_other:
        problems += _other_outcomes(v, played.get((OTHER_USER, v.step), ()), f"validation after step {v.step}, other user")
    return problems


def _other_outcomes(v: Validation, episodes: Sequence[Trace], what: str) -> list[str]:
    """Contradictions between a validation and its traces."""
    found = [e for e in episodes if e["failure"] is None]
    if not found:
        return []
    problems = []
    counted = Counter((e["task"], round(e["outcome"], 9)) for e in found)
    if counted != Counter((name, round(x, 9)) for name, outcomes in v.outcomes.items() for x in outcomes):
        problems.append(f"{what}: outcomes differ between traces and validation.jsonl")
    if (failed := len(episodes) - len(found)) != v.failed:
        problems.append(f"{what}: {failed} failed episodes in traces, {v.failed} in validation.jsonl")
    if any(v.scenes.get(e["task"]) != e["tag"] for e in found):
        problems.append(f"{what}: scenes differ between traces and validation.jsonl")
    return problems


def _other_metrics(m: Mapping[str, Any], episodes: Sequence[Trace]) -> list[str]:
    """Contradictions between a line of metrics.jsonl and the valid episodes of its step."""
    said = m.get("episodes/valid")
    if said is None:
        return [f"metrics.jsonl: episodes/valid of step {m['step']} is missing"]
    if said != len(episodes):
        return [f"step {m['step']}: {len(episodes)} valid episodes in traces, {said:g} in metrics.jsonl"]
    found = [(f"outcome/{name}", e["outcome"]) for e in episodes for name in ("all", e["tag"])]
    if "reward/turn" in m:  # runs of earlier versions logged none
        found += [("reward/turn", turn["reward"]) for e in episodes for turn in e["turns"]]
    return [
        f"step {m['step']}: {name} is {mean:+.4f} in traces, {m.get(name)} in metrics.jsonl"
        for name, mean in means(found).items()
        if not same(m.get(name), mean)
    ]


def _other_credit(metrics: Sequence[Mapping[str, Any]], episodes: Sequence[Trace], *, shuffled: bool) -> list[str]:
    """Contradictions between recorded credit and metrics: another standard deviation, or an advantage that is not the sum of its
    terms (allowed for `shuffled` advantages only)."""
    trained: dict[int, list[list[Mapping[str, float]]]] = {}
    for e in episodes:
        if (credit := credit_of(e)) is not None:
            trained.setdefault(e["step"], []).append(credit)
    problems = []
    for m in metrics:
        of_step = trained.get(m["step"], [])
        turns = [c for credit in of_step for c in credit]
        if not turns:
            continue
        stds = {
            "credit/outcome_term_std": float(np.std([credit[0]["outcome"] for credit in of_step])),
            "credit/turn_term_std": float(np.std([c["turn"] for c in turns])),
        }
        problems += [
            f"step {m['step']}: {name} is {value:.6f} in traces, {m.get(name)} in metrics.jsonl"
            for name, value in stds.items()
            if not same(m.get(name), value)
        ]
        wrong = [c["advantage"] for c in turns if not same(c["advantage"], c["outcome"] + c["turn"])]
        if wrong and not shuffled:
            problems.append(f"step {m['step']}: advantage = {wrong[0]}; expected outcome + turn (wrong in {len(wrong)} turns)")
    return problems


def credit_of(episode: Trace) -> list[Mapping[str, float]] | None:
    """The credit of each turn in training (outcome, turn, advantage); None for an episode that was not trained on, or without
    recorded credit."""
    found = [turn.get("credit") for turn in episode["turns"]]
    return found if found and None not in found else None
