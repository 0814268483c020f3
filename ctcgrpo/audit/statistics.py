"""What the gradients of groups say of a kind of credit. Functions of arrays.

Credit c gives each of N groups a gradient g_{c,n} = sum over its turns of A_{c,turn} s_turn (D,), with mean mu_c and covariance
Sigma_c over groups. o is the reference, the unscaled outcome less its group's mean, whose mean points along the gradient of the
expected outcome; B is the number of groups of a training step.

    noise      tr Sigma_c / |mu_c|^2             groups for a relative error of 1
    cosine     <mu_c, mu_o> / (|mu_c| |mu_o|)    1: no bias
    gain       <mu_c, mu_o> / sqrt(|mu_c|^2 + tr Sigma_c / B)

The gain is what a step of a given length, along the mean of B groups, adds to the expected outcome, to first order and up to a
factor that all credits share; it is given relative to that of a baseline. Inner products of means are averaged over pairs of
different groups alone, so that no noise is multiplied by itself and all are unbiased. Intervals are 95 % percentiles of a bootstrap
over groups; pairs of a group with itself, drawn twice, are left out there too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2_000
_KNOWN = 0.95  # share of the resamples in which a figure must be known for an interval


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and its 95 % interval. NaN where it is undetermined: an estimated squared length, or the baseline's gain, came out
    negative; of an interval where that happened in more than 5 % of the resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class CreditFigures:
    """Of one credit: `noise` in groups, `cosine`, and `gain` relative to the baseline's."""

    noise: Figure
    cosine: Figure
    gain: Figure


def credit_figures(
    gradients: Mapping[str, Floats], *, reference: str, baseline: str, batch: int, seed: int = 0
) -> dict[str, CreditFigures]:
    """Figures by credit. `gradients`: (N, D) by credit, of the same groups in the same order; `reference` is o, `baseline` what
    gains are relative to, `batch` is B. Raises ValueError with fewer than three groups."""
    found = _Moments(gradients, reference)
    if found.groups < 3:
        raise ValueError(f"{found.groups} groups; expected at least 3")
    drawn = _drawn(found.groups, seed)
    drawn = drawn[(drawn > 0).sum(axis=1) > 1]
    return _with_intervals(list(gradients), found.of(np.ones((1, found.groups))), found.of(drawn), batch, baseline)


def pooled_figures(
    steps: Sequence[tuple[int, "Moments"]], names: Sequence[str], *, baseline: str, batch: int, seed: int = 0
) -> dict[str, CreditFigures]:
    """Figures over several steps of training, each with its number of groups and their moments, `names` being the credits of these.
    Only groups of one step are paired, since the policy changes; the intervals are a bootstrap over steps."""
    n = np.array([groups for groups, _ in steps], dtype=float)
    pairs = n * (n - 1)
    made = [m for _, m in steps]

    def mean(weights: Floats) -> Moments:
        of_pairs, of_groups = weights * pairs, weights * n
        of_pairs, of_groups = (w / w.sum(axis=1, keepdims=True) for w in (of_pairs, of_groups))
        square = np.array([m.square[:, 0] for m in made]).T
        within = np.array([m.spread[:, 0] for m in made]).T + square  # the mean of |g|^2
        squares = square @ of_pairs.T
        along = np.array([m.along[:, 0] for m in made]).T @ of_pairs.T
        return Moments(squares, within @ of_groups.T - squares, along, of_pairs @ np.array([m.reference[0] for m in made]))

    return _with_intervals(names, mean(np.ones((1, len(n)))), mean(_drawn(len(n), seed)), batch, baseline)


def moments(gradients: Mapping[str, Floats], *, reference: str) -> "Moments":
    """The moments of two groups or more, weighted alike: W = 1."""
    found = _Moments(gradients, reference)
    return found.of(np.ones((1, found.groups)))


def agreement(gradients: Mapping[str, Floats], *, reference: str, batch: int, splits: int = 200, seed: int = 0) -> Figure:
    """Spearman's rank correlation of the gains of all credits (but `reference`) between two disjoint halves of the groups: mean and
    95 % range over random splits. Around 0, the order of the table is chance."""
    from scipy import stats

    every = _Moments(gradients, reference)
    ranked = [k for k, name in enumerate(gradients) if name != reference]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = rng.permutation(every.groups)
        halves = np.zeros((2, every.groups))
        halves[0, order[: every.groups // 2]], halves[1, order[every.groups // 2 :]] = 1, 1
        gains = _gain(every.of(halves), batch)[ranked]
        found.append(float(stats.spearmanr(gains[:, 0], gains[:, 1], nan_policy="omit").statistic))
    return Figure(float(np.nanmean(found)), *_range(np.array(found)))


# --- moments ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moments:
    """Unbiased estimates (C, W) for W weightings of the groups: |mu_c|^2, tr Sigma_c, <mu_c, mu_o>; and |mu_o|^2 (W,)."""

    square: Floats
    spread: Floats
    along: Floats
    reference: Floats


class _Moments:
    """Inner products of all gradients, from which the moments of any weighting of groups follow."""

    def __init__(self, gradients: Mapping[str, Floats], reference: str) -> None:
        every = [np.asarray(g, dtype=np.float64) for g in gradients.values()]
        o = np.asarray(gradients[reference], dtype=np.float64)
        self.groups = len(o)
        self._own = [g @ g.T for g in every]  # (N, N) each
        self._with_reference = [g @ o.T for g in every]
        self._reference = o @ o.T

    def of(self, weights: Floats) -> Moments:
        """`weights` (W, N): how often each group counts."""
        squares = np.array([_between(products, weights) for products in self._own])
        within = np.array([weights @ np.diag(products) / weights.sum(axis=1) for products in self._own])
        along = np.array([_between(products, weights) for products in self._with_reference])
        return Moments(squares, within - squares, along, _between(self._reference, weights))


def _between(products: Floats, weights: Floats) -> Floats:
    """(W,): the weighted mean of (N, N) products over pairs of different groups."""
    pairs = np.einsum("wn,nm,wm->w", weights, products, weights, optimize=True) - weights**2 @ np.diag(products)
    counts = weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
    return np.asarray(pairs / counts)


def _with_intervals(names: Sequence[str], whole: Moments, drawn: Moments, batch: int, baseline: str) -> dict[str, CreditFigures]:
    base = names.index(baseline)
    both = list(zip(_figures(whole, batch, base), _figures(drawn, batch, base), strict=True))
    return {
        name: CreditFigures(*(Figure(float(value[k, 0]), *_range(resampled[k])) for value, resampled in both))
        for k, name in enumerate(names)
    }


def _drawn(n: int, seed: int) -> Floats:
    """How often each of n is drawn, for each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def _figures(m: Moments, batch: int, base: int) -> tuple[Floats, Floats, Floats]:
    """noise, cosine and relative gain (C, W)."""
    gain = _gain(m, batch)
    with np.errstate(invalid="ignore", divide="ignore"):
        noise = np.where(m.square > 0, m.spread / m.square, math.inf)
        cosine = m.along / np.sqrt(np.where(m.square > 0, m.square, np.nan) * np.where(m.reference > 0, m.reference, np.nan))
        relative = gain / np.where(gain[base] > 0, gain[base], np.nan)
    return noise, np.clip(cosine, -1, 1), relative


def _gain(m: Moments, batch: int) -> Floats:
    """(C, W), in units of the reference's length: of a step of length 1."""
    length = np.sqrt(np.maximum(m.square + m.spread / batch, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(length > 0, m.along / length, np.nan))


def _range(drawn: Floats) -> tuple[float, float]:
    known = drawn[~np.isnan(drawn)]
    if len(known) < _KNOWN * len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975], method="nearest")  # which may be infinite
    return float(low), float(high)


# --- turn rewards against effects ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turns:
    """The turns of one group: rewards r, estimated effects on the outcome e, and the variance of the error of each e (n,)."""

    rewards: Floats
    effects: Floats
    errors: Floats


def prediction(groups: Sequence[Turns], *, seed: int = 0) -> Figure:
    """How well a turn's reward predicts its effect on the outcome: their correlation, with the noise of estimated effects taken out
    of their variance. NaN where rewards or effects do not vary. The interval is a bootstrap over groups."""
    sums = np.array([_sums(group) for group in groups])
    return Figure(float(_correlation(sums.sum(axis=0)[None])[0]), *_range(_correlation(_drawn(len(groups), seed) @ sums)))


def _sums(of: Turns) -> Floats:
    r, e = of.rewards, of.effects
    return np.array([len(r), r.sum(), e.sum(), r @ r, e @ e, r @ e, of.errors.sum()])


def _correlation(sums: Floats) -> Floats:
    n, r, e, rr, ee, re, noise = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        var_r, var_e = rr / n - (r / n) ** 2, ee / n - (e / n) ** 2 - noise / n
        found = (re / n - r * e / n**2) / np.sqrt(np.where((var_r > 1e-12) & (var_e > 1e-12), var_r * var_e, np.nan))
    return np.asarray(np.clip(found, -1, 1))
