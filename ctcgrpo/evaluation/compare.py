"""Two or more evaluations of one benchmark, scenario by scenario: the paired difference to the first, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.played import in_words, settings_of, shown_name, shown_value, title_of
from ctcgrpo.evaluation.report import other_of
from ctcgrpo.evaluation.results import RESULTS, SUMMARY, Result, read_results, read_summary
from ctcgrpo.util.intervals import interval, paired

_DECIDING = ("other", "data")
"""What of a summary figures depend on, beside the model and the settings: who plays or judges, and a digest of the data."""
_MEANING = ("variant", "rounds", "instructions")
"""Settings without which two scores mean other things; how a model is sampled may be what is compared."""


def compared(folders: Sequence[Path], names: Sequence[str] | None = None, *, mixed: bool = False) -> dict[str, Any]:
    """The comparison of evaluations with the first: `baseline`, `others` (each with what it was and is over the scenarios that
    both have, the paired difference, its 95 % interval, and the same by group), `other` (who played the simulator or the judge),
    `title` with the data set, `settings` that all of them share, and `warnings` of what else differs between them.

    Raises OutputError for fewer than two, for folders that hold no evaluation, for different benchmarks or no scenario in common,
    and, unless they may be `mixed`, for another simulator, judge, scoring variant, number of rounds or instructions: such scores
    mean other things.
    """
    if len(folders) < 2:
        raise OutputError("name at least two evaluations to compare")
    summaries = [read_summary(folder) for folder in folders]
    names = list(names or _names(folders, summaries))
    first, *others = summaries
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["bench"] != first["bench"]:
            raise OutputError(
                f"{folders[0]} is of {first['bench']}, {folder} of {summary['bench']}: their scores mean other things"
            )
        if not mixed and (told := _meaning(summary)) != _meaning(first):
            raise OutputError(
                f"{folders[0]} was scored by {_meaning(first)}, {folder} by {told}: their scores mean other things (--mixed "
                "compares them all the same)"
            )
    return {
        "bench": first["bench"],
        "title": " / ".join(dict.fromkeys(map(title_of, summaries))),
        "settings": in_words(_shared(summaries)) or "none in common",
        "other": " / ".join(dict.fromkeys(map(other_of, summaries))),
        "baseline": {"name": names[0], "folder": str(folders[0])},
        "others": [
            _against(first, summary, folders[0], folder, name)
            for summary, folder, name in zip(others, folders[1:], names[1:], strict=True)
        ],
        "warnings": _warnings(names, summaries),
    }


def _meaning(summary: Mapping[str, Any]) -> str:
    settings = settings_of(summary)
    return ", ".join([other_of(summary), *(f"{name} {settings[name]}" for name in _MEANING if name in settings)])


def _shared(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that are the same in all."""
    first, *others = map(settings_of, summaries)
    return {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}


def _against(first: Mapping[str, Any], other: Mapping[str, Any], a: Path, b: Path, name: str) -> dict[str, Any]:
    differences = paired(first["scenarios"], other["scenarios"])
    if not differences:
        raise OutputError(f"{a} and {b} have no scored scenario in common")
    groups: dict[str, list[str]] = {}
    for scenario in differences:
        groups.setdefault(first["group_of"][scenario], []).append(scenario)

    def row(scenarios: Sequence[str]) -> dict[str, Any]:
        found = [differences[s] for s in scenarios]
        return {
            "was": sum(first["scenarios"][s] for s in scenarios) / len(scenarios),
            "mean": sum(other["scenarios"][s] for s in scenarios) / len(scenarios),
            "difference": sum(found) / len(found),
            "ci95": list(interval(found)) if len(found) > 1 else None,
            "n": len(found),
        }

    return {
        "name": name,
        "folder": str(b),
        **row(list(differences)),
        "groups": {group: row(scenarios) for group, scenarios in groups.items()},
        "by_scenario": differences,
    }


def _names(folders: Sequence[Path], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Models where they differ, else folders."""
    models = [summary["model"] for summary in summaries]
    return models if len(set(models)) == len(models) else [str(folder) for folder in folders]


def _warnings(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    first = summaries[0]
    for name, summary in zip(names[1:], summaries[1:], strict=True):
        for part in _DECIDING:
            if summary.get(part) != first.get(part):
                found.append(f"{part} differs: {names[0]} has {_short(first.get(part))}, {name} {_short(summary.get(part))}")
        ours, theirs = settings_of(first), settings_of(summary)
        found += [
            f"{shown_name(key)} differs: {names[0]} has {_short(shown_value(key, ours.get(key)))}, "
            f"{name} {_short(shown_value(key, theirs.get(key)))}"
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key)
        ]
        missing = len(set(first["scenarios"]) ^ set(summary["scenarios"]))
        if missing:
            found.append(f"{missing} scenarios are scored in one of {names[0]} and {name} only, and are left out")
    return found


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 200 else str(value)[:200] + "..."


def most_changed(found: Mapping[str, Any], most: int = 3) -> list[dict[str, Any]]:
    """For each evaluation beside the first, the scenarios that changed most, in both directions, and a dialogue of each side: the
    one whose score is closest to its scenario's mean. Raises OutputError where results are missing."""
    shown = []
    before = _by_scenario(read_results(Path(found["baseline"]["folder"])))
    for other in found["others"]:
        after = _by_scenario(read_results(Path(other["folder"])))
        ranked = sorted(other["by_scenario"], key=lambda s: other["by_scenario"][s])
        worst = [s for s in ranked[:most] if other["by_scenario"][s] < 0]
        best = [s for s in reversed(ranked[-most:]) if other["by_scenario"][s] > 0]
        for scenario in dict.fromkeys([*best, *worst]):
            shown.append(
                {
                    "other": other["name"],
                    "scenario": scenario,
                    "difference": other["by_scenario"][scenario],
                    "before": _typical(before, scenario, found["baseline"]["folder"]),
                    "after": _typical(after, scenario, other["folder"]),
                }
            )
    return shown


def _by_scenario(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.score is not None:
            found.setdefault(result.scenario, []).append(result)
    return found


def _typical(by_scenario: Mapping[str, Sequence[Result]], scenario: str, folder: str) -> Result:
    results = by_scenario.get(scenario)
    if not results:
        raise OutputError(
            f"{folder}: {RESULTS} holds no scored dialogue of {scenario!r}, which {SUMMARY} has; one is damaged"
        )
    scores = [r.score or 0.0 for r in results]
    mean = sum(scores) / len(scores)
    return min(results, key=lambda r: abs((r.score or 0.0) - mean))
