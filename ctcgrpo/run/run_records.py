"""Schemas of a run folder's records, for their writer and readers: validation.jsonl, summary.json, metrics.jsonl, traces.

A folder may be incomplete, edited or damaged. An invalid JSON document raises OutputError with file, field and value. Of JSON lines
files, readers skip invalid lines and return the problems.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ctcgrpo.errors import OutputError
from ctcgrpo.run.scores import STRICT, Figures, Gamed, Improvement, OtherScores, Score, Validation, improvement, other_scores
from ctcgrpo.util.files import collect_records, explained, once_each, read_json, refuse_to_resume

_OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_CLOSE = 1e-9

VALIDATION, OTHER_USER = "validation", "other_user"
"""How the traces of a validation begin: with the user of training, and with the other one."""


# --- validation.jsonl and summary.json -------------------------------------------------------------------------------------------


class Best(BaseModel):
    model_config = STRICT
    step: int
    overall: Score | None


class Settings(TypedDict):
    """Settings that scores depend on beside policy and simulator (`played.validation_settings`); only some are checked here."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    data_set: str


class Summary(BaseModel):
    """summary.json of a run with a validation section. `simulator`: the server's description of itself. `environment`: factory of a
    custom environment, in place of `simulator`, `scoring_variant` and `settings`. `skipped`: the number of skipped invalid
    records, by the recipe field that names their set. `other` and `gamed`: with validation.simulator, see `Validation.other`."""

    model_config = STRICT
    before: Figures
    after: Figures
    improvement: Improvement
    steps: int | None = None
    best: Best | None = None
    other: OtherScores | None = None
    gamed: list[Gamed] = []
    run: str | None = None
    scoring_variant: str = "training"
    settings: Settings | None = None
    skipped: dict[str, int] = {}
    simulator: dict[str, Any] = {}
    environment: str | None = None
    version: str | None = None


def read_validations(file: Path, *, whole_only: bool = False) -> tuple[list[Validation], list[str]]:
    """Validations by step, without duplicates, and the problems of validation.jsonl. `whole_only` skips an incomplete last line."""
    found, problems = collect_records(file, Validation.model_validate, whole_only=whole_only)
    return once_each(file, found, lambda validation: validation.step, "step {}", problems)


def valid_validations(file: Path) -> list[Validation]:
    """By step, at least one, each with a valid episode. Raises OutputError where a line is damaged: for readers whose figures are
    of all of them."""
    found, problems = read_validations(file)
    if not found and not problems:
        problems = [f"{file.name} has no validation"]
    problems += [f"{file.name}: no valid episode after step {v.step}" for v in found if not v.by_scenario]
    if problems:
        raise OutputError(f"{file.parent}/{problems[0]}")
    return found


def resumed_validations(file: Path) -> list[Validation]:
    """The recorded validations of a run to resume. Raises OutputError where a line is damaged."""
    found, problems = read_validations(file, whole_only=True)
    refuse_to_resume(file, problems)
    return found


def read_summary(run: Path) -> Summary | None:
    """summary.json of a run; None where there is none. Raises OutputError for another content."""
    file = run / "summary.json"
    if not file.exists():
        return None
    try:
        return Summary.model_validate(read_json(file))
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; expected the file as the run wrote it") from None


def checked_summary(run: Path) -> tuple[Summary | None, list[str]]:
    """As `read_summary`; also the problems of validation.jsonl and contradictions between the two files."""
    summary = read_summary(run)
    validations, problems = read_validations(run / "validation.jsonl")
    different = None if summary is None else disagreement(summary, validations)
    return summary, problems + ([] if different is None else [different])


def disagreement(summary: Summary, validations: Sequence[Validation]) -> str | None:
    """The first contradiction between summary.json and validation.jsonl, from which it was computed; None where they agree, or
    there is no validation."""
    if not validations:
        return None
    recorded, computed = summary.improvement, improvement(validations[0], validations[-1])
    pairs = [("improvement.overall", recorded.overall, computed.overall)]
    lows, highs = zip(recorded.ci95 or (None, None), computed.ci95 or (None, None), strict=True)
    pairs += [("improvement.ci95 (low)", *lows), ("improvement.ci95 (high)", *highs)]
    ends = [("before", summary.before, validations[0]), ("after", summary.after, validations[-1])]
    if (other := summary.other) is not None:
        unlike = other_scores(validations)
        computed_gain = None if unlike is None else unlike.improvement.overall
        pairs.append(("other.improvement.overall", other.improvement.overall, computed_gain))
        ends += [
            (f"other.{when}", stored, v.other)
            for when, stored, v in (("before", other.before, validations[0]), ("after", other.after, validations[-1]))
            if v.other is not None
        ]
    for when, stored, found in ((when, stored, v.figures()) for when, stored, v in ends):
        pairs += [(f"{when}.step", stored.step, found.step), (f"{when}.overall", stored.overall, found.overall)]
        scenes = {**stored.scenes, **found.scenes}
        pairs += [(f"{when}.scenes.{name}", stored.scenes.get(name), found.scenes.get(name)) for name in scenes]
    for name, value, expected in pairs:
        if not same(value, expected):
            return f"summary.json: {name} = {value}; expected {expected} by validation.jsonl; one of the files is damaged"
    return None


def same(a: float | None, b: float | None) -> bool:
    """Whether two scores are equal up to rounding."""
    return a == b if a is None or b is None else abs(a - b) <= _CLOSE


# --- traces and metrics.jsonl ----------------------------------------------------------------------------------------------------


class Credit(TypedDict):
    """Of a turn, as `types.TurnCredit`."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    outcome: Score
    turn: Score
    advantage: Score


class TraceTurn(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    reasoning: str | None
    reply: str
    message: str
    reward: Score | None
    info: dict[str, float | int | str]
    credit: NotRequired[Credit | None]
    faults: list[str]
    completion_tokens: int
    dropped_exchanges: int


class Failed(TypedDict):
    kind: str
    message: str


class Trace(TypedDict):
    """An episode as `rollout/traces.py` writes it, as far as it is read."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    task: str
    tag: str
    group: int
    rollout: int
    outcome: Score | None
    failure: Failed | None
    opening: str
    info: dict[str, float | int | str]
    turns: list[TraceTurn]


_TRACE = TypeAdapter(Trace)


def read_traces(files: Iterable[Path], *, whole_only: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Episodes of one step or validation, by group and rollout, as `Trace`; and the problems of the files. `whole_only` skips an
    incomplete last line, which a run that is writing leaves."""
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for file in files:
        episodes, bad = collect_records(file, _trace, whole_only=whole_only)
        found, problems = once_each(file, [*found, *episodes], _place, "episode (group {}, rollout {})", [*problems, *bad])
    return found, problems


def _trace(record: Any) -> dict[str, Any]:
    episode = _TRACE.validate_python(record)
    if (episode["outcome"] is None) != (episode["failure"] is not None):
        raise ValueError("an episode has either an outcome or a failure")
    return dict(episode)


def _place(episode: Mapping[str, Any]) -> tuple[int, int]:
    return episode["group"], episode["rollout"]


def numbers_by_turn(episode: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of its info by name: at the start and after each turn; those that all of them have."""
    infos = [episode["info"], *(turn["info"] for turn in episode["turns"])]
    paths = {name: [info.get(name, "") for info in infos] for name in episode["info"]}
    return {name: path for name, path in paths.items() if not any(isinstance(value, str) for value in path)}


def read_metrics(file: Path, *, whole_only: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Metrics by step, without duplicates and with None for values that are not finite; and the problems of the file. `whole_only`
    skips an incomplete last line, which a killed run leaves."""
    found, problems = collect_records(file, _metrics, whole_only=whole_only)
    return once_each(file, found, lambda metrics: metrics["step"], "step {}", problems)


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"step = {step!r}; expected an integer")
    for name, value in record.items():
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}; expected a number")
    return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}
