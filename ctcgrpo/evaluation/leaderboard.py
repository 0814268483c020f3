"""Many evaluations ranked: a board for each benchmark and each way of playing it, since a score under another simulator, judge or
scoring variant means another thing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.report import other_of
from ctcgrpo.evaluation.results import SUMMARY, read_summary


def ranked(folder: Path) -> dict[str, Any]:
    """`boards`, each with its benchmark, `other` (simulator or judge), `settings`, `groups`, and `entries` from the best to the
    worst. Raises OutputError where there is no evaluation below the folder."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for file in sorted(folder.rglob(SUMMARY)):
        try:
            summary = read_summary(file.parent)
        except OutputError:
            continue  # of a run's training, and the like
        if summary["score"]["mean"] is not None:
            found.setdefault((summary["bench"], other_of(summary), _settings(summary)), []).append(summary)
    if not found:
        raise OutputError(f"there is no evaluation below {folder}; `ctcgrpo evaluate` makes them")
    return {"boards": [_board(*key, entries) for key, entries in sorted(found.items())]}


def _settings(summary: Mapping[str, Any]) -> str:
    """What of the task's arguments decides what a score means."""
    task = {
        name: value for name, value in summary["task"].items() if name not in ("simulator", "seed") and value is not None
    }
    limit = {"limit": summary["limit"]} if summary.get("limit") else {}
    return ", ".join(f"{name} {value}" for name, value in {**task, **limit}.items()) or "defaults"


def _board(bench: str, other: str, settings: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(summaries, key=lambda summary: -summary["score"]["mean"])
    groups = list(dict.fromkeys(group for summary in ordered for group in summary["groups"]))
    return {
        "bench": bench,
        "other": other,
        "settings": settings,
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
