"""What evaluations print: one, several compared, many ranked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ctcgrpo.evaluation.benches import Bench, named


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    bench = named(summary["bench"])
    console.print(_scores(bench, summary))
    for line in _lines(bench, summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def other_of(summary: Mapping[str, Any]) -> str:
    """Who played the simulator or the judge, in words."""
    about = summary.get("other") or {}
    models = about.get("models") or [about.get("backend", "unknown")]
    prompts = f", prompts {about['prompts']}" if about.get("prompts") else ""
    return f"{', '.join(models)}{prompts}"


def _scores(bench: Bench, summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"{bench.title}: {summary['model']} ({bench.other}: {other_of(summary)})")
    for name in (bench.grouped_by, "scenarios", "score", "95 % interval"):
        table.add_column(name, justify="left" if name == bench.grouped_by else "right")
    rows = {"overall": summary["score"], **summary["groups"]}
    for name, found in rows.items():
        table.add_row(name, str(found["n"]), *_figures(bench, found), style="bold" if name == "overall" else None)
    return table


def _figures(bench: Bench, found: Mapping[str, Any]) -> tuple[str, str]:
    if found["mean"] is None:
        return "-", "-"
    low, high = found["ci95"]
    return bench.shown(found["mean"]), f"{bench.shown(low)} to {bench.shown(high)}"


def _lines(bench: Bench, summary: Mapping[str, Any]) -> list[str]:
    lines = []
    scored = summary["results"] - summary["failed"]
    for name, what in bench.measures.items():
        found = summary["measures"][name]
        if found["mean"] is None:
            continue
        low, high = found["ci95"]
        if "count" in found:
            lines.append(f"{what}: {found['count']} of {scored} ({found['mean']:.0%}, {low:.0%} to {high:.0%})")
        else:
            lines.append(f"{what}: {found['mean']:.2f} ({low:.2f} to {high:.2f})")
    if summary["failed"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in summary["failures"].items())
        lines.append(f"failed, and in no figure: {summary['failed']} of {summary['results']} ({kinds})")
    if summary["tokens"]:
        spent = "; ".join(f"{role} {t['input']:,} in, {t['output']:,} out" for role, t in summary["tokens"].items())
        lines.append(f"tokens: {spent}")
    for who, cost in summary["cost"].items():
        lines.append(f"cost of the {who}: {cost['money']:.4g} {cost['currency']}")
    variant = summary["task"].get("variant")
    lines += [f"scoring variant: {variant}"] if variant else []
    return lines


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """`found`: what compare.compared gives."""
    bench = named(found["bench"])
    table = Table(title=f"{bench.title}: against {found['baseline']['name']} ({bench.shown(found['baseline']['mean'])})")
    for name in ("", "score", "better by", "95 % interval", "scenarios"):
        table.add_column(name, justify="left" if not name else "right")
    for other in found["others"]:
        for k, (name, row) in enumerate({other["name"]: other, **other["groups"]}.items()):
            low, high = row["ci95"]
            table.add_row(
                name if not k else f"  {name}",
                bench.shown(row["mean"]),
                bench.shown(row["difference"], change=True),
                f"{bench.shown(low, change=True)} to {bench.shown(high, change=True)}",
                str(row["n"]),
                style="bold" if not k else None,
            )
        table.add_section()
    console.print(table)
    for warning in found["warnings"]:
        console.print(Text(f"mind: {warning}", style="yellow"), soft_wrap=True)


def print_leaderboard(rows: Mapping[str, Any], console: Console) -> None:
    """`rows`: what leaderboard.ranked gives."""
    tables = []
    for board in rows["boards"]:
        bench = named(board["bench"])
        table = Table(title=f"{bench.title} ({bench.other}: {board['other']}; {board['settings']})")
        groups = board["groups"]
        for name in ("", "model", "score", "95 % interval", *groups, "failed"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for place, entry in enumerate(board["entries"], 1):
            cells = [bench.shown(entry["groups"][g]) if g in entry["groups"] else "-" for g in groups]
            table.add_row(str(place), entry["model"], *_figures(bench, entry["score"]), *cells, str(entry["failed"]))
        tables.append(table)
    console.print(Group(*tables))
