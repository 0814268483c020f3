"""A comparison as a picture, and as one page that needs no network: forest plot, figures, and the dialogues that changed most.

The page draws the plot itself, each row beside its figures, in colours that follow the reader's light or dark scheme; the picture
is for papers and slides.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ctcgrpo.evaluation.benches import named
from ctcgrpo.util.terminal import printable

_COLORS = {"better": "#1a7f37", "worse": "#b42318", "unsure": "#57606a"}
_CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")


def write_comparison(found: Mapping[str, Any], changed: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write both files to `folder`; `found` and `changed`: what compare.compared and most_changed give."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": [*_fonts(), "DejaVu Sans"]}):
        picture = _picture(found)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (files("ctcgrpo.evaluation") / "comparison.html.j2").read_text(encoding="utf-8")
    )
    bench = named(found["bench"])
    change = partial(bench.shown, change=True)
    page = template.render(found=found, changed=changed, bench=bench, plot=_plot(found), change=change)
    png, html = folder / "comparison.png", folder / "comparison.html"
    png.write_bytes(picture)
    html.write_text(page, encoding="utf-8")
    return [png, html]


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], bool]]:
    """The plot's: one for each evaluation beside the first, whole, and one for each of its groups."""
    return [
        (name, row, row is other) for other in found["others"] for name, row in ((other["name"], other), *other["groups"].items())
    ]


def _range(row: Mapping[str, Any]) -> tuple[float, float]:
    low, high = row["ci95"] or (row["difference"], row["difference"])
    return low, high


def _verdict(row: Mapping[str, Any]) -> str:
    """Whether there is an interval that excludes zero, and on which side."""
    low, high = row["ci95"] or (0.0, 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "unsure"


def _plot(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws: `marks` (a row each), `ticks` (value and place, at round values), `zero`. Places are in percent of the
    plot's width."""
    rows = _rows(found)
    values = [0.0] + [x for _, row, _ in rows for x in (row["difference"], *_range(row))]
    least, most = min(values), max(values)
    pad = (most - least or 1.0) * 0.08
    left, width = least - pad, most - least + 2 * pad

    def place(x: float) -> float:
        return float(round(100 * (x - left) / width, 2))

    marks = []
    for name, row, whole in rows:
        low, high = map(place, _range(row))
        mark = {"low": low, "middle": place(row["difference"]), "high": high, "verdict": _verdict(row)}
        marks.append({"name": name, "row": row, "whole": whole, **mark})
    ticks = [float(x) for x in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(least, most)]
    return {"marks": marks, "ticks": [(x, place(x)) for x in ticks if left <= x <= left + width], "zero": place(0.0)}


def _picture(found: Mapping[str, Any]) -> bytes:
    """The rows of the plot as PNG."""
    bench = named(found["bench"])
    rows = [
        (_drawable(name if whole else f"{name} (n = {row['n']})", k), row, whole)
        for k, (name, row, whole) in enumerate(_rows(found))
    ]
    notes = [
        f"{found['title']}: score, difference to {found['baseline']['name']} (paired, 95 % interval)",
        f"{bench.other}: {found['other']}",
        f"settings: {found['settings']}",
        *(f"note: {warning}" for warning in found["warnings"]),
    ]
    notes = [part for line in notes for part in textwrap.wrap(printable(line), 120)]
    figure = Figure(figsize=(8.5, 0.8 + 0.34 * len(rows) + 0.18 * len(notes)), layout="constrained", dpi=150)
    axes: Axes = figure.add_subplot()
    for place, (_, row, whole) in enumerate(rows):
        color = _COLORS[_verdict(row)]
        axes.plot(_range(row), [place, place], color=color, linewidth=2.4 if whole else 1.3, solid_capstyle="butt")
        axes.plot([row["difference"]], [place], marker="D" if whole else "o", color=color, markersize=7 if whole else 4.5)
    axes.axvline(0, color="#8c959f", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    for label, (_, _, whole) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if whole else "normal")
        label.set_parse_math(False)
    axes.invert_yaxis()
    figure.supxlabel("\n".join(notes), fontsize="small", parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


@cache
def _fonts() -> list[str]:
    """Fonts of this machine that have Chinese."""
    known = set(font_manager.get_font_names())
    return [name for name in _CHINESE if name in known]


def _drawable(name: str, place: int) -> str:
    """A name as the fonts here can draw it: without Chinese ones, a number that the table beside the picture explains."""
    return _short(name, 48) if name.isascii() or _fonts() else f"row {place + 1}"


def _short(text: str, most: int) -> str:
    """Without control characters, and without its middle where it is too long to be drawn."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"
