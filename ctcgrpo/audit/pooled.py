"""The audit that audited steps of training make together."""

from collections.abc import Sequence

import numpy as np

from ctcgrpo import __version__
from ctcgrpo.audit.kinds import BASELINE
from ctcgrpo.audit.record import Audit, StepMoments, of_credit
from ctcgrpo.audit.statistics import Moments, pooled_figures


def pooled(steps: Sequence[StepMoments], *, source: str, batch: int) -> Audit | None:
    """The audit that steps of training make together; None before there are two. Only credits that all of them have."""
    names = [name for name in steps[0].credits if all(name in step.credits for step in steps)] if steps else []
    if len(steps) < 2 or BASELINE not in names:
        return None
    figures = pooled_figures([(step.groups, _as_arrays(step, names)) for step in steps], names, baseline=BASELINE, batch=batch)
    return Audit(
        version=__version__,
        source=source,
        groups=sum(step.groups for step in steps),
        batch=batch,
        baseline=BASELINE,
        steps=len(steps),
        credits={name: of_credit(of) for name, of in figures.items()},
    )


def _as_arrays(step: StepMoments, names: Sequence[str]) -> Moments:
    square, spread, along = (np.array([[step.credits[name][k]] for name in names]) for k in range(3))
    return Moments(square, spread, along, np.array([step.reference]))
