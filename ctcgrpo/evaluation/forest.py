"""A comparison as a picture, and as one page that needs no network: forest plot, figures, and the dialogues that changed most."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctcgrpo.evaluation.benches import Bench, named

PNG, HTML = "comparison.png", "comparison.html"
_BETTER, _WORSE, _UNSURE = "#1a7f37", "#b42318", "#57606a"


def write_comparison(found: Mapping[str, Any], changed: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write both files to `folder`; `found` and `changed`: what compare.compared and most_changed give."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": [*_fonts(), "DejaVu Sans"]}):
        picture = _picture(found)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (files("ctcgrpo.evaluation") / "comparison.html.j2").read_text(encoding="utf-8")
    )
    bench = named(found["bench"])
    page = template.render(
        found=found, changed=changed, bench=bench, picture=base64.b64encode(picture).decode(), change=_change(bench)
    )
    (folder / PNG).write_bytes(picture)
    (folder / HTML).write_text(page, encoding="utf-8")
    return [folder / PNG, folder / HTML]


def _change(bench: Bench) -> Any:
    return lambda value: bench.shown(value, change=True)


def _picture(found: Mapping[str, Any]) -> bytes:
    """PNG: a row for each evaluation beside the first, and one for each of its groups."""
    bench = named(found["bench"])
    rows = []
    for other in found["others"]:
        rows.append((other["name"], other, True))
        rows += [(f"{group} (n = {row['n']})", row, False) for group, row in other["groups"].items()]
    rows = [(_drawable(name, k), row, whole) for k, (name, row, whole) in enumerate(rows)]
    figure = Figure(figsize=(8.5, 1.3 + 0.34 * len(rows)), layout="constrained", dpi=150)
    axes: Axes = figure.add_subplot()
    for place, (_, row, whole) in enumerate(rows):
        low, high = row["ci95"] or (row["difference"], row["difference"])
        color = _UNSURE if row["ci95"] is None else _BETTER if low > 0 else _WORSE if high < 0 else _UNSURE
        axes.plot([low, high], [place, place], color=color, linewidth=2.4 if whole else 1.3, solid_capstyle="butt")
        axes.plot([row["difference"]], [place], marker="D" if whole else "o", color=color, markersize=7 if whole else 4.5)
    axes.axvline(0, color="#8c959f", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    for label, (_, _, whole) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if whole else "normal")
        label.set_parse_math(False)
    axes.invert_yaxis()
    told = [
        f"{found['title']}: score, difference to {found['baseline']['name']} (paired, 95 % interval)",
        f"{bench.other}: {found['other']}",
        f"settings: {found['settings']}"[:110],
        *(f"mind: {warning}"[:110] for warning in found["warnings"]),
    ]
    axes.set_xlabel("\n".join(told), parse_math=False)
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
    return [
        name
        for name in ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei")
        if name in known
    ]


def _drawable(name: str, place: int) -> str:
    """A name as the fonts here can draw it: without Chinese ones, a number that the table beside the picture explains."""
    return name if name.isascii() or _fonts() else f"row {place + 1}"
