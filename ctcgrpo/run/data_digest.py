"""Digests of a run's data and starting model, with which a resumed run detects changes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import RecipeError
from ctcgrpo.types import Task
from ctcgrpo.util.files import file_digest

_LOADED = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Weights, configurations, tokenizers and templates."""

SKIPPED = "skipped"  # key in data.json of invalid records: place -> problem
COMMITS = "commits"  # key in data.json of data sets on the Hub: recipe field -> commit


def scenarios_digest(scenarios: Sequence[Scenario]) -> dict[str, str]:
    """By id, in the order in which they are played: 12 hexadecimal digits of the whole record."""
    names = [field.name for field in fields(Scenario)]
    return {scenario.id: _digest({name: getattr(scenario, name) for name in names}) for scenario in scenarios}


def tasks_digest(tasks: Sequence[Task]) -> dict[str, str]:
    """By id, in order: 12 hexadecimal digits of the whole task."""
    return {task.id: _digest(task.data) for task in tasks}


def folder_digest(folder: Path) -> dict[str, str]:
    """By name: 12 hexadecimal digits of each file of a local model that is loaded; notes and cards beside them are not."""
    files = sorted({file for pattern in _LOADED for file in folder.glob(pattern) if file.is_file()})
    return {file.name: file_digest(file) for file in files}


def data_changes(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Differences between two records of digests, by subject: removed, added, altered, reordered. Skipped records (SKIPPED) are not
    part of the run's data and may change, and so may commits (COMMITS) with the same records."""
    changes = []
    for subject in dict.fromkeys([*old, *new]):
        if subject in (SKIPPED, COMMITS):
            continue
        before, after = old.get(subject, {}), new.get(subject, {})
        if not isinstance(before, Mapping):  # of a file that was edited
            changes.append(f"{subject}: recorded as {str(before)[:40]!r}; expected digests by name")
            continue
        sets = {
            "removed": [k for k in before if k not in after],
            "added": [k for k in after if k not in before],
            "altered": [k for k in after if k in before and after[k] != before[k]],
        }
        shown = {how: ", ".join([*names[:3], *["..."] * (len(names) > 3)]) for how, names in sets.items() if names}
        found = [f"{len(sets[how])} {how} ({names})" for how, names in shown.items()]
        if not found and list(before) != list(after):
            found = ["reordered"]
        if found:
            changes.append(f"{subject}: {', '.join(found)}{_at_commits(old, new, subject)}")
    return changes


def refuse_other_commits(main: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises RecipeError where this process reads a data set at another commit than the main process: a branch moved in between."""
    if field := next((field for field in main if here.get(field) != main[field]), None):
        commits = f"the main process read commit {main[field]}, another process {here.get(field)}"
        raise RecipeError(f"{field}: {commits}; expected the same; try {field}=hf://datasets/NAME@{main[field]}")


def moved_commits(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Data sets on the Hub that are at another commit than before, with the same records."""
    moved = [field for field in new.get(COMMITS, {}) if _at_commits(old, new, field) and old.get(field) == new.get(field)]
    return [f"{field}: another commit with the same records{_at_commits(old, new, field)}" for field in moved]


def _at_commits(old: Mapping[str, Any], new: Mapping[str, Any], field: str) -> str:
    before, after = (found.get(COMMITS) for found in (old, new))
    then, now = (found.get(field) if isinstance(found, Mapping) else None for found in (before, after))
    if then == now or not isinstance(then, str):
        return ""
    at = f", and the Hub's is {now}" if now else ""
    return f" (the run began with commit {then[:40]}{at}; try {field}=hf://datasets/NAME@{then[:40]})"


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(record), sort_keys=True, default=str).encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
