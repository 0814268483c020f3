"""The benchmarks, and what their figures are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ctcgrpo.errors import RecipeError
from ctcgrpo.util.naming import nearest

Kind = Literal["role-play", "drafting", "analysis"]
MOST = 20
"""What a judge of EQ-Bench 3 gives a criterion at most."""
_HIGHER_IS_BETTER = (
    "demonstrated_empathy",
    "pragmatic_ei",
    "depth_of_insight",
    "social_dexterity",
    "emotional_reasoning",
    "message_tailoring",
)
_OF_ANALYSES = (
    "depth_of_insight",
    "emotional_reasoning",
    "theory_of_mind",
    "subtext_identification",
    "intellectual_grounding",
    "correctness",
)
COUNTED: Mapping[Kind, tuple[str, ...]] = {
    "role-play": _HIGHER_IS_BETTER,
    "drafting": _HIGHER_IS_BETTER,
    "analysis": _OF_ANALYSES,
}
"""The criteria whose mean is a task's score; the others describe a style."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`lowest` and `highest` bound the score; `grouped_by` says what its groups are; `other` is the role that an LLM plays beside
    the model that is evaluated. `measures` are figures beside the score, and what each is a mean of."""

    name: str
    title: str
    lowest: float
    highest: float
    grouped_by: str
    other: Literal["simulator", "judge"]
    measures: Mapping[str, str]
    shares: tuple[str, ...] = ()
    """Those of the measures that are 0 or 1 for each dialogue, so that they can be counted."""

    def shown(self, value: float, *, change: bool = False) -> str:
        """A score, or a change of one, in the benchmark's own scale."""
        digits = 3 if self.highest <= 1 else 2
        signed = "+" if change or self.lowest < 0 else ""
        return format(value, f"{signed}.{digits}f")


FAULTS = {
    "empty": "dialogues with an empty reply",
    "cut": "dialogues with a reply that max_tokens cut off",
    "empty_cut": "dialogues with a reply that is empty because max_tokens cut it off",
}
"""What goes wrong with replies; shown where it does."""
EIBENCH = Bench(
    name="eibench",
    title="EIBench",
    lowest=-1.0,
    highest=1.0,
    grouped_by="scene",
    other="simulator",
    measures={
        "escalated": "dialogues that end worse than they began",
        "reached": "dialogues that reach the target",
        "turns_to_target": "turns to it, where it was reached",
        **FAULTS,
    },
    shares=("escalated", "reached", *FAULTS),
)
SAGE = Bench(
    name="sage",
    title="SAGE",
    lowest=0.0,
    highest=100.0,
    grouped_by="character",
    other="simulator",
    measures={
        "success": "dialogues that end with emotion 100",
        "failure": "dialogues that end with emotion below 10",
        "turns": "times that the user spoke",
        **FAULTS,
    },
    shares=("success", "failure", *FAULTS),
)
EQBENCH3 = Bench(
    name="eqbench3",
    title="EQ-Bench 3, rubric",
    lowest=0.0,
    highest=100.0,
    grouped_by="kind",
    other="judge",
    measures={
        name: f"{name.replace('_', ' ')}, 0 to {MOST}"
        for name in dict.fromkeys(n for kind in COUNTED.values() for n in kind)
    }
    | FAULTS,
    shares=tuple(FAULTS),
)
BENCHES: Mapping[str, Bench] = {bench.name: bench for bench in (EIBENCH, SAGE, EQBENCH3)}


def _meant(name: str) -> str:
    match = nearest(name, BENCHES)
    return f"; did you mean {match!r}?" if match else ""


def named(name: str) -> Bench:
    """Raises RecipeError for a benchmark that there is not."""
    if name not in BENCHES:
        raise RecipeError(
            f"{name!r} is neither a benchmark ({', '.join(BENCHES)}) nor the folder of a run{_meant(name)}; "
            "`ctcgrpo evaluate --help` shows both forms"
        )
    return BENCHES[name]
