"""The metrics of a run, from metrics.yaml: what each means, its healthy range, and what to try otherwise.

A test compares that table with the metrics of a real run and with the names in the code.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ctcgrpo.environments.eibench.records import SCENE_NAME
from ctcgrpo.errors import EPISODE_ERRORS, RecipeError
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.strict_yaml import load_yaml

_STANDS_FOR = {
    "scene": SCENE_NAME.strip("^$"),
    "kind": "|".join(error.kind for error in EPISODE_ERRORS),
    "turns": r"\d+",
    "number": r"\w+",
    "user": r"[^/]+",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """`healthy`: values of a run that learns. `otherwise`: what to look at or change when they are not. Both may be empty."""

    name: str
    meaning: str
    healthy: str = ""
    otherwise: str = ""


@cache
def all_groups() -> dict[str, list[Metric]]:
    table = load_yaml((files("ctcgrpo.reference") / "metrics.yaml").read_text(encoding="utf-8"))
    return {group: [Metric(**entry) for entry in entries] for group, entries in table.items()}


def all_metrics() -> list[Metric]:
    return [metric for group in all_groups().values() for metric in group]


def entry_of(name: str) -> Metric | None:
    """The entry for a logged name (outcome/charm) or for a name of the table itself (outcome/{scene}); None without one."""
    exact = next((metric for metric in all_metrics() if name == metric.name), None)
    return exact or next((metric for metric in all_metrics() if _pattern(metric.name).fullmatch(name)), None)


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile("".join(f"(?:{_STANDS_FOR[p]})" if k % 2 else re.escape(p) for k, p in enumerate(parts)))


def select(name: str | None) -> dict[str, list[Metric]]:
    """The groups and metrics that a name means: None for all, a metric, or what stands before its slash ("packing"). Raises
    RecipeError for a name that there is not."""
    if name is None:
        return all_groups()
    one = entry_of(name)
    meant = {
        group: [metric for metric in metrics if metric is one or metric.name.startswith(f"{name}/")]
        for group, metrics in all_groups().items()
    }
    if found := {group: metrics for group, metrics in meant.items() if metrics}:
        return found
    known = {part for metric in all_metrics() for part in (metric.name, metric.name.partition("/")[0])}
    raise RecipeError(f"unknown metric {name!r}; {did_you_mean(name, known)}")
