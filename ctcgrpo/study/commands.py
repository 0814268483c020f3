"""`ctcgrpo study`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ctcgrpo.errors import RecipeError, RunFailed
from ctcgrpo.files import write_whole
from ctcgrpo.naming import did_you_mean
from ctcgrpo.study.spec import NAME, load_study
from ctcgrpo.terminal import Terminal


def study(
    file: Annotated[Path, typer.Argument(help="What is compared (configs/studies).")],
    name: Annotated[str | None, typer.Option(help="The folder under --out; the file's name by default.")] = None,
    out: Annotated[Path, typer.Option(help="Where studies are.")] = Path("checkpoints") / "studies",
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, one process each.")] = 1,
    against: Annotated[str | None, typer.Option(help="Print differences to this variant, not to the baseline.")] = None,
) -> None:
    """Run a recipe with several settings and seeds, and compare them; the same command resumes it."""
    asked, recipe = load_study(file)
    if against is not None and against not in asked.variants:
        raise RecipeError(f"--against {against!r}: {did_you_mean(against, asked.variants)}")
    try:
        from ctcgrpo.study.picture import drawn
    except ImportError as error:
        raise RecipeError(f"a study's picture needs matplotlib: pip install 'ctcgrpo[sweep]' ({error})") from None
    from ctcgrpo.study.figures import table_of
    from ctcgrpo.study.runs import found_curves, run_study

    console = Terminal(168)
    if not NAME.fullmatch(name or file.stem):
        raise RecipeError(f"--name {name or file.stem!r}: letters, digits, dots and dashes make the name of a folder")
    folder = out / (name or file.stem)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    failed = run_study(asked, recipe, folder, workers=workers, say=say)
    found = {e: curves for e, curves in found_curves(asked, folder).items() if asked.baseline in curves}
    tables = {environment: table_of(curves, asked.baseline) for environment, curves in found.items()}
    write_whole(folder / "table.json", json.dumps(tables, indent=2) + "\n")
    reference = against or asked.baseline
    for environment, curves in found.items():
        if reference in curves:
            rows = tables[environment] if reference == asked.baseline else table_of(curves, reference)
            console.print(printed(rows, environment, asked.primary, reference))
    if found:
        (folder / "curves.svg").write_bytes(drawn(found, asked.baseline))
        say(f"table and curves: {folder / 'table.json'}, {folder / 'curves.svg'}")
    if failed:
        raise RunFailed(f"{len(failed)} runs failed, each for the reason in its log; the same command runs them again")


def printed(rows: Mapping[str, Mapping[str, Any]], environment: str, primary: str, baseline: str) -> Table:
    """From the best by the primary measure to the worst."""
    other = "final" if primary == "area" else "area"
    table = Table(title=f"{environment}: gains in held-out score, 95 % intervals over seeds; primary: {primary}")
    table.add_column("variant")
    for name in (primary, f"against {baseline}", other, f"against {baseline}", "steps to its final score"):
        table.add_column(name, justify="right")
    for name, row in sorted(rows.items(), key=lambda item: -item[1][primary]["mean"]):
        cells = [shown for m in (primary, other) for shown in (_interval(row[m]), _interval(row[m]["against"]))]
        seeds = f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) < max(len(r["seeds"]) for r in rows.values()) else ""
        table.add_row(f"{name}{seeds}", *cells, _reach(row["reach"]))
    return table


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["ci95"] is None:
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} ({found['ci95'][0]:+.3f} to {found['ci95'][1]:+.3f})"


def _reach(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    steps, low, high = ("never" if s is None else f"{s:.1f}" for s in (found["steps"], *found["ci95"]))
    return f"{steps} ({low} to {high})"
