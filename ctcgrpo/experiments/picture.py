"""The curves of variants as a picture: one panel per environment, the mean over seeds of each variant."""

import io
from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure

from ctcgrpo.experiments.curves import Curves

_COLORS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bc4c00", "#1b7c83", "#953800", "#bf3989")
_PLAIN = "#24292f"


def drawn(found: Mapping[str, Mapping[str, Curves]], baseline: str) -> bytes:
    """The picture as SVG. The baseline is black. Only it has a band, from the lowest to the highest seed: eight bands would hide
    the lines."""
    variants = list(dict.fromkeys(name for curves in found.values() for name in curves))
    others = [name for name in variants if name != baseline]
    color = {baseline: _PLAIN, **{name: _COLORS[k % len(_COLORS)] for k, name in enumerate(others)}}
    with matplotlib.rc_context({"svg.hashsalt": "ctcgrpo", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.6 * len(found) + 1.8, 4.2), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (environment, curves) in zip(panels, found.items(), strict=True):
            for name, curve in curves.items():
                whole = name == baseline
                width, order = (2.4, 3) if whole else (1.6, 2)
                mean = curve.scores.mean(axis=0)
                axes.plot(curve.steps, mean, color=color[name], linewidth=width, label=name, zorder=order)
                if whole:
                    low, high = curve.scores.min(axis=0), curve.scores.max(axis=0)
                    axes.fill_between(curve.steps, low, high, color=color[name], alpha=0.12, linewidth=0)
            axes.set_title(environment)
            axes.set_xlabel("step")
            axes.grid(color="#d0d7de", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("held-out score, mean over seeds")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
