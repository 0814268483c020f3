"""An audit as tables and as a picture."""

import io
import math
from collections.abc import Iterator

from rich.table import Table

from ctcgrpo.audit.record import Audit, Estimate, OfCredit
from ctcgrpo.errors import RecipeError
from ctcgrpo.util.importing import installing

_PLAIN, _BETTER, _WORSE, _UNSURE = "#24292f", "#1a7f37", "#b42318", "#57606a"


def tables(found: Audit) -> Iterator[Table]:
    """Kinds of credit by gain, the largest first; and, with continuations, how well turn rewards predict effects, by tag."""
    table = Table(title=f"credit audit of {found.source}", title_style="bold", caption=caption(found), caption_justify="left")
    table.add_column("credit", no_wrap=True)
    for name in (f"gain relative to {found.baseline}", "cosine to the outcome's gradient", "noise: groups"):
        table.add_column(name, justify="right")
    for name, of in by_gain(found):
        table.add_row(name, shown(of.gain), shown(of.cosine), shown(of.noise, ".0f", "unbounded"))
    yield table
    if found.tags:
        table = Table(title="turn rewards and effects of turns on the outcome", title_style="bold")
        for name in ("tag", "groups", "correlation"):
            table.add_column(name, justify="left" if name == "tag" else "right")
        for tag, of_tag in found.tags.items():
            table.add_row(tag, str(of_tag.groups), shown(of_tag.correlation))
        yield table


def by_gain(found: Audit) -> list[tuple[str, OfCredit]]:
    def gain(item: tuple[str, OfCredit]) -> float:
        value = item[1].gain.value
        return -math.inf if value is None else value

    return sorted(found.credits.items(), key=gain, reverse=True)


def shown(of: Estimate, form: str = ".2f", no_bound: str = "?") -> str:
    """? stands for an undetermined value; `no_bound` for an upper end that is not known."""
    value, low = ("?" if x is None else format(x, form) for x in (of.value, of.low))
    high = no_bound if of.high is None and of.low is not None else "?" if of.high is None else format(of.high, form)
    return f"{value} ({low} to {high})"


def caption(found: Audit) -> str:
    """What the figures are of, and how sure they are."""
    if found.steps:
        counts = f"{found.groups} groups of {found.steps} steps of training. "
    else:
        counts = f"{found.groups} groups, {found.episodes} episodes, {found.turns} turns, {found.failed} failed. "
    text = (
        f"{counts}Gain: what a step of equal length adds to the outcome to first order, on the mean of {found.batch} groups. "
        "95 % intervals."
    )
    if (agreed := found.agreement) is not None:
        text += f" Halves of the groups rank the credits with a correlation of {shown(agreed)}."
    if found.credits[found.baseline].gain.low is None:
        text += f" The gain of {found.baseline} itself cannot be told from 0 with these groups: play four times as many, or name "
        text += "another --baseline."
    return text


def drawn(found: Audit) -> str:
    """The gains with their intervals as SVG. Raises RecipeError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError(f"--picture needs the extra sweep: run {installing('sweep')} ({error})") from None
    rows = [(name, of.gain, value) for name, of in by_gain(found) if (value := of.gain.value) is not None]
    with matplotlib.rc_context({"svg.hashsalt": "ctcgrpo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (name, gain, value) in enumerate(rows):
            color = _PLAIN if name == found.baseline else _color(gain)
            if gain.low is not None and gain.high is not None:
                axes.hlines(place, gain.low, gain.high, color=color, linewidth=1.6)
            axes.plot([value], [place], marker="o", color=color, markersize=5)
        axes.axvline(1, color="#8c959f", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"expected gain of a step, relative to {found.baseline} (95 % interval)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
        axes.set_axisbelow(True)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _color(gain: Estimate) -> str:
    if gain.low is not None and gain.low > 1:
        return _BETTER
    return _WORSE if gain.high is not None and gain.high < 1 else _UNSURE
