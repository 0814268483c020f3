"""What a run left behind, read for its report: episodes with the credit that each turn was trained with, validations, metrics.

A run may still be going, and a killed one may end in half a line: what cannot be read, and what the files of a run say
differently, is listed in `problems`.
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

from ctcgrpo.errors import OutputError
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import Validation, checked_summary, read_metrics, read_traces, read_validations, same
from ctcgrpo.util.files import explained, is_complete, read_json, read_object
from ctcgrpo.util.intervals import means

Trace = dict[str, Any]  # run_records.Trace, with what is added here


@dataclass(frozen=True, slots=True)
class Run:
    """`episodes` are traces in the order of step, group and rollout, each with `kind` (step or validation); `unreadable` counts
    lines of traces that are none. `simulator` is what the simulator said of itself (None where that is not recorded), `problems`
    what is wrong with the files, a sentence each."""

    name: str
    recipe: Recipe
    finished: bool
    episodes: Sequence[Trace]
    validations: Sequence[Validation]
    metrics: Sequence[Mapping[str, Any]]
    unreadable: int
    path: Path
    simulator: Mapping[str, Any] | None = None
    written: datetime | None = None  # when the newest of its figures and dialogues was written
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
    """The table of a sweep. Raises OutputError for a file that holds something else."""
    try:
        return _TRIALS.validate_python(read_json(file))
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; the sweep's command writes it again") from None


def read_run(path: Path) -> Run:
    """Raises OutputError for a folder that holds no run, or one that has not played an episode yet."""
    folder = require_run(path)
    recipe = resolved_recipe(folder.recipe_file)
    episodes, bad = _episodes(folder.traces)
    if not episodes:
        told = f" that can be read ({bad[0]})" if bad else ""
        raise OutputError(f"{path} holds no episode yet{told}; there is nothing to report")
    validations, bad_figures = read_validations(folder.validation_file)
    metrics, bad_metrics = read_metrics(folder.metrics_file)
    simulator, bad_simulator = _simulator(path)
    finished = is_complete(folder.final)
    try:
        _, bad_figures = checked_summary(path)
    except OutputError as error:
        bad_figures.append(str(error))
    problems = [*bad, *bad_figures, *bad_metrics, *bad_simulator]
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
        problems=problems,
    )


def _episodes(traces: Path) -> tuple[list[Trace], list[str]]:
    files: dict[tuple[str, int], list[Path]] = {}
    for file in sorted(traces.glob("*.jsonl")):
        if match := re.fullmatch(r"(step|validation)-(\d+)\.rank-\d+", file.stem):
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
    """Where traces hold other episodes than those that the figures were computed from. What a run is just playing, or just played
    when it was killed, has no figures yet."""
    played: dict[tuple[str, int], list[Trace]] = {}
    for e in episodes:
        played.setdefault((e["kind"], e["step"]), []).append(e)
    steps = {"step": [m["step"] for m in metrics], "validation": [v.step for v in validations]}
    problems = [
        f"{'metrics' if kind == 'step' else 'validation'}.jsonl lacks step {step}, which traces hold"
        for kind, step in played
        if step not in steps[kind] and (finished or step < max(steps[kind], default=0))
    ]
    for m in metrics:
        problems += _other_metrics(m, [e for e in played.get(("step", m["step"]), ()) if e["failure"] is None])
    for v in validations:
        found = [e for e in played.get(("validation", v.step), ()) if e["failure"] is None]
        counted = Counter((e["task"], round(e["outcome"], 9)) for e in found)
        said = Counter((name, round(x, 9)) for name, outcomes in v.outcomes.items() for x in outcomes)
        if found and counted != said:
            problems.append(f"validation after step {v.step}: traces and validation.jsonl hold different outcomes")
        failed = len(played.get(("validation", v.step), ())) - len(found)
        if found and failed != v.failed:
            both = f"{failed} failed episodes by the traces, {v.failed} by validation.jsonl"
            problems.append(f"validation after step {v.step}: {both}")
        if found and any(v.scenes.get(e["task"]) != e["tag"] for e in found):
            problems.append(f"validation after step {v.step}: traces and validation.jsonl hold different scenes")
    return problems


def _other_metrics(m: Mapping[str, Any], episodes: Sequence[Trace]) -> list[str]:
    """What a line of metrics.jsonl says otherwise than the valid episodes of its step."""
    said = m.get("episodes/valid")
    if said is None:
        return [f"metrics.jsonl: episodes/valid of step {m['step']} is missing"]
    if said != len(episodes):
        return [f"step {m['step']}: traces hold {len(episodes)} valid episodes, metrics.jsonl says {said:g}"]
    found = [(f"outcome/{name}", e["outcome"]) for e in episodes for name in ("all", e["tag"])]
    if "reward/turn" in m:  # runs of earlier versions logged none
        found += [("reward/turn", turn["reward"]) for e in episodes for turn in e["turns"]]
    return [
        f"step {m['step']}: {name} is {mean:+.4f} by the traces, {m.get(name)} by metrics.jsonl"
        for name, mean in means(found).items()
        if not same(m.get(name), mean)
    ]


def _other_credit(metrics: Sequence[Mapping[str, Any]], episodes: Sequence[Trace], *, shuffled: bool) -> list[str]:
    """Where the recorded credit is not what the run logged: its spread differs, or an advantage is not the sum of its terms (which
    only `shuffled` advantages may be)."""
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
            f"step {m['step']}: {name} is {value:.6f} by the traces, {m.get(name)} by metrics.jsonl"
            for name, value in stds.items()
            if not same(m.get(name), value)
        ]
        wrong = [c["advantage"] for c in turns if not same(c["advantage"], c["outcome"] + c["turn"])]
        if wrong and not shuffled:
            problems.append(f"step {m['step']}: advantage = {wrong[0]} is not outcome + turn (so in {len(wrong)} turns)")
    return problems


def credit_of(episode: Trace) -> list[Mapping[str, float]] | None:
    """The credit that each turn was trained with (outcome, turn, advantage); None for an episode that was not trained on, or that
    has none recorded."""
    found = [turn.get("credit") for turn in episode["turns"]]
    return found if found and None not in found else None
