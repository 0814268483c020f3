"""`ctcgrpo report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctcgrpo.errors import OutputError
from ctcgrpo.run.folders import require_folder
from ctcgrpo.util.terminal import Terminal, print_line

if TYPE_CHECKING:
    from ctcgrpo.report.reading import Trial

_WARNINGS = 10  # printed at most; the page shows how many there are


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of a sweep (shows its trials and its best run).")],
    out: Annotated[Path | None, typer.Option(help="The file to write (default: report.html in the folder).")] = None,
) -> None:
    """Write an HTML page of a run: curves, and every dialogue with the credit of each turn."""
    from ctcgrpo.report.page import write_report
    from ctcgrpo.report.reading import read_run, read_trials

    trials: list[Trial] = []
    if (require_folder(run) / "table.json").exists():
        trials = read_trials(run / "table.json")
        source = _run_of_sweep(run, trials)
        found = replace(read_run(source), name=f"sweep {run.resolve().name}: {source.parent.name}, {source.name}")
    else:
        found = read_run(run)
    file = out or run / "report.html"
    wrote = write_report(found, file, trials)
    console = Terminal(120)
    sampled = "" if wrote["shown"] == wrote["of"] else f" (a sample of {wrote['of']})"
    more = [f"and {len(found.problems) - _WARNINGS} more"] if len(found.problems) > _WARNINGS else []
    for problem in [*found.problems[:_WARNINGS], *more]:
        print_line(console, f"warning: {problem}", "yellow")
    print_line(console, f"{file}: {wrote['shown']} episodes{sampled}, {wrote['bytes'] / 1e6:.1f} MB")


def _run_of_sweep(sweep: Path, trials: Sequence[Trial]) -> Path:
    """The run that a sweep's report shows: the best one, or one of the first trial where all are equal. Raises OutputError for a
    sweep without a finished trial."""
    if (sweep / "best").exists():
        return (sweep / "best").resolve().parent
    first = next((trial for trial in trials if trial["score"] is not None and trial["by_seed"]), None)
    if first is None:
        raise OutputError(f"{sweep}: no finished trial; expected at least one; run `ctcgrpo sweep` again to resume it")
    return sweep / str(first["trial"]) / f"seed-{next(iter(first['by_seed']))}"
