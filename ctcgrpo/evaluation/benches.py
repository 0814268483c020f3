"""The benchmarks and their measures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from ctcgrpo.environments.eibench.scenarios import data_home
from ctcgrpo.errors import RecipeError
from ctcgrpo.util.naming import nearest
from ctcgrpo.util.strict_yaml import load_yaml

FAULTS = {
    "empty": "dialogues with an empty reply",
    "cut": "dialogues with a reply that max_tokens cut off",
    "empty_cut": "dialogues with a reply that is empty because max_tokens cut it off",
}
"""Faults of replies; shown only where they occur."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One benchmark. `lowest` and `highest`: the range of the score. `grouped_by`: the name of its groups. `other`: the role of the
    LLM beside the evaluated model. `shares` and `means`: further measures with their descriptions; for a share each dialogue has 0
    or 1."""

    name: str
    title: str
    lowest: float
    highest: float
    grouped_by: str
    other: Literal["simulator", "judge"]
    means: Mapping[str, str]
    shares: Mapping[str, str] = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, str]:
        return {**self.shares, **self.means, **FAULTS}

    def shown(self, value: float, *, change: bool = False) -> str:
        """A score, or a change of score, as text in the benchmark's scale."""
        digits = 3 if self.highest <= 1 else 2
        signed = "+" if change or self.lowest < 0 else ""
        return format(value, f"{signed}.{digits}f")


_TABLE = load_yaml((files("ctcgrpo.evaluation") / "benches.yaml").read_text(encoding="utf-8"))
BENCHES: Mapping[str, Bench] = {name: Bench(name, **about) for name, about in _TABLE.items()}
EIBENCH, EQBENCH3 = BENCHES["eibench"], BENCHES["eqbench3"]


def named(name: str) -> Bench:
    """The benchmark of a name. Raises RecipeError for an unknown name."""
    if name not in BENCHES:
        match = nearest(name, BENCHES)
        raise RecipeError(
            f"{name!r}: expected a benchmark ({', '.join(BENCHES)}) or the folder of a run"
            f"{f'; did you mean {match!r}?' if match else ''}; `ctcgrpo evaluate --help` shows both forms"
        )
    return BENCHES[name]


def data_folder(bench: str, data: str | None) -> Path:
    """The folder of a benchmark's data: the user's copy, or $CTCGRPO_DATA/BENCH."""
    return Path(data).expanduser() if data else data_home() / bench
