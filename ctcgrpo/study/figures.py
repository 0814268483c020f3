"""What a study says of its variants: pure functions of held-out curves, seeds x validations.

All variants of an environment start from the same policy and are validated with the same samples, so they begin at the same
score, and run k of two variants shares its seed, with it scenarios and sampling: differences are paired by seed. Intervals are over
seeds: Student's t, and for steps to a score, which need no mean, a bootstrap that draws seeds. They say nothing of other policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctcgrpo.intervals import BOOTSTRAP_SAMPLES, student

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curves:
    """The held-out scores (S, K) of S seeds after `steps` (K,), the first of them 0, of one variant in one environment."""

    seeds: tuple[int, ...]
    steps: Array
    scores: Array

    @property
    def area(self) -> Array:
        """(S,): how far the curve lies above its start, on average over the steps of training."""
        heights = np.trapezoid(self.scores, self.steps, axis=1)
        return np.asarray(heights / (self.steps[-1] - self.steps[0]) - self.scores[:, 0])

    @property
    def final(self) -> Array:
        """(S,): how far the last score lies above the first."""
        return np.asarray(self.scores[:, -1] - self.scores[:, 0])


MEASURES: dict[str, Callable[[Curves], Array]] = {"area": lambda curves: curves.area, "final": lambda curves: curves.final}


def table_of(curves: Mapping[str, Curves], baseline: str) -> dict[str, dict[str, Any]]:
    """A row for each variant of an environment. Each measure has `mean` and `ci95` over seeds, and `against`: the same of the
    difference to the baseline, paired by seed (None for the baseline, and where fewer than two seeds are shared). `reach`: see
    `reached`."""
    base = curves[baseline]
    return {
        name: {
            "seeds": list(found.seeds),
            **{measure: _measured(found, base if name != baseline else None, measure) for measure in MEASURES},
            "reach": reached(found, base),
        }
        for name, found in curves.items()
    }


def _measured(found: Curves, base: Curves | None, measure: str) -> dict[str, Any]:
    values = MEASURES[measure](found)
    told: dict[str, Any] = {"mean": float(values.mean()), "ci95": _student(values), "against": None}
    if base is None:
        return told
    theirs = dict(zip(base.seeds, MEASURES[measure](base), strict=True))
    differences = np.array([v - theirs[s] for s, v in zip(found.seeds, values, strict=True) if s in theirs])
    if len(differences) > 1:
        told["against"] = {"mean": float(differences.mean()), "ci95": _student(differences)}
    return told


def _student(values: Array) -> list[float] | None:
    return list(student(values)) if len(values) > 1 else None


def reached(found: Curves, base: Curves, *, seed: int = 0) -> dict[str, Any] | None:
    """After how many steps the variant's mean curve first stands as high as the baseline's mean curve does at its end: `steps`,
    and `ci95` by drawing seeds, the same for both (with few of them too sure of itself). None stands for never, in an end of the
    interval too. Altogether None where there is no score to reach: the baseline gained nothing, on the shared seeds or in one of
    twenty draws of them; and where fewer than two seeds are shared."""
    shared = [s for s in found.seeds if s in base.seeds]
    if len(shared) < 2:
        return None
    ours = found.scores[[found.seeds.index(s) for s in shared]]
    theirs = base.scores[[base.seeds.index(s) for s in shared]]
    drawn = np.random.default_rng(seed).integers(len(shared), size=(BOOTSTRAP_SAMPLES, len(shared)))
    gains = (theirs[:, -1] - theirs[:, 0])[drawn].mean(axis=1)
    if theirs[:, -1].mean() <= theirs[:, 0].mean() or (gains <= 0).mean() > 0.05:
        return None
    told = drawn[gains > 0]
    when = sorted(_first(found.steps, ours[d].mean(axis=0), float(theirs[d].mean(axis=0)[-1])) for d in told)
    low, high = when[round(0.025 * (len(when) - 1))], when[round(0.975 * (len(when) - 1))]
    steps = _first(found.steps, ours.mean(axis=0), float(theirs.mean(axis=0)[-1]))
    return {"steps": _or_never(steps), "ci95": [_or_never(low), _or_never(high)]}


def _or_never(steps: float) -> float | None:
    return None if math.isinf(steps) else steps


def _first(steps: Array, curve: Array, target: float) -> float:
    """Where a curve first reaches a height, in a straight line between validations; infinite where it never does."""
    for k in range(len(curve)):
        if curve[k] >= target:
            if k == 0:
                return float(steps[0])
            share = (target - curve[k - 1]) / (curve[k] - curve[k - 1])
            return float(steps[k - 1] + share * (steps[k] - steps[k - 1]))
    return math.inf


def curves_of(validations: Mapping[int, Sequence[tuple[int, float]]]) -> Curves:
    """From the (step, score) pairs of each seed's finished run. Raises ValueError where they were validated after other steps."""
    seeds = tuple(sorted(validations))
    steps = {seed: [step for step, _ in validations[seed]] for seed in seeds}
    if other := next((seed for seed in seeds if steps[seed] != steps[seeds[0]]), None):
        raise ValueError(f"seed {seeds[0]} was validated after steps {steps[seeds[0]]}, seed {other} after {steps[other]}")
    return Curves(
        seeds, np.array(steps[seeds[0]], dtype=float), np.array([[score for _, score in validations[s]] for s in seeds])
    )
