"""Many evaluations ranked: a board for each benchmark and each way of playing it, since a score on another data set,
under another simulator or judge, or with other settings means another thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.played import in_words, settings_of, title_of
from ctcgrpo.evaluation.report import other_of
from ctcgrpo.evaluation.results import RESULTS, SUMMARY, read_summary
from ctcgrpo.run.folders import require_folder


def ranked(folder: Path) -> list[dict[str, Any]]:
    """A board for each benchmark and way of playing it: its `bench`, `title` (with the data set), `other` (simulator or judge),
    `settings`, `groups`, and `entries` from the best to the worst. Raises OutputError where there is no evaluation below the
    folder, and for one that cannot be read."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(require_folder(folder).rglob(SUMMARY)):
        if not (file.parent / RESULTS).exists():
            continue  # of a run's training, and the like
        summary = read_summary(file.parent)
        if summary["score"]["mean"] is not None:
            data = summary.get("data") or summary.get("data_set")
            settings = {name: value for name, value in settings_of(summary).items() if name != "rescored"}
            key = json.dumps([summary["bench"], summary["other"], data, settings], sort_keys=True)
            found.setdefault(key, []).append(summary)
    if not found:
        raise OutputError(f"there is no evaluation below {folder}; `ctcgrpo evaluate` makes them")
    return [_board(entries) for _, entries in sorted(found.items())]


def _board(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(summaries, key=lambda summary: -summary["score"]["mean"])
    groups = list(dict.fromkeys(group for summary in ordered for group in summary["groups"]))
    return {
        "bench": ordered[0]["bench"],
        "other": other_of(ordered[0]),
        "title": title_of(ordered[0]),
        "settings": in_words(settings_of(ordered[0])),
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
