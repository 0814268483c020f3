"""The learning curve of a run as a picture: python -m tests.learning_curve RUN FILE.svg

Left: the score in training by step and the held-out score with its 95 % interval over scenarios. Right: the share of replies that
are cut at the limit, and tokens a reply.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import read_metrics, valid_validations
from ctcgrpo.util.intervals import interval


def draw(run: Path, file: Path) -> None:
    """Raises OutputError for a folder without validations."""
    folder = RunFolder(run)
    metrics, _ = read_metrics(folder.metrics_file)
    validations = valid_validations(folder.validation_file)
    steps = [m["step"] for m in metrics]
    matplotlib.rcParams.update({"svg.hashsalt": "ctcgrpo", "font.size": 9})
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [m["outcome/all"] for m in metrics], color="#8a8f98", label="training, 64 scenarios")
    means = [v.overall for v in validations]
    bounds = [interval(list(v.by_scenario.values())) for v in validations]
    spread = [
        [m - low for m, (low, _) in zip(means, bounds, strict=True)],
        [h - m for m, (_, h) in zip(means, bounds, strict=True)],
    ]
    left.errorbar(
        [v.step for v in validations], means, spread, color="#0b6e4f", marker="o", capsize=3, label="held out, 16 scenarios"
    )
    left.axhline(0, color="#c8ccd2", linewidth=0.8)
    left.set(title="score, in -1 to 1", xlabel="step")
    left.legend(frameon=False, loc="lower right")
    right.plot(steps, [100 * m["replies/cut"] for m in metrics], color="#b3541e", label="replies cut, %")
    right.plot(steps, [m["replies/tokens"] for m in metrics], color="#33658a", label="tokens a reply")
    right.set(title="how it speaks", xlabel="step")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
