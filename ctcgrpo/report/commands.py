"""`ctcgrpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctcgrpo.errors import OutputError
from ctcgrpo.terminal import Terminal

_WARNINGS = 10
"""Printed at most; the page shows how many there are."""


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder; or a sweep's: its trials, and the run that it found best.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the folder by default.")] = None,
) -> None:
    """Write one HTML page: scores, states and credit over steps, and every dialogue with each turn's credit."""
    from ctcgrpo.report.page import write_report
    from ctcgrpo.report.reading import Trial, read_run, read_trials

    trials: list[Trial] = []
    source = run
    if (run / "table.json").exists():
        trials = read_trials(run / "table.json")
        if not (run / "best").exists():
            raise OutputError(f"{run} holds a sweep without a finished trial; there is nothing to report")
        source = (run / "best").resolve().parent
    found = read_run(source)
    file = out or run / "report.html"
    wrote = write_report(found, file, trials)
    console = Terminal(120)
    sampled = "" if wrote["shown"] == wrote["of"] else f" (a sample of {wrote['of']})"
    more = [f"and {len(found.problems) - _WARNINGS} more"] if len(found.problems) > _WARNINGS else []
    for problem in [*found.problems[:_WARNINGS], *more]:
        console.print(f"warning: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{file}: {wrote['shown']} episodes{sampled}, {wrote['bytes'] / 1e6:.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
