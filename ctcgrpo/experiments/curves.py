"""The measures that compare variants: pure functions of held-out curves, seeds x validations.

All variants of an environment start from the same policy and validate with the same samples, so they begin at the same score. Run k
of two variants has the same seed, and so the same scenarios and sampling: differences are paired by seed. Intervals are over seeds:
Student's t, and for steps to a score a bootstrap over seeds. They do not cover other policies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctcgrpo.util.intervals import BOOTSTRAP_SAMPLES, student

Array = NDArray[np.float64]
MEASURES = ("area", "final")


@dataclass(frozen=True, slots=True)
class Curves:
    """The held-out scores (S, K) of a trial's S seeds after `steps` (K,), the first of them 0."""

    steps: Array
    scores: Array

    @property
    def area(self) -> Array:
        """(S,): the mean height of the curve above its start, over the steps of training."""
        heights = np.trapezoid(self.scores, self.steps, axis=1)
        return np.asarray(heights / (self.steps[-1] - self.steps[0]) - self.scores[:, 0])

    @property
    def final(self) -> Array:
        """(S,): the last score minus the first."""
        return np.asarray(self.scores[:, -1] - self.scores[:, 0])


def curves_of(validations: Mapping[int, Sequence[tuple[int, float]]]) -> Curves:
    """Curves from the (step, score) pairs of each seed's run. Raises ValueError for seeds validated after different steps."""
    steps = {seed: [step for step, _ in pairs] for seed, pairs in validations.items()}
    first = next(iter(steps))
    if (other := next((seed for seed in steps if steps[seed] != steps[first]), None)) is not None:
        raise ValueError(f"seed {first} was validated after steps {steps[first]}, seed {other} after {steps[other]}")
    return Curves(np.array(steps[first], dtype=float), np.array([[score for _, score in p] for p in validations.values()]))


def compared(found: Curves, base: Curves | None) -> dict[str, Any]:
    """Each measure with `mean` and `ci95` over seeds, and `against`: the same for the difference to `base`, a variant with the same
    seeds (None for the base itself, and without one). `reach`: see `reached`."""
    figures: dict[str, Any] = {}
    for measure in MEASURES:
        values = getattr(found, measure)
        difference = None if base is None or base is found else _interval(values - getattr(base, measure))
        figures[measure] = {**_interval(values), "against": difference}
    return {**figures, "reach": None if base is None else reached(found, base)}


def _interval(values: Array) -> dict[str, Any]:
    return {"mean": float(values.mean()), "ci95": list(student(values))}


def reached(found: Curves, base: Curves, *, seed: int = 0) -> dict[str, Any] | None:
    """The `steps` after which the variant's mean curve first reaches the baseline's final mean score, and `ci95` by a bootstrap
    over seeds, the same for both (too narrow with few seeds). None for `steps` or an end of the interval means never. The result is
    None where the baseline gained nothing, on all seeds or in 5 % of the draws."""
    ours, theirs = found.scores, base.scores
    drawn = np.random.default_rng(seed).integers(len(ours), size=(BOOTSTRAP_SAMPLES, len(ours)))
    gains = base.final[drawn].mean(axis=1)
    if base.final.mean() <= 0 or (gains <= 0).mean() > 0.05:
        return None
    when = sorted(_first(found.steps, ours[d].mean(axis=0), float(theirs[d].mean(axis=0)[-1])) for d in drawn[gains > 0])
    low, high = when[round(0.025 * (len(when) - 1))], when[round(0.975 * (len(when) - 1))]
    steps = _first(found.steps, ours.mean(axis=0), float(theirs.mean(axis=0)[-1]))
    return {"steps": _or_never(steps), "ci95": [_or_never(low), _or_never(high)]}


def _or_never(steps: float) -> float | None:
    return None if math.isinf(steps) else steps


def _first(steps: Array, curve: Array, target: float) -> float:
    """The step at which a curve first reaches `target`, linear between validations; infinite for never."""
    for k in range(len(curve)):
        if curve[k] >= target:
            if k == 0:
                return float(steps[0])
            share = (target - curve[k - 1]) / (curve[k] - curve[k - 1])
            return float(steps[k - 1] + share * (steps[k] - steps[k - 1]))
    return math.inf
