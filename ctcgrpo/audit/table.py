"""An audit as tables and as a picture."""

import io
import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

Figures = Mapping[str, Any]


def credit_table(found: Figures, title: str) -> Table:
    """Kinds of credit by gain, the largest first."""
    table = Table(title=title, title_style="bold", caption=_caption(found), caption_justify="left")
    table.add_column("credit")
    for name in (f"gain relative to {found['baseline']}", "cosine to the outcome's gradient", "noise: groups"):
        table.add_column(name, justify="right")
    for name, of in by_gain(found):
        table.add_row(name, shown(of["gain"]), shown(of["cosine"]), shown(of["noise"], "{:.0f}"))
    return table


def by_gain(found: Figures) -> list[tuple[str, Figures]]:
    def key(item: tuple[str, Figures]) -> float:
        gain = item[1]["gain"]["value"]
        return -math.inf if math.isnan(gain) else float(gain)

    return sorted(found["credits"].items(), key=key, reverse=True)


def effects_table(found: Figures) -> Table | None:
    """How well turn rewards predict effects, by tag; None without continuations."""
    if not (by_tag := found["rewards_predict_effects"]):
        return None
    table = Table(title="turn rewards and effects on the outcome", title_style="bold")
    table.add_column("tag")
    table.add_column("groups", justify="right")
    table.add_column("correlation", justify="right")
    for tag, of in by_tag.items():
        table.add_row(tag, str(of["groups"]), shown(of))
    return table


def shown(of: Figures, form: str = "{:.2f}") -> str:
    value, low, high = (_number(of[name], form) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float, form: str) -> str:
    return "?" if math.isnan(value) else "never" if math.isinf(value) else form.format(value)


def _caption(found: Figures) -> str:
    agreed = found["agreement"]
    return (
        f"{found['groups']} groups, {found['episodes']} episodes, {found['turns']} turns, {found['failed']} failed. Gain: added "
        f"outcome of a step of equal length, on the mean of {found['batch']} groups, to first order. Two halves of the groups rank "
        f"the credits with a correlation of {agreed['mean']:.2f} ({agreed['low']:.2f} to {agreed['high']:.2f}). 95 % intervals."
    )


def drawn(found: Figures) -> bytes:
    """The gains with their intervals as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = by_gain(found)
    with matplotlib.rc_context({"svg.hashsalt": "ctcgrpo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (name, of) in enumerate(rows):
            gain = of["gain"]
            color = (
                "#24292f"
                if name == found["baseline"]
                else "#1a7f37"
                if gain["low"] > 1
                else "#b42318"
                if gain["high"] < 1
                else "#57606a"
            )
            axes.plot([gain["low"], gain["high"]], [place, place], color=color, linewidth=1.6, solid_capstyle="butt")
            axes.plot([gain["value"]], [place], marker="o", color=color, markersize=5)
        axes.axvline(1, color="#8c959f", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"expected gain of a step, relative to {found['baseline']} (95 % interval)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
        axes.set_axisbelow(True)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
