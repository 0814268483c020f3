"""Compares evaluations of one benchmark, scenario by scenario, by the paired difference to the first with its interval. Ranks
many evaluations, in separate boards for different data, simulator or judge, and settings.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.benches import named
from ctcgrpo.evaluation.played import in_words, settings_of, shown_name, shown_value, title_of
from ctcgrpo.evaluation.report import other_of
from ctcgrpo.evaluation.results import RESULTS, SUMMARY, Result, read_results, read_summary
from ctcgrpo.run.folders import require_folder
from ctcgrpo.util.intervals import interval, paired
from ctcgrpo.util.naming import cut

_DECIDING = ("other", "data")
"""Keys of a summary that decide its figures, beside model and settings: simulator or judge, and a digest of the data."""
_MEANING = ("variant", "rounds", "instructions")
"""Settings that define what a score means. Sampling is not among them: it may be the subject of a comparison."""


def compared(folders: Sequence[Path], names: Sequence[str] | None = None, *, mixed: bool = False) -> dict[str, Any]:
    """The comparison of evaluations with the first: `baseline`, `others` (for each both scores over the scenarios in common, the
    paired difference, its 95 % interval, and the same by group), `other` (simulator or judge), `title` with the data set,
    `settings` in common, and `warnings` of other differences. Raises OutputError for fewer than two, folders without an
    evaluation, different benchmarks, and no scenario in common. Unless `mixed`, it also raises for another simulator, judge,
    scoring variant, number of rounds or instructions."""
    if len(folders) < 2:
        raise OutputError("expected at least two evaluations to compare")
    summaries = [read_summary(folder) for folder in folders]
    if names is None:  # models where they differ, else folders
        models = [summary["model"] for summary in summaries]
        names = models if len(set(models)) == len(models) else [str(folder) for folder in folders]
    first, *others = summaries
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["bench"] != first["bench"]:
            unlike = f"different benchmarks: {folders[0]} is {first['bench']}, {folder} is {summary['bench']}"
            raise OutputError(f"{unlike}; expected evaluations of one benchmark")
        both = _meaning(first), _meaning(summary)
        if not mixed and (differing := [name for name in both[0] | both[1] if both[0].get(name) != both[1].get(name)]):
            has = [", ".join(f"{name} {meant.get(name, 'not set')}" for name in differing) for meant in both]
            raise OutputError(
                f"different {' and '.join(differing)}: {folders[0]} has {has[0]}; {folder} has {has[1]}; evaluate both alike, or "
                "compare them anyway with --mixed"
            )
    settings, *theirs = map(settings_of, summaries)
    shared = {key: value for key, value in settings.items() if all(key in o and o[key] == value for o in theirs)}
    return {
        "bench": first["bench"],
        "title": " / ".join(dict.fromkeys(map(title_of, summaries))),
        "settings": in_words(shared) or "none in common",
        "other": " / ".join(dict.fromkeys(map(other_of, summaries))),
        "baseline": {"name": names[0], "folder": str(folders[0])},
        "others": [
            _against(first, summary, folders[0], folder, name)
            for summary, folder, name in zip(others, folders[1:], names[1:], strict=True)
        ],
        "warnings": _warnings(names, summaries),
    }


def _meaning(summary: Mapping[str, Any]) -> dict[str, Any]:
    settings = settings_of(summary)
    other = {named(summary["bench"]).other: other_of(summary)}
    return other | {shown_name(name): settings[name] for name in _MEANING if name in settings}


def _against(first: Mapping[str, Any], other: Mapping[str, Any], a: Path, b: Path, name: str) -> dict[str, Any]:
    differences = paired(first["scenarios"], other["scenarios"])
    if not differences:
        raise OutputError(f"{a} and {b}: no scored scenario in common; expected at least one")
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


def _warnings(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    first = summaries[0]
    ours = settings_of(first)
    for name, summary in zip(names[1:], summaries[1:], strict=True):
        theirs = settings_of(summary)
        pairs = [(part, first.get(part), summary.get(part)) for part in _DECIDING if summary.get(part) != first.get(part)]
        pairs += [
            (shown_name(key), shown_value(key, ours.get(key)), shown_value(key, theirs.get(key)))
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key)
        ]
        found += [f"{part} differs: {names[0]} has {cut(str(a))}, {name} {cut(str(b))}" for part, a, b in pairs]
        if missing := len(set(first["scenarios"]) ^ set(summary["scenarios"])):
            found.append(f"scenarios left out, since only one of {names[0]} and {name} has a score for them: {missing}")
    return found


def most_changed(found: Mapping[str, Any], most: int = 3) -> list[dict[str, Any]]:
    """For each evaluation beside the first, the scenarios with the largest changes in both directions, with a dialogue of each
    side: the one whose score is closest to its scenario's mean. Raises OutputError where results are missing."""
    shown = []
    baseline = found["baseline"]["folder"]
    before = read_results(Path(baseline))
    for other in found["others"]:
        after = read_results(Path(other["folder"]))
        difference = other["by_scenario"]
        ranked = sorted(difference, key=lambda scenario: difference[scenario])
        worst = [scenario for scenario in ranked[:most] if difference[scenario] < 0]
        best = [scenario for scenario in reversed(ranked[-most:]) if difference[scenario] > 0]
        shown += [
            {
                "other": other["name"],
                "scenario": scenario,
                "difference": difference[scenario],
                "before": _typical(before, scenario, baseline),
                "after": _typical(after, scenario, other["folder"]),
            }
            for scenario in dict.fromkeys([*best, *worst])
        ]
    return shown


def _typical(results: Sequence[Result], scenario: str, folder: str) -> Result:
    scored = [(result, result.score) for result in results if result.scenario == scenario and result.score is not None]
    if not scored:
        raise OutputError(f"{folder}: {RESULTS} has no scored dialogue of {scenario!r}, which {SUMMARY} has; one is damaged")
    mean = sum(score for _, score in scored) / len(scored)
    return min(scored, key=lambda pair: abs(pair[1] - mean))[0]


def ranked(folder: Path) -> list[dict[str, Any]]:
    """A board for each benchmark and its settings: `bench`, `title` (with the data set), `other` (simulator or judge), `settings`,
    `groups`, and `entries` from the best to the worst. Raises OutputError for a folder without an evaluation, and for one that
    cannot be read."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(require_folder(folder).rglob(SUMMARY)):
        if not (file.parent / RESULTS).exists():
            continue  # a summary of something else, such as a run
        summary = read_summary(file.parent)
        if summary["score"]["mean"] is not None:
            data = summary.get("data") or summary.get("data_set")
            settings = {name: value for name, value in settings_of(summary).items() if name != "rescored"}
            key = json.dumps([summary["bench"], summary["other"], data, settings], sort_keys=True)
            found.setdefault(key, []).append(summary)
    if not found:
        raise OutputError(f"{folder}: no evaluation in it; expected at least one; make one with `ctcgrpo evaluate`")
    return [_board(entries) for _, entries in sorted(found.items())]


def _board(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    best, *_ = ordered = sorted(summaries, key=lambda summary: -summary["score"]["mean"])
    return {
        "bench": best["bench"],
        "other": other_of(best),
        "title": title_of(best),
        "settings": in_words(settings_of(best)),
        "groups": list(dict.fromkeys(group for summary in ordered for group in summary["groups"])),
        "entries": [
            {
                "model": summary["model"],
                "score": summary["score"],
                "groups": {g: f["mean"] for g, f in summary["groups"].items() if f["mean"] is not None},
                "failed": summary["failed"],
            }
            for summary in ordered
        ],
    }
