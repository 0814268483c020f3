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

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ctcgrpo.audit.pooled import pooled
from ctcgrpo.audit.record import FILE, STEPS_FILE, Audit, read_audit, read_steps
from ctcgrpo.errors import OutputError
from ctcgrpo.report.parts import Part, Trace, part_of
from ctcgrpo.run.folders import require_run
from ctcgrpo.run.recipe import Recipe
from ctcgrpo.run.recipe_file import resolved_recipe
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import OTHER_USER, VALIDATION, checked_summary, read_metrics, read_traces, read_validations, same
from ctcgrpo.run.scores import Validation
from ctcgrpo.util.files import explained, is_complete, read_json, read_object

Place = tuple[str, int]  # kind (step or validation) and step


@dataclass(frozen=True, slots=True)
class Run:
    """A run's records. `episodes`: traces in the order of step, group and rollout, each with `kind` (step, validation, other_user).
    `parts`: what charts need of all of them. `unreadable`: the number of invalid lines in traces. `simulator`: the simulator's
    health answer (None where not recorded).
    `problems`: errors in the files, a sentence each."""

    name: str
    recipe: Recipe
    finished: bool
    episodes: Sequence[Trace]
    parts: Sequence[Part]
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
    episodes: list[Trace] = []
    parts: list[Part] = []
    bad: list[str] = []
    for (kind, step), files in trace_files(folder.traces).items():
        found, problems = read_place(kind, step, files)
        episodes += found
        bad += problems
        if found:
            parts.append(part_of(kind, step, found))
    if not episodes:
        readable = f" that can be read ({bad[0]})" if bad else ""
        raise OutputError(f"{path}: no episode yet{readable}; expected at least one; try again after the first step")
    finished = is_complete(folder.final)
    return assembled(folder, recipe, parts, episodes, bad, finished=finished, written=_written(folder))


def trace_files(traces: Path) -> dict[Place, list[Path]]:
    """The files of each step and validation, one a process, in order."""
    files: dict[Place, list[Path]] = {}
    for file in sorted(traces.glob("*.jsonl")):
        if match := re.fullmatch(rf"(step|{VALIDATION}|{OTHER_USER})-(\d+)\.rank-\d+", file.stem):
            files.setdefault((match[1], int(match[2])), []).append(file)
    return dict(sorted(files.items()))


def read_place(kind: str, step: int, files: Sequence[Path], *, whole_only: bool = False) -> tuple[list[Trace], list[str]]:
    """The episodes of a step or validation, and the problems of its files. `whole_only` skips an incomplete last line."""
    records, problems = read_traces(files, whole_only=whole_only)
    return [{**record, "kind": kind, "step": step} for record in records], problems


def assembled(
    folder: RunFolder,
    recipe: Recipe,
    parts: Sequence[Part],
    episodes: Sequence[Trace],
    bad: Sequence[str],
    *,
    finished: bool,
    written: datetime,
    whole_only: bool = False,
) -> Run:
    """The run with these dialogues, and all its other files. `bad`: the problems of traces. `whole_only` skips incomplete last
    lines, which a run that is writing leaves."""
    validations, bad_figures = read_validations(folder.validation_file, whole_only=whole_only)
    metrics, bad_metrics = read_metrics(folder.metrics_file, whole_only=whole_only)
    simulator, bad_simulator = _simulator(folder.path)
    audits, bad_audits = _audits(folder.path, recipe.tasks_per_step)
    if (folder.path / "summary.json").exists():
        try:
            _, bad_figures = checked_summary(folder.path)
        except OutputError as error:
            bad_figures.append(str(error))
    problems = [*bad, *bad_figures, *bad_metrics, *bad_simulator, *bad_audits]
    problems += _disagreements(parts, validations, metrics, finished=finished)
    problems += _other_credit(metrics, parts, shuffled=recipe.credit.shuffle == "advantages")
    return Run(
        name=folder.path.resolve().name,
        recipe=recipe,
        finished=finished,
        episodes=episodes,
        parts=parts,
        validations=validations,
        metrics=metrics,
        unreadable=len(bad),
        path=folder.path,
        simulator=simulator,
        written=written,
        audits=audits,
        problems=problems,
    )


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
    parts: Sequence[Part],
    validations: Sequence[Validation],
    metrics: Sequence[Mapping[str, Any]],
    *,
    finished: bool,
) -> list[str]:
    """Contradictions between traces and figures. Episodes of a step in progress, or of one that was killed, have no figures yet."""
    played = {(part.kind, part.step): part for part in parts}
    of_other = [v.other for v in validations if v.other is not None]
    steps = {"step": {m["step"] for m in metrics}}
    steps |= {kind: {v.step for v in of_kind} for kind, of_kind in ((VALIDATION, validations), (OTHER_USER, of_other))}
    problems = [
        f"{'metrics' if kind == 'step' else 'validation'}.jsonl: step {step} is missing, and traces have it"
        for kind, step in played
        if step not in steps[kind] and (finished or step < max(steps[kind], default=0))
    ]
    for m in metrics:
        problems += _other_metrics(m, played.get(("step", m["step"]), Part("step", m["step"])))
    for v in validations:
        problems += _other_outcomes(v, played.get((VALIDATION, v.step)), f"validation after step {v.step}")
    for v in of_other:
        problems += _other_outcomes(v, played.get((OTHER_USER, v.step)), f"validation after step {v.step}, other user")
    return problems


def _other_outcomes(v: Validation, part: Part | None, what: str) -> list[str]:
    """Contradictions between a validation and its traces."""
    if part is None or not part.valid:
        return []
    problems = []
    if _counted(part.outcomes) != _counted(v.outcomes):
        problems.append(f"{what}: outcomes differ between traces and validation.jsonl")
    if part.failed != v.failed:
        problems.append(f"{what}: {part.failed} failed episodes in traces, {v.failed} in validation.jsonl")
    if any(v.scenes.get(task) != tag for task, tag in part.scenes.items()):
        problems.append(f"{what}: scenes differ between traces and validation.jsonl")
    return problems


def _counted(outcomes: Mapping[str, Sequence[float]]) -> Counter[tuple[str, float]]:
    return Counter((name, round(x, 9)) for name, values in outcomes.items() for x in values)


def _other_metrics(m: Mapping[str, Any], part: Part) -> list[str]:
    """Contradictions between a line of metrics.jsonl and the valid episodes of its step."""
    logged = m.get("episodes/valid")
    if logged is None:
        return [f"metrics.jsonl: episodes/valid of step {m['step']} is missing"]
    if logged != part.valid:
        return [f"step {m['step']}: {part.valid} valid episodes in traces, {logged:g} in metrics.jsonl"]
    return [
        f"step {m['step']}: {name} is {mean:+.4f} in traces, {m.get(name)} in metrics.jsonl"
        for name, mean in part.means.items()
        if (name in m or name != "reward/turn") and not same(m.get(name), mean)  # runs of earlier versions log no reward/turn
    ]


def _other_credit(metrics: Sequence[Mapping[str, Any]], parts: Sequence[Part], *, shuffled: bool) -> list[str]:
    """Contradictions between recorded credit and metrics: another standard deviation, or an advantage that is not the sum of its
    terms (allowed for `shuffled` advantages only)."""
    trained = {part.step: part for part in parts if part.trained}
    problems = []
    for m in metrics:
        if (part := trained.get(m["step"])) is None:
            continue
        problems += [
            f"step {m['step']}: {name} is {value:.6f} in traces, {m.get(name)} in metrics.jsonl"
            for name, value in part.stds.items()
            if not same(m.get(name), value)
        ]
        if part.wrong and not shuffled:
            problems.append(
                f"step {m['step']}: advantage = {part.wrong[0]}; expected outcome + turn (wrong in {len(part.wrong)} turns)"
            )
    return problems
