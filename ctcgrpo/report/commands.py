"""`ctcgrpo report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctcgrpo.errors import OutputError, RecipeError
from ctcgrpo.run.folders import require_folder, require_run
from ctcgrpo.util.terminal import Terminal, log_line, print_line

if TYPE_CHECKING:
    from ctcgrpo.report.reading import Trial

_WARNINGS = 10  # printed at most; the page shows how many there are


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of a sweep (shows its trials and its best run).")],
    out: Annotated[Path | None, typer.Option(help="The file to write (default: report.html in the folder).")] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve the page while the run trains; it refreshes itself.")] = False,
    host: Annotated[str, typer.Option(help="With --live: interface; all but loopback need CTCGRPO_PAGE_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --live: port; 0 picks a free one.")] = 0,
) -> None:
    """Write an HTML page of a run: curves, and every dialogue with the credit of each turn.

    With --live, serve it: progress, scores by scene, failures and the latest dialogues, while the run trains.
    """
    if live:
        _serve_live(run, out, host, port)
        return
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


def _serve_live(run: Path, out: Path | None, host: str, port: int) -> None:
    """Raises RecipeError for options that do not fit together, OutputError for the folder of a sweep."""
    from ctcgrpo.report.live_server import serve_live

    if out is not None:
        raise RecipeError(f"--out {out}: --live writes no file; leave one of the two out")
    if (run / "table.json").exists():
        raise OutputError(f"{run}: the folder of a sweep; expected that of a run; try {run}/TRIAL/seed-N")
    try:
        require_run(run)
    except OutputError as error:
        print_line(Terminal(120), f"no run yet, the page waits for one: {error}", "yellow")
    serve_live(run, host, port, log_line)


def _run_of_sweep(sweep: Path, trials: Sequence[Trial]) -> Path:
    """The run that a sweep's report shows: the best one, or one of the first trial where all are equal. Raises OutputError for a
    sweep without a finished trial."""
    if (sweep / "best").exists():
        return (sweep / "best").resolve().parent
    first = next((trial for trial in trials if trial["score"] is not None and trial["by_seed"]), None)
    if first is None:
        raise OutputError(f"{sweep}: no finished trial; expected at least one; run `ctcgrpo sweep` again to resume it")
    return sweep / str(first["trial"]) / f"seed-{next(iter(first['by_seed']))}"
