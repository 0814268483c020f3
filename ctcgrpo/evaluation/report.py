"""Prints evaluations: one, a comparison, a leaderboard. Names of models and datasets are printed as text, never as markup."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ctcgrpo.evaluation import presets
from ctcgrpo.evaluation.benches import FAULTS, Bench, named
from ctcgrpo.evaluation.played import in_words, settings_of, title_of
from ctcgrpo.simulator.choice import who_played

_MOST_REASONS, _MOST_CHARACTERS = 8, 500


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    bench = named(summary["bench"])
    title = f"{title_of(summary)}: {summary['model']} ({bench.other}: {other_of(summary)})"
    table = _table(title, (bench.grouped_by, "scenarios", "score", "95 % interval", "failed"), (bench.grouped_by,))
    overall = {**summary["score"], "failed": summary["failed"]}
    for name, found in {"overall": overall, **summary["groups"]}.items():
        cells = (name, str(found["n"]), *_figures(bench, found), str(found["failed"] or "-"))
        table.add_row(*map(Text, cells), style="bold" if name == "overall" else None)
    console.print(table)
    for line in _lines(bench, summary):
        console.print(Text(line), soft_wrap=True)


def other_of(summary: Mapping[str, Any]) -> str:
    """Who played the simulator or the judge, in words."""
    return who_played(summary["other"])


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(title=Text(title))
    for name in columns:
        table.add_column(Text(name), justify="left" if name in left else "right")
    return table


def _figures(bench: Bench, found: Mapping[str, Any], *, key: str = "mean", change: bool = False) -> tuple[str, str]:
    """A figure and its interval; a single scenario has none."""
    if found[key] is None:
        return "-", "-"
    shown = bench.shown(found[key], change=change)
    if found["ci95"] is None:
        return shown, "-"
    low, high = (bench.shown(x, change=change) for x in found["ci95"])
    return shown, f"{low} to {high}"


def _lines(bench: Bench, summary: Mapping[str, Any]) -> list[str]:
    lines = [f"settings: {in_words(settings_of(summary))}"]
    if preset := summary.get("preset"):
        lines.append(presets.in_words(preset["name"], preset["differs"]))
    scored = summary["results"] - summary["failed"]
    for name, what in bench.measures.items():
        found = summary["measures"][name]
        if found["mean"] is None or (name in FAULTS and not found["count"]):
            continue
        spread = found["ci95"]
        if "count" in found:
            between = "" if spread is None else f", {spread[0]:.0%} to {spread[1]:.0%}"
            lines.append(f"{what}: {found['count']} of {scored} ({found['mean']:.0%}{between})")
        else:
            between = "" if spread is None else f" ({spread[0]:.2f} to {spread[1]:.2f})"
            lines.append(f"{what}: {found['mean']:.2f}{between}")
    if summary["measures"].get("empty_cut", {}).get("count"):
        lines.append(
            "warning: some replies are empty since max_tokens cut off the reasoning; raise --max-tokens, or reduce reasoning"
        )
    if summary["failed"]:
        kinds = ", ".join(f"{n} {kind}" for kind, n in summary["failures"].items())
        lines.append(f"failed, left out of all figures: {summary['failed']} of {summary['results']} ({kinds})")
        reasons = summary.get("reasons", [])
        lines += [f"  {reason['count']} x {reason['kind']}: {_ended(reason['example'])}" for reason in reasons[:_MOST_REASONS]]
        if (more := len(reasons) - _MOST_REASONS) > 0:
            lines.append(f"  and {more} more reasons; see results.jsonl")
    if without := [group for group, found in summary["groups"].items() if not found["n"]]:
        lines.append(f"the overall score is incomplete: no score for {', '.join(without)}")
    if summary["tokens"]:
        spent = "; ".join(f"{role} {t['input']:,} in, {t['output']:,} out" for role, t in summary["tokens"].items())
        lines.append(f"tokens: {spent}")
    for role, cost in summary["cost"].items():
        lines.append(f"cost of the {role}: {cost['money']:.4g} {cost['currency']}")
    if unlike := summary.get("unlike_trained"):
        lines.append(
            f"warning: not comparable with the run's validations: {'; '.join(unlike)}. --as-trained uses the run's settings"
        )
    return lines


def _ended(message: str) -> str:
    """One line without control characters: the end of a message, where what a provider said is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return line if len(line) <= _MOST_CHARACTERS else f"... {line[-_MOST_CHARACTERS:]}"


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """`found`: what compare.compared gives."""
    bench = named(found["bench"])
    title = f"{found['title']}: compared with {found['baseline']['name']} ({bench.other}: {found['other']})"
    table = _table(title, ("", "baseline", "score", "difference", "95 % interval", "scenarios"), ("",))
    for other in found["others"]:
        for k, (name, row) in enumerate({other["name"]: other, **other["groups"]}.items()):
            difference, spread = _figures(bench, row, key="difference", change=True)
            cells = (bench.shown(row["was"]), bench.shown(row["mean"]), difference, spread, str(row["n"]))
            table.add_row(Text(f"  {name}" if k else name), *map(Text, cells), style=None if k else "bold")
        table.add_section()
    console.print(table)
    console.print(Text(f"settings: {found['settings']}"), soft_wrap=True)
    for warning in found["warnings"]:
        console.print(Text(f"note: {warning}", style="yellow"), soft_wrap=True)


def print_leaderboard(boards: Sequence[Mapping[str, Any]], console: Console) -> None:
    """`boards`: what compare.ranked gives."""
    tables = []
    for board in boards:
        bench = named(board["bench"])
        groups = board["groups"]
        title = f"{board['title']} ({bench.other}: {board['other']}; {board['settings']})"
        table = _table(title, ("", "model", "score", "95 % interval", *groups, "failed"), ("model",))
        for place, entry in enumerate(board["entries"], 1):
            cells = [bench.shown(entry["groups"][g]) if g in entry["groups"] else "-" for g in groups]
            row = (str(place), entry["model"], *_figures(bench, entry["score"]), *cells, str(entry["failed"]))
            table.add_row(*map(Text, row))
        tables.append(table)
    console.print(Group(*tables))
