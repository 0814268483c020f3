"""The table of a sweep: a row a trial, its seeds together, with an interval, from the best to the worst."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table
from rich.text import Text

from ctcgrpo.errors import OutputError
from ctcgrpo.intervals import crossed
from ctcgrpo.run_folder import RunFolder
from ctcgrpo.run_records import same
from ctcgrpo.validation import valid_validations

_STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped early",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def table_of(study: optuna.Study, folder: Path) -> list[dict[str, Any]]:
    """A row for each point: `params`, `score` (mean over seeds and held-out scenarios, after training), `ci95` (over both),
    `gain` over the untrained policy, `by_seed`, and what became of it. A trial that was left and asked for again stands once."""
    by_folder: dict[str, FrozenTrial] = {}
    for trial in study.trials:
        if name := trial.user_attrs.get("folder"):
            by_folder[name] = trial
    rows = [_row(name, trial, folder) for name, trial in by_folder.items()]
    return sorted(rows, key=lambda row: (row["score"] is None, -(row["score"] or 0.0), row["trial"]))


def _row(name: str, trial: FrozenTrial, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trial": name,
        "params": trial.params,
        "state": _STATES.get(trial.state, "failed"),
        "reason": trial.user_attrs.get("reason", ""),
        "score": None,
        "ci95": None,
        "gain": None,
        "by_seed": {},
    }
    if trial.state != TrialState.COMPLETE:
        return row
    seeds = trial.user_attrs["seeds"]
    try:
        found = [_scores(RunFolder(folder / name / f"seed-{seed}")) for seed in seeds]
    except OutputError as error:  # it was whole when the trial ended
        return row | {"state": "damaged", "reason": str(error)}
    after = [run[-1] for run in found]
    if not set.intersection(*map(set, after)):
        return row | {"state": "damaged", "reason": "its seeds have no scenario in common"}
    row["by_seed"] = {str(seed): sum(scores.values()) / len(scores) for seed, scores in zip(seeds, after, strict=True)}
    row["score"] = sum(row["by_seed"].values()) / len(seeds)
    row["ci95"] = list(crossed(after))
    before = [sum(run[0].values()) / len(run[0]) for run in found]
    row["gain"] = row["score"] - sum(before) / len(before)
    if trial.value is not None and not same(trial.value, row["score"]):
        row["reason"] = f"validation.jsonl has {row['score']:+.3f}, summary.json {trial.value:+.3f}: one is damaged"
    return row


def _scores(run: RunFolder) -> list[dict[str, float]]:
    """The mean of each held-out scenario, by validation, from the first to the last. Raises OutputError for damaged ones."""
    return [validation.by_scenario for validation in valid_validations(run.validation_file)]


_SAME = 5e-4
"""Scores within this are the same in the table."""


def all_equal(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a sweep found no difference: several trials came to their end, all with the same score."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    return len(scores) > 1 and max(scores) - min(scores) < _SAME


def printed(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Parameters that are the same in every row stand in no column."""
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    names = [name for name in names if len({json.dumps(row["params"].get(name)) for row in rows}) > 1 or len(rows) == 1]
    table = Table(title=Text(title))
    for name in ("trial", *names, "score", "95 % interval", "gain", "seeds", ""):
        table.add_column(Text(name), justify="right" if name in ("score", "95 % interval", "gain", "seeds") else "left")
    for row in rows:
        figures = ("-", "-", "-")
        if row["score"] is not None:
            figures = (f"{row['score']:+.3f}", f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}", f"{row['gain']:+.3f}")
        told = row["state"] if not row["reason"] else f"{row['state']}: {row['reason']}"
        cells = [_shown(row["params"].get(name)) for name in names]
        shown = (row["trial"], *cells, *figures, str(len(row["by_seed"]) or "-"), "" if told == "done" else told)
        table.add_row(*map(Text, shown))  # a reason is the last line of a log: text, never markup
    return table


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
