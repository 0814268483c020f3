"""How sure a mean over scenarios is: percentile bootstraps that draw scenarios, seeded. Pure.

Scenarios are what a benchmark has few of, so they are what is drawn; the episodes of one are averaged first. scipy.stats is
imported where it is used: that takes a second, and every command reads this module.
"""

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
    from scipy import stats

    if len(values) == 1:  # which scipy refuses
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    drawn = stats.bootstrap((values,), np.mean, n_resamples=BOOTSTRAP_SAMPLES, method="percentile", rng=rng)
    low, high = drawn.confidence_interval
    return float(low), float(high)


def student(values: ArrayLike) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (n,), n > 1, by Student's t: for a few seeds, where drawing them again would be too
    sure of itself."""
    from scipy import stats

    found = np.asarray(values, dtype=float)
    half = float(stats.t.ppf(0.975, len(found) - 1) * stats.sem(found))
    return float(found.mean()) - half, float(found.mean()) + half


def share_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson), which does not vanish where all or none succeeded; n > 0."""
    from scipy import stats

    low, high = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """after - before for every scenario that both have, in the order of `before`."""
    return {name: after[name] - value for name, value in before.items() if name in after}


def crossed(runs: Sequence[Mapping[str, float]], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over runs and scenarios, from each run's means by scenario: both are drawn, the same
    scenarios for all runs that are drawn together, which scipy's bootstrap, with one axis, does not do. With few runs it is narrow:
    what was not run cannot be drawn."""
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
