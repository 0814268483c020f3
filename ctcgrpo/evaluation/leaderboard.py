"""Many evaluations ranked: a board for each benchmark and each way of playing it, since a score under another simulator, judge or
scoring variant means another thing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.report import other_of
from ctcgrpo.evaluation.results import RESULTS, SUMMARY, read_summary
from ctcgrpo.folders import require_folder

_APART = ("simulator", "seed", "data", "scenarios", "rescored")
"""Arguments of a task that are told otherwise (by `other` and `data`), or that decide no score's meaning."""


def ranked(folder: Path) -> list[dict[str, Any]]:
    """A board for each benchmark and way of playing it: its `bench`, `other` (simulator or judge), `settings`, `groups`, and
    `entries` from the best to the worst. Raises OutputError where there is no evaluation below the folder, and for one that
    cannot be read."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(require_folder(folder).rglob(SUMMARY)):
        if not (file.parent / RESULTS).exists():
            continue  # of a run's training, and the like
        summary = read_summary(file.parent)
        if summary["score"]["mean"] is not None:
            key = json.dumps([summary["bench"], summary["other"], summary.get("data"), _settings(summary)], sort_keys=True)
            found.setdefault(key, []).append(summary)
    if not found:
        raise OutputError(f"there is no evaluation below {folder}; `ctcgrpo evaluate` makes them")
    return [_board(entries) for _, entries in sorted(found.items())]


def _settings(summary: Mapping[str, Any]) -> str:
    """What of the task's arguments decides what a score means."""
    task = {name: value for name, value in summary["task"].items() if name not in _APART and value is not None}
    limit = {"limit": summary["limit"]} if summary.get("limit") else {}
    return ", ".join(f"{name} {value}" for name, value in {**task, **limit}.items()) or "defaults"


def _board(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(summaries, key=lambda summary: -summary["score"]["mean"])
    groups = list(dict.fromkeys(group for summary in ordered for group in summary["groups"]))
    return {
        "bench": ordered[0]["bench"],
        "other": other_of(ordered[0]),
        "settings": _settings(ordered[0]),
        "groups": groups,
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
