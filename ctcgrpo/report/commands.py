"""`ctcgrpo report`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ctcgrpo.errors import OutputError
from ctcgrpo.folders import require_folder


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder; or a sweep's: its trials, and the run that it found best.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the folder by default.")] = None,
) -> None:
    """Write an HTML page of a run: curves, and every dialogue with the credit of each turn."""
    from ctcgrpo.report.page import write_report
    from ctcgrpo.report.reading import read_run

    trials: list[dict[str, Any]] = []
    if (require_folder(run) / "table.json").exists():
        trials = json.loads((run / "table.json").read_text(encoding="utf-8"))
        source = _run_of_sweep(run, trials)
        found = replace(read_run(source), name=f"sweep {run.resolve().name}: {source.parent.name}, {source.name}")
    else:
        found = read_run(run)
    file = out or run / "report.html"
    wrote = write_report(found, file, trials)
    console = Console(width=None if sys.stdout.isatty() else 120)
    sampled = "" if wrote["shown"] == wrote["of"] else f" (a sample of {wrote['of']})"
    console.print(
        f"{file}: {wrote['shown']} episodes{sampled}, {wrote['bytes'] / 1e6:.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _run_of_sweep(sweep: Path, trials: list[dict[str, Any]]) -> Path:
    """The run that a sweep's report shows: the best one, or one of the first trial where all are equal. Raises OutputError for a
    sweep without a finished trial."""
    if (sweep / "best").exists():
        return (sweep / "best").resolve().parent
    first = next((trial for trial in trials if trial["score"] is not None), None)
    if first is None:
        raise OutputError(f"{sweep} holds a sweep without a finished trial; there is nothing to report")
    return sweep / str(first["trial"]) / f"seed-{next(iter(first['by_seed']))}"
