"""What a run left behind, read for its report: episodes with the credit that each turn was trained with, validations, metrics.

Credit is not in the traces: it is computed here by the trainer's own functions from the states that are, step by step as in
training. A run may still be going, and a killed one may end in half a line: what cannot be read, and what the files of a run say
differently, is listed in `problems`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ctcgrpo.credit import SceneBaseline
from ctcgrpo.errors import OutputError
from ctcgrpo.files import explained, is_complete, read_json
from ctcgrpo.folders import require_run
from ctcgrpo.intervals import means
from ctcgrpo.recipe import Recipe, resolved_recipe
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.run_records import Summary, disagreement, read_metrics, read_summary, read_traces, same
from ctcgrpo.scoring import shaped_outcome, turn_form
from ctcgrpo.training.samples import CreditOptions, credit_options, numbers, step_credit
from ctcgrpo.training.samples import Summary as EpisodeSummary
from ctcgrpo.validation import Validation, read_validations

Trace = dict[str, Any]
"""run_records.Trace, with what is added here."""


@dataclass(frozen=True, slots=True)
class Run:
    """`episodes` are traces in the order of step, group and rollout, each with `kind` (step or validation) and, in those that
    were trained on, `advantages`, a number a turn; `unreadable` counts lines of traces that are none. `simulator` is what the
    simulator said of itself (None where that is not recorded), `problems` what is wrong with the files, a sentence each."""

    name: str
    recipe: Recipe
    finished: bool
    episodes: Sequence[Trace]
    validations: Sequence[Validation]
    metrics: Sequence[Mapping[str, Any]]
    unreadable: int
    path: Path
    simulator: Mapping[str, Any] | None = None
    written: datetime | None = None
    """When the newest of its figures and dialogues was written."""
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
    options = credit_options(recipe)
    validations, bad_validations = read_validations(folder.validation_file)
    metrics, bad_metrics = read_metrics(folder.metrics_file)
    simulator, bad_simulator = _simulator(path)
    finished = is_complete(folder.final)
    problems = [*bad, *bad_validations, *bad_metrics, *bad_simulator]
    problems += _disagreements(episodes, validations, metrics, finished=finished)
    credited, terms = with_credit(episodes, options)
    problems += _other_terms(metrics, terms)
    return Run(
        name=path.resolve().name,
        recipe=recipe,
        finished=finished,
        episodes=credited,
        validations=validations,
        metrics=metrics,
        unreadable=len(bad),
        path=path,
        simulator=simulator,
        written=_written(folder),
        problems=[*problems, *_summary_problems(path, validations)],
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
    if not file.exists():
        return None, []
    try:
        found = read_json(file)
    except OutputError as error:
        return None, [str(error)]
    return (
        (found, []) if isinstance(found, dict) else (None, [f"{file.name} is a {type(found).__name__}; expected an object"])
    )


def _written(folder: RunFolder) -> datetime:
    files = [folder.recipe_file, folder.metrics_file, folder.validation_file, *folder.traces.glob("*.jsonl")]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files if file.exists()), UTC)


def _summary_problems(run: Path, validations: Sequence[Validation]) -> list[str]:
    """What is wrong with summary.json, whose figures the report computes itself."""
    try:
        summary = read_summary(run, Summary)
    except OutputError as error:
        return [str(error)]
    told = disagreement(summary, validations) if summary is not None else None
    return [] if told is None else [told]


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
            problems.append(
                f"validation after step {v.step}: {failed} failed episodes by the traces, {v.failed} by validation.jsonl"
            )
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
    computed = means([*(("all", e["outcome"]) for e in episodes), *((e["tag"], e["outcome"]) for e in episodes)])
    return [
        f"step {m['step']}: outcome/{name} is {mean:+.4f} by the traces, {m.get(f'outcome/{name}')} by metrics.jsonl"
        for name, mean in computed.items()
        if not same(m.get(f"outcome/{name}"), mean)
    ]


def _other_terms(metrics: Sequence[Mapping[str, Any]], terms: Mapping[int, tuple[float, float]]) -> list[str]:
    """Where the spread of the credit by the traces is not what the run logged: a reward or an outcome was altered."""
    names = ("credit/outcome_term_std", "credit/turn_term_std")
    return [
        f"step {m['step']}: {name} is {value:.6f} by the traces, {m.get(name)} by metrics.jsonl"
        for m in metrics
        for name, value in zip(names, terms.get(m["step"], ()), strict=False)
        if not same(m.get(name), value)
    ]


def with_credit(episodes: Sequence[Trace], options: CreditOptions) -> tuple[list[Trace], dict[int, tuple[float, float]]]:
    """Episodes with `advantages`, where they were trained on; None in the others (failed ones, groups of one, validations). And the
    standard deviations of the outcome term and the turn term, by step."""
    by_step: dict[int, list[Trace]] = {}
    for episode in episodes:
        if episode["kind"] == "step":
            by_step.setdefault(episode["step"], []).append(episode)
    baseline = SceneBaseline()
    advantages: dict[tuple[int, int, int], tuple[float, ...]] = {}
    terms: dict[int, tuple[float, float]] = {}
    for step, of_step in sorted(by_step.items()):
        found = step_credit([summary_of(e, options) for e in of_step], options, baseline, step=step)
        baseline = found.baseline
        advantages |= {(step, *key): values for key, values in found.advantages.items()}
        terms[step] = found.outcome_term_std, found.turn_term_std
    credited = [
        {**e, "advantages": advantages.get((e["step"], e["group"], e["rollout"])) if e["kind"] == "step" else None}
        for e in episodes
    ]
    return credited, terms


def summary_of(episode: Trace, options: CreditOptions) -> EpisodeSummary:
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
    last = turns[-1]["info"] if turns else episode["info"]
    return EpisodeSummary(
        tag=episode["tag"],
        group=episode["group"],
        rollout=episode["rollout"],
        outcome=outcome,
        reward=reward,
        turn_scores=tuple(float(turn["reward"]) for turn in turns),
        final=numbers(last),
        failure=episode["failure"]["kind"] if episode["failure"] else None,
        turn_tokens=tuple(turn["completion_tokens"] for turn in turns),
        cut_turns=sum("cut" in turn["faults"] for turn in turns),
        empty_turns=sum("empty_reply" in turn["faults"] for turn in turns),
        dropped_exchanges=max((turn["dropped_exchanges"] for turn in turns), default=0),
    )
