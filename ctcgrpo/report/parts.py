"""Sums over the episodes of one step or validation, from which charts and checks of a report are made.

A report adds the parts of all steps. A live report keeps them, and reads only the steps whose files changed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctcgrpo.run.run_records import numbers_by_turn, same
from ctcgrpo.types import turn_rewards
from ctcgrpo.util.intervals import means

Trace = dict[str, Any]  # run_records.Trace, with the keys kind and step
BINS = np.linspace(-3, 3, 25)  # edges of the histograms of advantages
Paths = Mapping[int, tuple[int, Sequence[float]]]
"""Numbers by turn, by length of the path: how many paths have that length, and their sum at the start and after each turn."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some advantages: a histogram over BINS, whose outermost bins count the values beyond them, and the moments."""

    counts: Sequence[int]
    n: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        return self.total / self.n

    @property
    def std(self) -> float:
        return float(max(0.0, self.squares / self.n - self.mean**2) ** 0.5)


@dataclass(frozen=True, slots=True)
class Part:
    """`kind` is step or validation. `valid` and `failures` (by kind) count episodes. `outcomes` (by task) and `scenes` (tags by
    task) are of the valid ones. `means`, `stds`: what metrics.jsonl should have, by its names. `states`: by tag and name.
    `by_turn`, `by_scene`: advantages. `wrong`: advantages that are not the sum of their terms. `trained` counts turns with
    credit."""

    kind: str
    step: int
    valid: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    outcomes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scenes: Mapping[str, str] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)
    stds: Mapping[str, float] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, Paths]] = field(default_factory=dict)
    by_turn: Mapping[int, Spread] = field(default_factory=dict)
    by_scene: Mapping[str, Spread] = field(default_factory=dict)
    wrong: Sequence[float] = ()
    trained: int = 0

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def episodes(self) -> int:
        return self.valid + self.failed


def part_of(kind: str, step: int, episodes: Sequence[Trace]) -> Part:
    """The part of the episodes of one step or validation."""
    valid = [e for e in episodes if e["failure"] is None]
    found = [(f"outcome/{name}", e["outcome"]) for e in valid for name in ("all", e["tag"])]
    found += [("reward/turn", r) for e in valid for r in turn_rewards([turn["reward"] for turn in e["turns"]])]
    outcomes: dict[str, list[float]] = {}
    for e in valid:
        outcomes.setdefault(e["task"], []).append(e["outcome"])
    credits = [(e["tag"], credit) for e in episodes if (credit := credit_of(e))]
    turns = [c for _, credit in credits for c in credit]
    return Part(
        kind=kind,
        step=step,
        valid=len(valid),
        failures=Counter(e["failure"]["kind"] for e in episodes if e["failure"] is not None),
        tags=frozenset(e["tag"] for e in episodes),
        outcomes=outcomes,
        scenes={e["task"]: e["tag"] for e in valid},
        means=means(found),
        stds={
            "credit/outcome_term_std": float(np.std([credit[0]["outcome"] for _, credit in credits])),
            "credit/turn_term_std": float(np.std([c["turn"] for c in turns])),
        }
        if turns
        else {},
        states=_states(valid),
        by_turn=_spreads((turn, c["advantage"]) for _, credit in credits for turn, c in enumerate(credit, 1)),
        by_scene=_spreads((tag, c["advantage"]) for tag, credit in credits for c in credit),
        wrong=[c["advantage"] for c in turns if not same(c["advantage"], c["outcome"] + c["turn"])],
        trained=len(turns),
    )


def credit_of(episode: Trace) -> list[Mapping[str, float]] | None:
    """The credit of each turn in training (outcome, turn, advantage); None for an episode that was not trained on, or without
    recorded credit."""
    found = [turn.get("credit") for turn in episode["turns"]]
    return found if found and None not in found else None


def mean_path(paths: Sequence[Paths]) -> list[float]:
    """The mean of the paths at the start and after each turn. A finished episode counts with its last values."""
    by_length: dict[int, tuple[int, list[float]]] = {}
    for of_part in paths:
        for length, (n, sums) in of_part.items():
            by_length[length] = _plus(by_length.get(length), n, sums)
    longest = max(by_length)
    total = sum(np.pad(sums, (0, longest - length), mode="edge") for length, (_, sums) in by_length.items())
    return [float(x) for x in np.round(total / sum(n for n, _ in by_length.values()), 2)]


def _plus(found: tuple[int, list[float]] | None, n: int, sums: Sequence[float]) -> tuple[int, list[float]]:
    return (n, list(sums)) if found is None else (found[0] + n, [a + b for a, b in zip(found[1], sums, strict=True)])


def joined(spreads: Sequence[Spread]) -> Spread:
    """The spread of the values of all; at least one."""
    counts = np.sum([s.counts for s in spreads], axis=0).tolist()
    n, total, squares = (sum(values) for values in zip(*((s.n, s.total, s.squares) for s in spreads), strict=True))
    return Spread(counts, int(n), total, squares)


def _states(valid: Sequence[Trace]) -> dict[str, dict[str, Paths]]:
    found: dict[str, dict[str, dict[int, tuple[int, list[float]]]]] = {}
    for e in valid:
        for name, path in numbers_by_turn(e).items():
            lengths = found.setdefault(e["tag"], {}).setdefault(name, {})
            lengths[len(path)] = _plus(lengths.get(len(path)), 1, path)
    return {tag: dict(names) for tag, names in found.items()}


def _spreads(pairs: Iterable[tuple[Any, float]]) -> dict[Any, Spread]:
    values: dict[Any, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: _spread(np.asarray(found)) for key, found in values.items()}


def _spread(values: Any) -> Spread:
    clipped = np.clip(values, BINS[0] + 1e-9, BINS[-1] - 1e-9)
    counts = np.histogram(clipped, BINS)[0].tolist()
    return Spread(counts, len(values), float(values.sum()), float((values**2).sum()))
