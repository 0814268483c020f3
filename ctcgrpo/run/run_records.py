"""What a run's folder says was measured, read strictly: summary.json, validation.jsonl, metrics.jsonl, simulator.json, traces.

A folder may have been cut off, edited or damaged. A file that is one document raises OutputError with file, field and value where
it is not as a run wrote it. Of a file of lines, bad ones are left out, and the reader is given what is wrong with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ctcgrpo.errors import OutputError
from ctcgrpo.run.validation import Validation, improvement
from ctcgrpo.util.files import by_step, collect_records, explained, read_json
from ctcgrpo.util.intervals import means

STRICT = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
_OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_CLOSE = 1e-9
_T = TypeVar("_T")

Score = Annotated[float, Field(allow_inf_nan=False)]


# --- summary.json ----------------------------------------------------------------------------------------------------------------


class Figures(BaseModel):
    """Of one validation; `overall` is None where no episode was valid."""

    model_config = STRICT
    overall: Score | None
    scenes: dict[str, Score]
    n: int
    step: int | None = None


class Improvement(BaseModel):
    """Without figures where no scenario has a valid episode before and after; `n` counts scenarios."""

    model_config = STRICT
    overall: Score | None
    ci95: Annotated[tuple[Score, Score], Field(strict=False)] | None
    n: int | None = None


class Settings(TypedDict):
    """What scores depend on beside policy and simulator, as `played.validation_settings` names it; more than is checked here."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    data_set: str


class Summary(BaseModel):
    """As `Validator.summary` writes it for a run with a validation section; `simulator` is what the server said of itself,
    `environment` the factory of an environment of one's own, in place of `simulator`, `scoring_variant` and `settings`; `skipped`
    is the number of invalid records that were left out, by the field that names their set."""

    model_config = STRICT
    before: Figures
    after: Figures
    improvement: Improvement
    scoring_variant: str = "training"
    simulator: dict[str, Any] = {}
    settings: Settings | None = None
    environment: str | None = None
    skipped: dict[str, int] = {}


class _Overall(BaseModel):
    model_config = STRICT
    overall: Score


class Outcome(BaseModel):
    """As much of summary.json as a sweep needs."""

    model_config = STRICT
    after: _Overall


_M = TypeVar("_M", bound=BaseModel)


def read_summary(run: Path, model: type[_M]) -> _M | None:
    """summary.json of a run as `Summary` or `Outcome`; None where there is none. Raises OutputError for another content."""
    file = run / "summary.json"
    if not file.exists():
        return None
    found = read_json(file)
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; it is not as a run wrote it") from None


def disagreement(summary: Summary, validations: Sequence[Validation]) -> str | None:
    """What summary.json and validation.jsonl, from which it was computed, say differently; None where they agree, or there is no
    validation to compare with."""
    if not validations:
        return None
    gain = improvement(validations[0], validations[-1])
    pairs = [("improvement.overall", summary.improvement.overall, gain["overall"])]
    for end, said, computed in zip(
        ("low", "high"), summary.improvement.ci95 or (None, None), gain["ci95"] or (None, None), strict=True
    ):
        pairs.append((f"improvement.ci95 ({end})", said, computed))
    for when, told, found in (("before", summary.before, validations[0]), ("after", summary.after, validations[-1])):
        pairs.append((f"{when}.step", told.step, found.step if told.step is not None else None))
        scores = scores_of(found)
        pairs.append((f"{when}.overall", told.overall, scores.pop("overall", None)))
        pairs += [(f"{when}.scenes.{name}", told.scenes.get(name), scores.get(name)) for name in {**told.scenes, **scores}]
    for name, said, computed in pairs:
        if not same(said, computed):
            return f"summary.json: {name} = {said}; expected {computed} by validation.jsonl; one of the files is damaged"
    return None


def scores_of(validation: Validation) -> dict[str, float]:
    """The mean over scenarios: `overall`, and of each scene ("?" where the record names none); empty where no episode was valid."""
    by_scenario = validation.by_scenario
    return means(
        [
            *(("overall", mean) for mean in by_scenario.values()),
            *((validation.scenes.get(name, "?"), mean) for name, mean in by_scenario.items()),
        ]
    )


def same(a: float | None, b: float | None) -> bool:
    """Whether two figures are one, but for rounding."""
    return a == b if a is None or b is None else abs(a - b) <= _CLOSE


# --- files of lines --------------------------------------------------------------------------------------------------------------


class DialogueTurn(TypedDict):
    """As much of a turn as a person reads."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    reasoning: str | None
    reply: str
    message: str
    reward: Score | None
    info: dict[str, float | int | str]


class Credit(TypedDict):
    """Of a turn, as `types.TurnCredit`."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    outcome: Score
    turn: Score
    advantage: Score


class TraceTurn(DialogueTurn):
    """And what the turn was trained with, where it was."""

    credit: NotRequired[Credit | None]
    faults: list[str]
    completion_tokens: int
    dropped_exchanges: int


class Failed(TypedDict):
    kind: str
    message: str


class _Episode(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    task: str
    group: int
    rollout: int
    outcome: Score | None
    failure: Failed | None
    opening: str
    info: dict[str, float | int | str]


class Dialogue(_Episode):
    """As much of an episode as a person reads."""

    turns: list[DialogueTurn]


class Trace(_Episode):
    """An episode as `rollout/traces.py` writes it."""

    tag: str
    turns: list[TraceTurn]


_DIALOGUE, _TRACE = TypeAdapter(Dialogue), TypeAdapter(Trace)


def read_dialogues(files: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Episodes of one step or validation, by group and rollout, as `Dialogue`; and what is wrong with the other lines."""
    return _episodes(files, lambda record: _scored(_DIALOGUE.validate_python(record)))


def read_traces(files: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The same as `Trace`."""
    return _episodes(files, lambda record: _scored(_TRACE.validate_python(record)))


def numbers_by_turn(episode: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of its info by name: at the start and after each turn; those that all of them have."""
    infos = [episode["info"], *(turn["info"] for turn in episode["turns"])]
    names = [name for name, value in episode["info"].items() if not isinstance(value, str)]
    return {
        name: [info[name] for info in infos]
        for name in names
        if all(not isinstance(info.get(name, ""), str) for info in infos)
    }


def _episodes(files: Iterable[Path], read: Callable[[Any], dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    found: dict[tuple[int, int], dict[str, Any]] = {}
    problems: list[str] = []
    for file in files:
        episodes, bad = collect_records(file, read)
        problems += bad
        for episode in episodes:
            key = episode["group"], episode["rollout"]
            if key in found:
                problems.append(f"{file.name}: duplicate episode (group {key[0]}, rollout {key[1]}); the first one counts")
            found.setdefault(key, episode)
    return [found[key] for key in sorted(found)], problems


def read_metrics(file: Path, *, whole_only: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """By step, each once; what is not finite is None. And what is wrong with the other lines of the file. `whole_only` skips half a
    line at the end, which a killed run leaves."""
    found, problems = collect_records(file, _metrics, whole_only=whole_only)
    return by_step(file, found, lambda metrics: metrics["step"], problems)


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"step = {step!r}; expected an integer")
    for name, value in record.items():
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}; expected a number")
    return {name: value if value is not None and math.isfinite(value) else None for name, value in record.items()}


def _scored(episode: Any) -> dict[str, Any]:
    if (episode["outcome"] is None) != (episode["failure"] is not None):
        raise ValueError("an episode has either an outcome or a failure")
    return dict(episode)
