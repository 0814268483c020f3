"""Scores of validations: their record, the change between two, and the gap between two users. Pure.

A policy can learn what only one user rewards. With a second user the scores of both are known, and `gamed` raises an alarm.
"""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ctcgrpo.util.intervals import interval, means, paired

STRICT = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
Score = Annotated[float, Field(allow_inf_nan=False)]


class Figures(BaseModel):
    """Of one validation. `overall`: mean over scenarios, None where no episode was valid; `scenes`: the same of each scene; `n`
    counts scenarios."""

    model_config = STRICT
    overall: Score | None
    scenes: dict[str, Score]
    n: int
    episodes: int = 0
    failed: int = 0
    step: int


class Validation(BaseModel):
    """A line of validation.jsonl: the outcomes (EIBench's as fractions in [-1, 1]) of every valid episode after `step` batches of
    rollouts, by scenario, and the scene of each scenario. `other`: the same scenarios with another user than that of training
    (validation.simulator)."""

    model_config = STRICT
    step: int
    outcomes: dict[str, list[float]]
    scenes: dict[str, str]
    failed: int = 0
    other: "Validation | None" = None

    @property
    def by_scenario(self) -> dict[str, float]:
        """Mean outcome of each scenario that has a valid episode."""
        return means((name, value) for name, values in self.outcomes.items() for value in values)

    @property
    def by_scene(self) -> dict[str, list[float]]:
        """The means of its scenarios; those of which the record names no scene are in "?"."""
        found: dict[str, list[float]] = {}
        for name, mean in self.by_scenario.items():
            found.setdefault(self.scenes.get(name, "?"), []).append(mean)
        return found

    @property
    def overall(self) -> float:
        """Mean over scenarios; NaN where no episode was valid."""
        values = self.by_scenario.values()
        return math.fsum(values) / len(values) if values else math.nan

    def figures(self) -> Figures:
        n = len(self.by_scenario)
        return Figures(
            overall=self.overall if n else None,
            scenes={scene: math.fsum(values) / len(values) for scene, values in self.by_scene.items()},
            n=n,
            episodes=sum(map(len, self.outcomes.values())),
            failed=self.failed,
            step=self.step,
        )


class Improvement(BaseModel):
    """Without figures where no scenario has a valid episode before and after; `n` counts scenarios."""

    model_config = STRICT
    overall: Score | None
    ci95: Annotated[tuple[Score, Score], Field(strict=False)] | None
    n: int

    def __str__(self) -> str:
        if self.overall is None or self.ci95 is None:
            return "unknown"
        return f"{self.overall:+.3f}, 95 % interval {self.ci95[0]:+.3f} to {self.ci95[1]:+.3f}"


def improvement(before: Validation, after: Validation, *, seed: int = 0) -> Improvement:
    """The mean paired difference over the scenarios that both have, and its 95 % interval by a bootstrap over them."""
    differences = list(paired(before.by_scenario, after.by_scenario).values())
    if not differences:
        return Improvement(overall=None, ci95=None, n=0)
    mean = math.fsum(differences) / len(differences)
    return Improvement(overall=mean, ci95=interval(differences, seed=seed), n=len(differences))


# --- two users --------------------------------------------------------------------------------------------------------------------


class Gamed(BaseModel):
    """An alarm: from the validation after step `since` to that after `step`, the score with the user that is trained on rose by
    more than its interval (`trained`), while the score with the other user fell (`other`)."""

    model_config = STRICT
    step: int
    since: int
    trained: Improvement
    other: Improvement

    def __str__(self) -> str:
        return (
            f"from step {self.since} to step {self.step} the score with the user that is trained on rose ({self.trained}), and the "
            f"score with the other user fell ({self.other}): the policy may be learning what only the first one rewards"
        )


class OtherScores(BaseModel):
    """Of the validations with the other user, as in `Summary`. `gap_before` and `gap_after`: the score with the user of training
    less the score with the other, paired over scenarios."""

    model_config = STRICT
    before: Figures
    after: Figures
    improvement: Improvement
    gap_before: Improvement
    gap_after: Improvement


def gap(validation: Validation) -> Improvement:
    """The score with the user of training less the score with the other one: the mean paired difference over scenarios, with its
    interval as in `improvement`. Without figures where there is no other user."""
    other = validation.other
    return Improvement(overall=None, ci95=None, n=0) if other is None else improvement(other, validation)


def gamed(validations: Sequence[Validation]) -> Gamed | None:
    """Whether the last of a run's validations, in order of step, looks like gaming of the user that is trained on; None where not.

    It does where, since an earlier validation, the score with that user rose by more than its 95 % interval, while the score with
    the other user fell. Two earlier validations count: the first; and the one with the best score of the other user, for what was
    learned first and is lost later. The second is chosen for its high score, so the fall from it must exceed its interval, too.
    """
    if len(validations) < 2 or (last := validations[-1]).other is None:
        return None
    earlier = [(v, v.other) for v in validations[:-1] if v.other is not None and v.other.by_scenario]
    if not earlier:
        return None
    for (before, unlike), surely in ((earlier[0], False), (max(earlier, key=lambda pair: pair[1].overall), True)):
        trained, other = improvement(before, last), improvement(unlike, last.other)
        if trained.ci95 is None or other.ci95 is None or other.overall is None:
            continue
        if trained.ci95[0] > 0 and (other.ci95[1] if surely else other.overall) < 0:
            return Gamed(step=last.step, since=before.step, trained=trained, other=other)
    return None


def alarms(validations: Sequence[Validation]) -> list[Gamed]:
    """`gamed` after each validation of a run."""
    found = (gamed(validations[:k]) for k in range(2, len(validations) + 1))
    return [alarm for alarm in found if alarm is not None]


def alarm_texts(found: Sequence[Gamed]) -> list[str]:
    """The alarms of a run in words: the last one, with the steps of the earlier ones."""
    if not found:
        return []
    *earlier, last = found
    steps = f" (earlier after step {', '.join(str(alarm.step) for alarm in earlier)})" if earlier else ""
    return [f"step {last.step}: {last}{steps}"]


def other_scores(validations: Sequence[Validation]) -> OtherScores | None:
    """From the first to the last validation; None without another user."""
    before, after = validations[0], validations[-1]
    if before.other is None or after.other is None:
        return None
    return OtherScores(
        before=before.other.figures(),
        after=after.other.figures(),
        improvement=improvement(before.other, after.other),
        gap_before=gap(before),
        gap_after=gap(after),
    )
