"""What a finished run shows a person: held-out scores before and after, and the same scenario played by both policies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ctcgrpo.errors import OutputError
from ctcgrpo.files import whole_lines
from ctcgrpo.run_folder import RunFolder

Trace = Mapping[str, Any]
"""An episode as `rollout/traces.py` writes it."""
_SIDE_BY_SIDE = 100
"""Columns that two dialogues beside each other need."""


@dataclass(frozen=True, slots=True)
class Speech:
    """How a policy speaks: mean words a reply, and the share of its replies that it makes once only."""

    words: float
    distinct: float


def speech(episodes: Iterable[Trace]) -> Speech:
    """Over all replies of valid episodes. Raises ValueError where there are none."""
    replies = [turn["reply"] for e in episodes if e["failure"] is None for turn in e["turns"]]
    if not replies:
        raise ValueError("no replies")
    return Speech(sum(len(reply.split()) for reply in replies) / len(replies), len(set(replies)) / len(replies))


def typical_scenario(before: Sequence[Trace], after: Sequence[Trace]) -> str:
    """The scenario whose change is the median one: neither the best nor the worst that happened."""
    changes = {name: _mean(after, name) - _mean(before, name) for name in sorted(_scored(before) & _scored(after))}
    if not changes:
        raise OutputError("no scenario has a valid episode both before and after training")
    return sorted(changes, key=lambda name: changes[name])[len(changes) // 2]


def show_run(path: Path, console: Console, *, scenario: str | None = None) -> None:
    """Print a finished run. Raises OutputError for a folder that holds none, and for a scenario that it did not play."""
    folder = RunFolder(path)
    file = path / "summary.json"
    if not file.exists():
        raise OutputError(f"{path} holds no summary.json: no finished run with a validation section")
    summary = json.loads(file.read_text(encoding="utf-8"))
    before, after = (_validation(folder, summary[when]["step"]) for when in ("before", "after"))
    chosen = scenario or typical_scenario(before, after)
    if chosen not in _scored(before) & _scored(after):
        known = ", ".join(sorted(_scored(before) & _scored(after)))
        raise OutputError(f"scenario {chosen!r} was not played before and after; played were {known}")
    gain = summary["improvement"]
    console.print(_table(summary, speech(before), speech(after)))
    console.print(
        f"improvement {gain['overall']:+.3f}, 95 % interval {gain['ci95'][0]:+.3f} to {gain['ci95'][1]:+.3f}\n"
        f"(score in [-1, 1], mean over {gain['n']} scenarios; paired bootstrap over scenarios)\n",
        highlight=False,
    )
    console.print(_dialogues(_typical(before, chosen), _typical(after, chosen), console.width))
    console.print(
        f"trained policy  {folder.final}\nuntrained       {folder.base if folder.base.exists() else 'as the recipe names it'}\n"
        f"every dialogue  {folder.traces}\nfigures         {file}, {folder.metrics_file}\nanother one     "
        f"ctcgrpo show {path} --scenario ID",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _validation(folder: RunFolder, step: int) -> list[Trace]:
    files = sorted(folder.traces.glob(f"validation-{step:06d}.rank-*.jsonl"))
    episodes = [json.loads(line) for file in files for line in whole_lines(file)]
    if not episodes:
        raise OutputError(f"{folder.traces} holds no dialogues of the validation after step {step}")
    return sorted(episodes, key=lambda e: (e["group"], e["rollout"]))


def _scored(episodes: Sequence[Trace]) -> set[str]:
    return {e["scenario"] for e in episodes if e["outcome"] is not None}


def _outcomes(episodes: Sequence[Trace], scenario: str) -> list[float]:
    return [e["outcome"] for e in episodes if e["scenario"] == scenario and e["outcome"] is not None]


def _mean(episodes: Sequence[Trace], scenario: str) -> float:
    outcomes = _outcomes(episodes, scenario)
    return sum(outcomes) / len(outcomes)


def _typical(episodes: Sequence[Trace], scenario: str) -> Trace:
    """The episode of a scenario whose outcome is the median one."""
    played = [e for e in episodes if e["scenario"] == scenario and e["outcome"] is not None]
    return sorted(played, key=lambda e: e["outcome"])[len(played) // 2]


def _table(summary: Mapping[str, Any], before: Speech, after: Speech) -> Table:
    table = Table(title=f"held-out scenarios, before and after {summary['steps']} steps")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    a, b = summary["before"], summary["after"]
    table.add_row(
        "overall", f"{a['overall']:+.3f}", f"{b['overall']:+.3f}", f"{b['overall'] - a['overall']:+.3f}", style="bold"
    )
    for scene in a["scenes"]:
        x, y = a["scenes"][scene], b["scenes"].get(scene)
        table.add_row(scene, f"{x:+.3f}", *(("-", "-") if y is None else (f"{y:+.3f}", f"{y - x:+.3f}")))
    table.add_section()
    table.add_row("words a reply", f"{before.words:.1f}", f"{after.words:.1f}", f"{after.words - before.words:+.1f}")
    table.add_row(
        "distinct replies",
        f"{before.distinct:.0%}",
        f"{after.distinct:.0%}",
        f"{after.distinct - before.distinct:+.0%}",
    )
    return table


def _dialogues(before: Trace, after: Trace, width: int) -> Group | Table:
    """Side by side where both have room, else one above the other."""
    panels = _dialogue(before, "before"), _dialogue(after, "after")
    if width < _SIDE_BY_SIDE:
        return Group(*panels)
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(*panels)
    return table


def _dialogue(episode: Trace, title: str) -> Panel:
    lines: list[Text] = []
    if episode["opening_line"]:
        lines.append(Text(f"User: {episode['opening_line']}"))
    for turn in episode["turns"]:
        if turn["reasoning"]:
            lines.append(Text(f"({turn['reasoning']})", style="dim italic"))
        lines.append(Text(f"Policy: {turn['reply'] or '(nothing)'}", style="bold"))
        anger, trust = (y - x for x, y in zip(turn["before"], turn["after"], strict=True))
        mood = "green" if trust - anger > 0 else "red" if trust - anger < 0 else "dim"
        lines.append(Text(f"  anger {anger:+d}, trust {trust:+d}: {turn['why']}", style=mood))
        lines.append(Text(f"User: {turn['user_line']}"))
    start, end = episode["initial_state"], episode["final_state"]
    # In the body, where it wraps: a panel's title and subtitle are cut off in a narrow terminal.
    foot = f"score {episode['outcome']:+.2f}, anger {start[0]} to {end[0]}, trust {start[1]} to {end[1]}"
    return Panel(Group(*lines, Rule(style="dim"), Text(foot)), title=Text(f"{title}: {episode['scenario']}"))
