"""The figures of an audit as they are written. None stands for an undetermined value; as the upper end of an interval of noise,
for no upper bound."""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ctcgrpo.audit.statistics import CreditFigures, Figure
from ctcgrpo.errors import OutputError
from ctcgrpo.util.files import collect_records, explained, read_object

_STRICT = ConfigDict(extra="forbid", frozen=True)
FILE = "audit.json"
STEPS_FILE = "audit.jsonl"


class Estimate(BaseModel):
    """A value and its 95 % interval."""

    model_config = _STRICT
    value: float | None
    low: float | None
    high: float | None


class OfCredit(BaseModel):
    """statistics.CreditFigures."""

    model_config = _STRICT
    gain: Estimate
    cosine: Estimate
    noise: Estimate


class OfTag(BaseModel):
    """How well turn rewards predict effects: their correlation over the turns of so many groups."""

    model_config = _STRICT
    groups: int
    correlation: Estimate


class Audit(BaseModel):
    """`source`: the recipe or run. `batch`: groups of a training step. `steps`: audited steps of training, 0 where all groups are
    of one policy. `agreement`: Spearman's correlation of the gains between halves of the groups, None where not computed."""

    model_config = _STRICT
    version: str
    source: str
    groups: int
    batch: int
    baseline: str
    credits: dict[str, OfCredit]
    steps: int = 0
    episodes: int | None = None
    failed: int | None = None
    turns: int | None = None
    continuations: int = 0
    agreement: Estimate | None = None
    tags: dict[str, OfTag] = {}


class StepMoments(BaseModel):
    """Moments of the gradients of one step's groups: statistics.moments. `credits`: by name [square, spread, along]."""

    model_config = _STRICT
    step: int
    groups: int
    reference: float
    credits: dict[str, tuple[float, float, float]]


def estimate(figure: Figure) -> Estimate:
    value, low, high = (x if math.isfinite(x) else None for x in (figure.value, figure.low, figure.high))
    return Estimate(value=value, low=low, high=high)


def of_credit(figures: CreditFigures) -> OfCredit:
    return OfCredit(gain=estimate(figures.gain), cosine=estimate(figures.cosine), noise=estimate(figures.noise))


def read_audit(file: Path) -> Audit:
    """Raises OutputError for a file that is none."""
    try:
        return Audit.model_validate(read_object(file))
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; run ctcgrpo audit again to rewrite it") from None


def read_steps(file: Path) -> tuple[list[StepMoments], list[str]]:
    """The audited steps of a run in order, each once (a resumed run repeats some), and the problems of the file. Both are empty
    where there is none."""
    found, problems = collect_records(file, StepMoments.model_validate, whole_only=True)
    by_step = {moments.step: moments for moments in found}
    return [by_step[step] for step in sorted(by_step)], problems
