"""How sure a mean over scenarios is: percentile bootstraps that draw scenarios, seeded. Pure.

Scenarios are what a benchmark has few of, so they are what is drawn; the episodes of one are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

BOOTSTRAP_SAMPLES = 10_000


def means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each scenario's values, from (scenario, value) pairs, in the order in which scenarios first come."""
    by_name: dict[str, list[float]] = {}
    for name, value in values:
        by_name.setdefault(name, []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in by_name.items()}


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (n,), n > 0, by drawing n of them with replacement 10,000 times."""
    found = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(found), size=(BOOTSTRAP_SAMPLES, len(found)))
    low, high = np.percentile(found[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


# fmt: off
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
      2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
# fmt: on
"""The 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def student(values: ArrayLike) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (n,), n > 1, by Student's t: for a few seeds, where drawing them again would be too
    sure of itself. Beyond 31 values a little too wide."""
    found = np.asarray(values, dtype=float)
    half = _T[min(len(found) - 1, len(_T)) - 1] * float(found.std(ddof=1)) / math.sqrt(len(found))
    return float(found.mean()) - half, float(found.mean()) + half


def share_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson), which does not vanish where all or none succeeded; n > 0."""
    z = 1.959964
    p, factor = successes / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / factor
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / factor
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """after - before for every scenario that both have, in the order of `before`."""
    return {name: after[name] - value for name, value in before.items() if name in after}


def crossed(runs: Sequence[Mapping[str, float]], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over runs and scenarios, from each run's means by scenario: both are drawn, the same
    scenarios for all runs that are drawn together. With few runs it is narrow: what was not run cannot be drawn."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    table = np.array([[run[name] for name in names] for run in runs])
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(runs), size=(BOOTSTRAP_SAMPLES, len(runs)))
    columns = rng.integers(len(names), size=(BOOTSTRAP_SAMPLES, len(names)))
    weights = np.stack([(rows == k).mean(axis=1) for k in range(len(runs))], axis=1)
    by_scenario = weights @ table
    drawn = np.take_along_axis(by_scenario, columns, axis=1).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
