"""Statistics of a set: counts by scene and seed, lengths, distances between anchors; as a table and as a picture."""

import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from scipy.stats import entropy

from ctcgrpo.environments.eibench.records import Scenario, in_order

SEEDS = ("relationship", "place", "theme", "intensity", "personality")
LENGTHS: Mapping[str, Callable[[Scenario], str]] = {
    "user persona": lambda s: s.user_persona,
    "policy persona": lambda s: s.policy_persona,
    "opening line": lambda s: s.opening_line,
}
DISTANCES: Mapping[str, Callable[[Scenario], int]] = {
    "anger to target": lambda s: s.anchors.initial.anger - s.anchors.target.anger,
    "anger to worst": lambda s: s.anchors.worst.anger - s.anchors.initial.anger,
    "trust to target": lambda s: s.anchors.target.trust - s.anchors.initial.trust,
    "trust to worst": lambda s: s.anchors.initial.trust - s.anchors.worst.trust,
}
_COLORS = ("#0969da", "#cf222e", "#8250df", "#1a7f37")


class Stats(NamedTuple):
    """`seeds`: counts of each value of a seed field. `lengths` (in `unit`: tokens, or characters without a tokenizer) and
    `distances` (levels): by scene, the values of its records."""

    scenes: Mapping[str, int]
    languages: Mapping[str, int]
    seeds: Mapping[str, Counter[str]]
    lengths: Mapping[str, Mapping[str, list[int]]]
    distances: Mapping[str, Mapping[str, list[int]]]
    unit: str

    def panels(self) -> dict[str, Mapping[str, list[int]]]:
        """Lengths and distances by name and unit."""
        lengths = {f"{name}, {self.unit}": by_scene for name, by_scene in self.lengths.items()}
        return lengths | {f"{name}, levels": by_scene for name, by_scene in self.distances.items()}


def stats_of(scenarios: Sequence[Scenario], count: Callable[[str], int] | None = None) -> Stats:
    """`count` gives the number of tokens of a text."""
    measure = count or len
    by_scene = {scene: [s for s in scenarios if s.scene == scene] for scene in in_order(s.scene for s in scenarios)}
    seeds = [seed for s in scenarios if isinstance(seed := s.extras.get("seed"), Mapping)]
    counted = {field: Counter(str(seed[field]) for seed in seeds if seed.get(field)) for field in SEEDS}
    return Stats(
        scenes={scene: len(found) for scene, found in by_scene.items()},
        languages=Counter(s.language for s in scenarios),
        seeds={field: counts for field, counts in counted.items() if counts},
        lengths={
            name: {scene: [measure(text(s)) for s in found if text(s)] for scene, found in by_scene.items()}
            for name, text in LENGTHS.items()
        },
        distances={name: {scene: [*map(of, found)] for scene, found in by_scene.items()} for name, of in DISTANCES.items()},
        unit="tokens" if count else "characters",
    )


def tables_of(stats: Stats, title: str) -> list[Table]:
    """A table by scene, and one by seed if records have seeds."""
    languages = ", ".join(f"{n} {code}" for code, n in stats.languages.items())
    table = Table("", title=f"{title}: {sum(stats.scenes.values())} scenarios ({languages})")
    for scene, n in stats.scenes.items():
        table.add_column(f"{scene} ({n})", justify="right")
    for name, by_scene in stats.panels().items():
        table.add_row(name, *(_spread(by_scene[scene]) for scene in stats.scenes))
    if not stats.seeds:
        return [table]
    seeds = Table(title="seeds", caption="effective: the number of equally frequent values with the same entropy")
    for name in ("seed", "values", "effective", "most frequent"):
        seeds.add_column(name, justify="left" if name in ("seed", "most frequent") else "right")
    for field, counts in stats.seeds.items():
        often = ", ".join(f"{value} {n}" for value, n in counts.most_common(3))
        seeds.add_row(field, str(len(counts)), f"{effective(counts):.1f}", escape(often))
    return [table, seeds]


def effective(counts: Mapping[str, int]) -> float:
    """The effective number of values: the exponential of the distribution's entropy."""
    return float(np.exp(entropy(list(counts.values()))))


def _spread(values: Sequence[int]) -> str:
    return f"{np.median(values):.0f} ({min(values)} to {max(values)})" if values else "-"


def write_picture(stats: Stats, file: Path) -> None:
    """PNG: a panel for each length and distance, a box for each scene."""
    scenes = list(stats.scenes)
    colors = list(itertools.islice(itertools.cycle(_COLORS), len(scenes)))
    figure = Figure(figsize=(12, 5.4), layout="constrained", dpi=130)
    *boxes, last = figure.subplots(2, 4).flat
    for axes, (name, by_scene) in zip(boxes, stats.panels().items(), strict=True):
        found = axes.boxplot([by_scene[scene] for scene in scenes], tick_labels=scenes, patch_artist=True, widths=0.6)
        for box, color in zip(found["boxes"], colors, strict=True):
            box.set(facecolor=color, alpha=0.35)
        axes.set_title(name, fontsize=9)
    last.bar(scenes, list(stats.scenes.values()), color=colors)
    last.set_title("scenarios", fontsize=9)
    for axes in figure.axes:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    file.write_bytes(out.getvalue())
