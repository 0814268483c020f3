"""Whether a set is balanced: counts by scene and seed, lengths, distances between anchors; as a table and as a picture."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

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


@dataclass(frozen=True, slots=True)
class Stats:
    """`seeds`: how often each value of a seed field occurs, where records have seeds. `lengths` (in tokens, or characters where no
    tokenizer was given) and `distances` (levels): for each scene the values of its records."""

    scenes: Mapping[str, int]
    languages: Mapping[str, int]
    seeds: Mapping[str, Counter[str]]
    lengths: Mapping[str, Mapping[str, list[int]]]
    distances: Mapping[str, Mapping[str, list[int]]]
    unit: str


def stats_of(scenarios: Sequence[Scenario], count: Callable[[str], int] | None = None) -> Stats:
    """`count`: the tokens of a text."""
    measure = count or len
    by_scene = {scene: [s for s in scenarios if s.scene == scene] for scene in in_order(s.scene for s in scenarios)}

    def lengths(text: Callable[[Scenario], str]) -> dict[str, list[int]]:
        return {scene: [measure(text(s)) for s in found if text(s)] for scene, found in by_scene.items()}

    def distances(distance: Callable[[Scenario], int]) -> dict[str, list[int]]:
        return {scene: [distance(s) for s in found] for scene, found in by_scene.items()}

    counted = {field: Counter(_seeds(scenarios, field)) for field in SEEDS}
    return Stats(
        scenes={scene: len(found) for scene, found in by_scene.items()},
        languages=Counter(s.language for s in scenarios),
        seeds={field: counts for field, counts in counted.items() if counts},
        lengths={name: lengths(text) for name, text in LENGTHS.items()},
        distances={name: distances(distance) for name, distance in DISTANCES.items()},
        unit="tokens" if count else "characters",
    )


def _seeds(scenarios: Sequence[Scenario], field: str) -> list[str]:
    found = (s.extras.get("seed") for s in scenarios)
    return [str(seed[field]) for seed in found if isinstance(seed, Mapping) and seed.get(field)]


def tables_of(stats: Stats, title: str) -> list[Table]:
    """By scene; and by seed, where records have seeds."""
    table = Table(
        title=f"{title}: {sum(stats.scenes.values())} scenarios ({', '.join(f'{n} {c}' for c, n in stats.languages.items())})"
    )
    table.add_column("")
    for scene, n in stats.scenes.items():
        table.add_column(f"{scene} ({n})", justify="right")
    for name, by_scene in {**stats.lengths, **stats.distances}.items():
        unit = stats.unit if name in stats.lengths else "levels"
        table.add_row(f"{name}, {unit}", *(_spread(by_scene[scene]) for scene in stats.scenes))
    tables = [table]
    if stats.seeds:
        seeds = Table(title="seeds", caption="effective: as many values, equally frequent, would be as varied")
        for name in ("seed", "values", "effective", "most frequent"):
            seeds.add_column(name, justify="left" if name in ("seed", "most frequent") else "right")
        for field, counts in stats.seeds.items():
            often = ", ".join(f"{value} {n}" for value, n in counts.most_common(3))
            seeds.add_row(field, str(len(counts)), f"{effective(counts):.1f}", escape(often))
        tables.append(seeds)
    return tables


def effective(counts: Mapping[str, int]) -> float:
    """The exponential of the entropy of a distribution: how many equally frequent values would be as varied."""
    shares = np.array(list(counts.values()), dtype=float) / sum(counts.values())
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, median, high = np.percentile(values, [0, 50, 100])
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


def write_picture(stats: Stats, file: Path) -> None:
    """PNG: a panel for each length and distance, a box for each scene."""
    panels = {**stats.lengths, **stats.distances}
    colors = list(itertools.islice(itertools.cycle(_COLORS), len(stats.scenes)))
    figure = Figure(figsize=(12, 5.4), layout="constrained", dpi=130)
    for axes, (name, by_scene) in zip(figure.subplots(2, 4).flat, panels.items(), strict=False):
        boxes = axes.boxplot(
            [by_scene[scene] for scene in stats.scenes], tick_labels=list(stats.scenes), patch_artist=True, widths=0.6
        )
        for box, color in zip(boxes["boxes"], colors, strict=True):
            box.set(facecolor=color, alpha=0.35)
        axes.set_title(f"{name}, {stats.unit if name in stats.lengths else 'levels'}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    last = figure.axes[-1]
    last.clear()
    last.bar(list(stats.scenes), list(stats.scenes.values()), color=colors)
    last.set_title("scenarios", fontsize=9)
    last.tick_params(labelsize=7)
    last.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    file.write_bytes(out.getvalue())
