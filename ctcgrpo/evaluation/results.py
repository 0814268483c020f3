"""The results of an evaluation: one per dialogue, and their summary. Pure, and independent of Inspect.

results.jsonl   a Result a line
summary.json    what `summarise` makes of them: means over scenarios, with intervals
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.benches import BENCHES, Bench
from ctcgrpo.run.folders import require_folder
from ctcgrpo.run.run_records import same
from ctcgrpo.run.scores import STRICT
from ctcgrpo.util.files import explained, read_json, read_json_lines, write_whole
from ctcgrpo.util.intervals import interval, means, share_interval

RESULTS, SUMMARY = "results.jsonl", "summary.json"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a dialogue. `state`: the user's state after it, by axis; `why`: the reason of its change. Both are empty for the
    model's lines."""

    speaker: Literal["model", "user"]
    text: str
    state: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Result:
    """One dialogue, or set of answers. `score` is None exactly where `failure` says why there is none: its `kind` and the message.
    `tokens` are those that each role took (input, output)."""

    scenario: str
    repeat: int
    group: str
    score: float | None
    measures: Mapping[str, float] = field(default_factory=dict)
    failure: tuple[str, str] | None = None
    lines: tuple[Line, ...] = ()
    tokens: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    __pydantic_config__ = ConfigDict(extra="forbid")


_RESULT = TypeAdapter(Result)


class _Figures(BaseModel):
    model_config = STRICT
    mean: float | None
    ci95: Annotated[tuple[float, float], Field(strict=False)] | None
    n: int


class _Skipped(BaseModel):
    """Invalid records of the data set, which were left out."""

    model_config = STRICT
    count: int
    records: int


class _Summary(BaseModel):
    """The fields of a summary that comparisons and leaderboards read."""

    model_config = STRICT
    bench: str
    model: str
    other: dict[str, Any] | None
    task: dict[str, Any]
    generation: dict[str, Any]
    data_set: str | None = None
    skipped: _Skipped | None = None
    score: _Figures
    groups: dict[str, _Figures]
    scenarios: dict[str, float]
    group_of: dict[str, str]
    failed: int
    failures: dict[str, int]


def figures(values: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The mean over scenarios, their number, and the 95 % interval with two or more. None where undefined."""
    by_scenario = list(means(values).values())
    n = len(by_scenario)
    return {"mean": sum(by_scenario) / n if n else None, "ci95": list(interval(by_scenario)) if n > 1 else None, "n": n}


def summarise(bench: Bench, results: Sequence[Result], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of an evaluation. `facts` are what else decides its figures: model, simulator or judge, settings, versions; with
    `prices` by role, for a million tokens, and where known the tokens `used` by role, those of repeated dialogues too."""
    scored = [r for r in results if r.score is not None]
    measures = {}
    for name in bench.measures:
        values = [(r.scenario, r.measures[name]) for r in scored if name in r.measures]
        measures[name] = figures(values)
        if name not in bench.means and values:
            measures[name]["count"] = int(sum(value for _, value in values))
            by_scenario = list(means(values).values())
            if set(by_scenario) <= {0.0, 1.0}:  # a bootstrap of equal values has no width
                measures[name]["ci95"] = list(share_interval(int(sum(by_scenario)), len(by_scenario)))
    failures = Counter(r.failure[0] for r in results if r.failure is not None)
    used = facts.get("used", {})
    tokens = {role: {"input": 0, "output": 0} for role in sorted({*used, *(role for r in results for role in r.tokens)})}
    for role, (read, written) in (spent for r in results for spent in r.tokens.items()):
        tokens[role]["input"] += read
        tokens[role]["output"] += written
    for role, (read, written) in used.items():
        tokens[role] = {"input": max(read, tokens[role]["input"]), "output": max(written, tokens[role]["output"])}
    return {
        "bench": bench.name,
        **facts,
        "score": figures(_scores(scored)),
        "groups": {
            group: {
                **figures(_scores([r for r in scored if r.group == group])),
                "failed": sum(r.group == group and r.score is None for r in results),
            }
            for group in dict.fromkeys(r.group for r in results)
        },
        "measures": measures,
        "results": len(results),
        "failed": len(results) - len(scored),
        "failures": dict(failures),
        "reasons": reasons(results),
        "tokens": tokens,
        "cost": {
            role: {
                "money": (tokens[role]["input"] * price["input"] + tokens[role]["output"] * price["output"]) / 1e6,
                "currency": price["currency"],
            }
            for role, price in facts.get("prices", {}).items()
            if role in tokens
        },
        "scenarios": means(_scores(scored)),
        "group_of": {r.scenario: r.group for r in results},
    }


def reasons(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The reasons of failures, similar ones together, the most frequent first: kind, count, and one example."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, message in (r.failure for r in results if r.failure is not None):
        groups.setdefault((kind, re.sub(r"\d+", "#", message)), []).append(message)
    found = [{"kind": kind, "count": len(messages), "example": messages[0]} for (kind, _), messages in groups.items()]
    return sorted(found, key=lambda reason: -reason["count"])


def _scores(results: Sequence[Result]) -> list[tuple[str, float]]:
    return [(r.scenario, r.score) for r in results if r.score is not None]


def write_results(folder: Path, results: Sequence[Result], summary: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULTS, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in results))
    write_whole(folder / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """Raises OutputError for a folder that holds no evaluation."""
    file = folder / SUMMARY
    if not file.exists():
        require_folder(folder)
        resumed = "; the command that began it resumes it" if (folder / "evaluation.json").exists() else ""
        raise OutputError(f"{folder}: no {SUMMARY}; expected a finished evaluation{resumed or _evaluations_in(folder)}")
    found = read_json(file)
    summary: dict[str, Any] = found if isinstance(found, dict) else {}
    known = isinstance(bench := summary.get("bench"), str) and bench in BENCHES
    missing = [name for name, part in _Summary.model_fields.items() if part.is_required() and name not in summary]
    if not known or missing:
        detail = f" (it lacks {missing[0]})" if known else ""
        hint = _evaluations_in(folder) or "; `ctcgrpo evaluate` writes one"
        raise OutputError(f"{file}: expected the summary of an evaluation{detail}{hint}")
    try:
        _refuse_contradiction(_Summary.model_validate(summary))
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; the file is damaged") from None
    except ValueError as error:
        raise OutputError(f"{file}: {error}; it is damaged") from None
    return summary


def _refuse_contradiction(summary: _Summary) -> None:
    """Raises ValueError where means and intervals are not those of the scenarios in the same file, or `failed` is not the sum of
    `failures`."""
    if lacking := next((name for name in summary.scenarios if name not in summary.group_of), None):
        raise ValueError(f"group_of lacks scenario {lacking!r}")
    scores: dict[str, list[float]] = {group: [] for group in summary.groups}
    for name, score in summary.scenarios.items():
        scores.setdefault(summary.group_of[name], []).append(score)
    checked: dict[str, tuple[_Figures | None, list[float]]] = {"score": (summary.score, list(summary.scenarios.values()))}
    checked |= {f"groups.{group}": (summary.groups.get(group), values) for group, values in scores.items()}
    for name, (found, values) in checked.items():
        mean = sum(values) / len(values) if values else None
        if found is None or found.n != len(values) or not same(found.mean, mean):
            recorded = None if found is None else found.mean
            raise ValueError(f"{name}.mean = {recorded}; the mean of its {len(values)} scenarios is {mean}")
        spread = interval(values) if len(values) > 1 else (None, None)
        if not all(map(same, found.ci95 or (None, None), spread)):
            raise ValueError(f"{name}.ci95 = {found.ci95}; expected {spread} by its {len(values)} scenarios")
    if summary.failed != (expected := sum(summary.failures.values())):
        raise ValueError(f"failed = {summary.failed}; the sum of failures is {expected}")


def _evaluations_in(folder: Path) -> str:
    """A clause that names the evaluations inside a folder, a run's for example."""
    found = sorted(str(file.parent) for file in folder.rglob(RESULTS))
    return f"; it holds the evaluations {', '.join(found)}" if found else ""


def read_results(folder: Path) -> list[Result]:
    """Raises OutputError for a file that is not there or holds something else, and for one that holds a dialogue twice."""
    file = folder / RESULTS
    results = []
    for place, row in read_json_lines(file):
        try:
            results.append(_result(row))
        except ValueError as error:
            problem = explained(error) if isinstance(error, ValidationError) else error
            raise OutputError(f"{place}: invalid result: {problem}") from None
    if twice := [key for key, n in Counter((r.scenario, r.repeat) for r in results).items() if n > 1]:
        raise OutputError(f"{file}: duplicate dialogue of scenario {twice[0][0]!r}, repeat {twice[0][1]}")
    return results


def _result(row: dict[str, Any]) -> Result:
    """Raises ValueError, ValidationError being one, for what is no result."""
    result = _RESULT.validate_python(row)
    if result.failure is None and not math.isfinite(result.score or 0.0):
        raise ValueError(f"score = {result.score}; expected a finite number")
    if (result.score is None) != (result.failure is not None):
        raise ValueError("expected either a score or a failure")
    return result
