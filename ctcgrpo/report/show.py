"""Prints a finished run: held-out scores before and after, and the same scenario played by both policies."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ctcgrpo.errors import OutputError
from ctcgrpo.evaluation.played import eibench_on, in_words
from ctcgrpo.run.folders import require_folder
from ctcgrpo.run.run_folder import RunFolder
from ctcgrpo.run.run_records import VALIDATION, Summary, checked_summary, numbers_by_turn, read_traces, same
from ctcgrpo.run.scores import Figures, Improvement, alarm_texts
from ctcgrpo.types import NO_TAG
from ctcgrpo.util.intervals import means
from ctcgrpo.util.terminal import print_line

Trace = Mapping[str, Any]  # run_records.Trace
_SIDE_BY_SIDE = 100  # terminal width from which two dialogues are side by side


class Speech(NamedTuple):
    """A policy's style: mean words per reply, and the share of replies that occur only once."""

    words: float
    distinct: float


def speech(episodes: Iterable[Trace]) -> Speech:
    """The style over all replies of valid episodes. Raises OutputError without any reply."""
    replies = [turn["reply"] for e in episodes if e["failure"] is None for turn in e["turns"]]
    if not replies:
        raise OutputError("no valid episode has a reply")
    return Speech(sum(len(reply.split()) for reply in replies) / len(replies), len(set(replies)) / len(replies))


def typical_scenario(before: Sequence[Trace], after: Sequence[Trace]) -> str:
    """The scenario with the median change of score."""
    old, new = _scores(before), _scores(after)
    changes = {name: new[name] - old[name] for name in sorted(old.keys() & new.keys())}
    if not changes:
        raise OutputError("no scenario has a valid episode both before and after training")
    return sorted(changes, key=lambda name: changes[name])[len(changes) // 2]


def show_run(path: Path, console: Console, *, scenario: str | None = None) -> None:
    """Print a finished run, and errors in its files. Raises OutputError for a folder without a finished run, for damaged figures,
    and for a scenario that was not played."""
    folder = RunFolder(require_folder(path))
    summary, bad_figures = checked_summary(path)
    if summary is None:
        raise OutputError(f"{path}: no summary.json; expected a finished run with a validation section")
    (before, problems), (after, others) = (_validation(folder, figures) for figures in (summary.before, summary.after))
    chosen = scenario or typical_scenario(before, after)
    played = _scores(before).keys() & _scores(after).keys()
    if chosen not in played:
        raise OutputError(f"--scenario {chosen!r}: not played both before and after; expected one of {', '.join(sorted(played))}")
    noun = "scenario" if summary.environment is None else "task"
    console.print(_table(summary, speech(before), speech(after), noun))
    console.print(f"{_improvement(summary.improvement, noun, summary.environment)}\n", markup=False, highlight=False)
    if summary.other is not None:
        both = "the score with the user of training less the score with the other user"
        ends = f"gap before: {summary.other.gap_before}\ngap after: {summary.other.gap_after}"
        print_line(console, f"{ends}\n({both}, paired over {noun}s)\n")
    if summary.settings is not None:  # a user's own environment has none
        settings: dict[str, Any] = {**summary.settings}
        measured = eibench_on(settings.pop("data_set"))
        print_line(console, f"{measured}: {in_words(settings)}\n")
    if left_out := [f"{n} of {name}" for name, n in summary.skipped.items() if n]:
        print_line(console, f"invalid records left out: {', '.join(left_out)}\n")
    console.print(_dialogues(_typical(before, chosen), _typical(after, chosen), console.width))
    print_line(
        console,
        f"trained policy  {folder.final}\nbase policy     {folder.base if folder.base.exists() else 'policy.model of the recipe'}\n"
        f"all dialogues   {folder.traces}\nfigures         {path / 'summary.json'}, {folder.metrics_file}\nother dialogue  "
        f"ctcgrpo show {path} --scenario ID",
    )
    for problem in (*alarm_texts(summary.gamed), *problems, *others, *bad_figures):
        print_line(console, f"warning: {problem}", "yellow")


def _improvement(gain: Improvement, noun: str, environment: str | None) -> str:
    if gain.overall is None or gain.ci95 is None:
        return f"improvement unknown: no {noun} has a valid episode both before and after training"
    low, high = gain.ci95
    score = "score in [-1, 1]" if environment is None else f"outcome of {environment}"
    return (
        f"improvement {gain.overall:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}\n"
        f"({score}, mean over {gain.n} {noun}s; paired bootstrap over {noun}s)"
    )


def _validation(folder: RunFolder, figures: Figures) -> tuple[Sequence[Trace], list[str]]:
    step = figures.step
    episodes, problems = read_traces(folder.traces_of(f"{VALIDATION}-{step:06d}"))
    if not episodes:
        why = f" that can be read ({problems[0]})" if problems else ""
        raise OutputError(f"{folder.traces}: no dialogues of the validation after step {step}{why}")
    scores = _scores(episodes).values()
    mean = sum(scores) / len(scores) if scores else None
    if not problems and not same(mean, figures.overall):
        both = f"the mean score is {mean} in traces, {figures.overall} in summary.json"
        problems.append(f"validation after step {step}: {both}; one of them is damaged")
    return episodes, problems


def _scores(episodes: Sequence[Trace]) -> dict[str, float]:
    """The mean outcome of each scenario that has a valid episode."""
    return means((e["task"], e["outcome"]) for e in episodes if e["outcome"] is not None)


def _typical(episodes: Sequence[Trace], scenario: str) -> Trace:
    """The episode of a scenario whose outcome is the median one."""
    played = [e for e in episodes if e["task"] == scenario and e["outcome"] is not None]
    return sorted(played, key=lambda e: e["outcome"])[len(played) // 2]


def _table(summary: Summary, before: Speech, after: Speech, noun: str) -> Table:
    table = Table("", title=f"held-out {noun}s, before and after {summary.after.step} steps")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    a, b = summary.before, summary.after
    table.add_row("overall", *_change(a.overall, b.overall), style="bold")
    for scene in [name for name in {**a.scenes, **b.scenes} if name != NO_TAG]:
        table.add_row(Text(scene), *_change(a.scenes.get(scene), b.scenes.get(scene)))
    if (other := summary.other) is not None:
        table.add_section()
        table.add_row("with the other user", *_change(other.before.overall, other.after.overall))
    table.add_section()
    table.add_row("words a reply", f"{before.words:.1f}", f"{after.words:.1f}", f"{after.words - before.words:+.1f}")
    distinct = (f"{before.distinct:.0%}", f"{after.distinct:.0%}", f"{after.distinct - before.distinct:+.0%}")
    table.add_row("distinct replies", *distinct)
    return table


def _change(before: float | None, after: float | None) -> tuple[str, str, str]:
    shown = ["-" if x is None else f"{x:+.3f}" for x in (before, after)]
    return shown[0], shown[1], "-" if before is None or after is None else f"{after - before:+.3f}"


def _dialogues(before: Trace, after: Trace, width: int) -> Group | Table:
    """Both dialogues, side by side where the terminal is wide enough, else one above the other."""
    panels = _dialogue(before, "before"), _dialogue(after, "after")
    if width < _SIDE_BY_SIDE:
        return Group(*panels)
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return table


def _dialogue(episode: Trace, title: str) -> Panel:
    lines: list[Text] = []
    if episode["opening"]:
        lines.append(Text(f"User: {episode['opening']}"))
    numbers = numbers_by_turn(episode)
    for k, turn in enumerate(episode["turns"], 1):
        if turn["reasoning"]:
            lines.append(Text(f"({turn['reasoning']})", style="dim italic"))
        lines.append(Text(f"Policy: {turn['reply'] or '(nothing)'}", style="bold"))
        reward = turn["reward"]
        mood = "dim" if not reward else "green" if reward > 0 else "red"
        earned = "not scored" if reward is None else f"reward {reward:+.3f}"
        moved = [f"{name} {path[k] - path[k - 1]:+g}" for name, path in numbers.items()] or [earned]
        info_texts = [str(value) for value in turn["info"].values() if isinstance(value, str) and value]
        lines.append(Text(f"  {', '.join(moved)}{': ' if info_texts else ''}{'; '.join(info_texts)}", style=mood))
        if turn["message"]:
            lines.append(Text(f"User: {turn['message']}"))
    # In the body, where it wraps: a panel's title and subtitle are cut off in a narrow terminal.
    ends = [f"{name} {path[0]:g} to {path[-1]:g}" for name, path in numbers.items()]
    foot = ", ".join([f"score {episode['outcome']:+.2f}", *ends])
    return Panel(Group(*lines, Rule(style="dim"), Text(foot)), title=Text(f"{title}: {episode['task']}"))
