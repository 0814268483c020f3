"""`ctcgrpo scenarios ...`."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from ctcgrpo.environments.eibench.records import SCENES, Scenario, in_order
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import (
    by_scene,
    has_splits,
    load_scenarios,
    load_set,
    read_records,
    read_scenarios,
)
from ctcgrpo.errors import RecipeError, RunFailed, ScenarioError
from ctcgrpo.run.startup import announce_loading
from ctcgrpo.util.terminal import Terminal, say

app = typer.Typer(help="Fetch, generate, check and convert sets of scenarios.", no_args_is_help=True)
_SOURCE = typer.Argument(help="A path, a bundled pack (english/train) or a dataset (eibench/train).")
_SPLIT = typer.Option(help="The folder, where the source has both.")
_THRESHOLD = typer.Option(min=0.05, max=1.0, help="Similarity (TF-IDF cosine) from which two records count as one.")


@app.command()
def validate(
    source: Annotated[str, _SOURCE],
    split: Annotated[
        Literal["train", "test"], typer.Option(help="The folder, and the defaults for missing anchors.")
    ] = "train",
    loose: Annotated[bool, typer.Option("--loose", help="Only what keeps scenarios from being played.")] = False,
) -> None:
    """Check scenarios against every rule, and list each problem with file, line and field."""
    from ctcgrpo.factory.rules import Problem, problems
    from ctcgrpo.simulator.scripted.knowledge import unscripted_warning

    unreadable: list[Problem] = []
    records = list(
        read_records(source, split, lambda at, message: unreadable.append(Problem(at, "?", "format", "", message)))
    )
    broken = [*unreadable, *problems(records, split)]
    if loose:
        broken = [problem for problem in broken if problem.rule in ("format", "unique")]
    for problem in broken:
        say(problem)
    if broken:
        worst = len({problem.place for problem in broken})
        word = "problem" if len(broken) == 1 else "problems"
        raise ScenarioError(
            f"{source}: {len(broken)} {word} in {worst} of {len(records) + len(unreadable)} records, all listed above"
            f"{_consequence(source, split)}"
        )
    found = load_scenarios(source, split)
    say(f"{source}: {len(found)} scenarios ({by_scene(found)})" + ("" if loose else "; every rule holds"))
    if own := [scene for scene in in_order(s.scene for s in found) if scene not in SCENES]:
        say(
            f"note: {', '.join(own)}: not in the published set ({', '.join(SCENES)}). The scripted user hears replies there as in "
            f"support, an LLM user is told no more than the persona; a recipe names such scenes in scenarios.scenes"
        )
    if warning := unscripted_warning(found, "scenarios"):
        say(f"note: {warning}")


def _consequence(source: str, split: Split) -> str:
    """What training and evaluation make of the invalid records of a source."""
    found = read_scenarios(source, split)
    if found.refusals:
        return "; a run refuses the set"
    left_out = f"; a run with scenarios.invalid=skip leaves out {found.skipped}, and trains on {len(found.scenarios)}"
    return left_out if found.skipped else ""


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write, NAME.jsonl; notes on its fields go to NAME.md.")],
    scene: Annotated[
        str, typer.Option(help="The kind of situation: support, defense, repair, charm, or a name of your own.")
    ] = "support",
    language: Annotated[Literal["en", "zh"], typer.Option(help="Of the example.")] = "en",
) -> None:
    """Write an example record to start your own set from, with notes on what each field is for."""
    from ctcgrpo.factory.example import write_example

    record, notes = write_example(file, scene, language)
    say(f"{record}: one complete {scene} scenario; change its texts to yours\n{notes}: what each field is for")
    say(f"next: ctcgrpo scenarios validate {record}")


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="eibench")],
    source: Annotated[str | None, typer.Option(help="Another URL, or a folder with its train/ and test/.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the licence without being asked.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take the files without comparing them with the published commit.")
    ] = False,
) -> None:
    """Fetch a dataset that is not part of this package, under $CTCGRPO_DATA (default ~/.cache/ctcgrpo).

    Each file is compared with the published commit, whose list of files GitHub's API gives.
    """
    from ctcgrpo.environments.eibench.fetch import DataSet
    from ctcgrpo.environments.eibench.fetch import fetch as fetched

    def agree(found: DataSet) -> bool:
        say(f"{found.title}\nlicence: {found.licence}")
        return yes or typer.confirm("Fetch it?")

    say(f"it is in {fetched(dataset, agree, source=source, verify=not unverified)}")


@app.command()
def generate(
    config: Annotated[Path, typer.Argument(help="Who writes, and from what (configs/factory).")],
    out: Annotated[Path, typer.Argument(help="The folder that the set is written to.")],
    count: Annotated[int, typer.Option(min=1, help="Scenarios that are asked for.")] = 200,
    against: Annotated[list[str] | None, typer.Option(help="A held-out set that none may be like; several.")] = None,
) -> None:
    """Generate scenarios from seeds with a model; the same command resumes."""
    with _needs_the_extra():
        from ctcgrpo.factory.generate import REPORT, check_target, counted, write_set
        from ctcgrpo.factory.generate import generate as written
    from ctcgrpo.factory.config import load_factory_config
    from ctcgrpo.factory.gate import gate

    settings = load_factory_config(config)
    check_target(out, settings)
    held = [record for name in against or () for record in _records(name, "test")]
    outcomes, spent = written(settings, count=count, held_out=held)
    files = write_set(outcomes, out, settings)
    for outcome in outcomes:
        for told in (*outcome.repairs, *outcome.reasons):
            say(f"{outcome.asked.id}: {outcome.status}: {told}")
    for verdict in (gate(scenario) for scenario in (load_scenarios(out) if files else ())):
        if verdict.problem:
            say(f"{verdict.id}: gate: {verdict.problem}")
    states = counted(outcomes)
    say(f"{len(outcomes)} asked for: {', '.join(f'{n} {status}' for status, n in sorted(states.items()))}; {out / REPORT}")
    say(
        f"all answers in {settings.store}: {spent['calls']} calls, {spent['prompt_tokens']} + {spent['completion_tokens']} tokens, "
        f"{spent['money']:.2f} {spent['currency']}"
    )
    if states["unanswered"]:
        raise RunFailed(f"{states['unanswered']} requests got no answer; the same command asks for them again")


@app.command()
def clean(
    source: Annotated[str, _SOURCE],
    out: Annotated[Path, typer.Argument(help="A new folder for the set.")],
    split: Annotated[Literal["train", "test"], _SPLIT] = "train",
    config: Annotated[
        Path | None, typer.Option(help="A model for what no rule can mend (configs/factory); else that is left as it is.")
    ] = None,
) -> None:
    """Repair anchors and the layout of personas, and show every change."""
    with _needs_the_extra():
        from ctcgrpo.factory.cleaning import by_model, by_rule
        from ctcgrpo.factory.storage import check_new, write_layout

    check_new(out)
    found = [by_rule(record, place) for place, record in read_records(source, split)]
    left = [k for k, cleaned in enumerate(found) if cleaned.status == "left"]
    if config is not None and left:
        from ctcgrpo.factory.config import load_factory_config

        for k, cleaned in zip(left, by_model([found[k] for k in left], load_factory_config(config)), strict=True):
            found[k] = cleaned
    for cleaned in found:
        for told in (*cleaned.differences, *(f"{cleaned.status}: {reason}" for reason in cleaned.reasons)):
            say(f"{cleaned.record.get('id')}: {told}")
    kept = [cleaned.record for cleaned in found if cleaned.status != "no scenario"]
    write_layout(kept, out)
    states = Counter(cleaned.status for cleaned in found)
    told = ", ".join(f"{n} {status}" for status, n in sorted(states.items()))
    say(f"{source}: {told}; {len(kept)} records are in {out}")
    if bad := states["left"] + states["no scenario"]:
        raise ScenarioError(f"{bad} records of {source} could not be cleaned; each says why above")


@app.command()
def gate(
    source: Annotated[str, _SOURCE],
    split: Annotated[Literal["train", "test"], _SPLIT] = "train",
) -> None:
    """Report scenarios in which the scripted user does not tell good replies from bad ones."""
    from ctcgrpo.factory.gate import gate as played

    verdicts = [played(scenario) for scenario in _valid(source, split)]
    failed = [verdict for verdict in verdicts if verdict.problem]
    for verdict in failed:
        say(f"{verdict.id}: {verdict.problem} ({_outcomes(verdict.good, verdict.mediocre, verdict.bad)})")
    if failed:
        raise ScenarioError(f"{len(failed)} of {len(verdicts)} scenarios of {source} do not pass the gate")
    n = len(verdicts)
    means = (sum(v.good for v in verdicts) / n, sum(v.mediocre for v in verdicts) / n, sum(v.bad for v in verdicts) / n)
    say(f"{source}: {n} scenarios pass; mean outcomes: {_outcomes(*means)}")


def _outcomes(good: float, mediocre: float, bad: float) -> str:
    return f"good {good:+.2f}, mediocre {mediocre:+.2f}, bad {bad:+.2f}"


@app.command()
def dedup(
    source: Annotated[str, _SOURCE],
    against: Annotated[list[str] | None, typer.Option(help="A held-out set that must not leak in; several.")] = None,
    split: Annotated[Literal["train", "test"], _SPLIT] = "train",
    threshold: Annotated[float, _THRESHOLD] = 0.5,
    out: Annotated[
        Path | None, typer.Option(help="Write the set without them there: of those alike the first stays.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Pairs to show with their texts.")] = 10,
) -> None:
    """Find near-duplicates in a set and between sets; without --out any of them exits with 3."""
    with _needs_the_extra():
        from ctcgrpo.factory.duplicates import duplicates, to_drop
        from ctcgrpo.factory.storage import check_new, write_layout

    if out is not None:
        check_new(out)
    records = _records(source, split)
    held = [record for name in against or () for record in _records(name, "test")]
    within = duplicates(records, threshold=threshold)
    leaks = duplicates(records, held, threshold=threshold) if held else []
    console = _console()
    for title, pairs, others in (("within the set", within, records), ("leaks from held-out sets", leaks, held)):
        if pairs:
            console.print(_pairs_table(f"{source}: {len(pairs)} pairs {title}", pairs[:show], records, others))
    dropped = to_drop(records, within, held, leaks)
    for k, reason in dropped.items():
        say(f"{records[k]['id']}: {reason}")
    say(f"{source}: {len(dropped)} of {len(records)} records have to go ({len(within)} pairs within, {len(leaks)} leaks)")
    if out is not None:
        files = write_layout([record for k, record in enumerate(records) if k not in dropped], out)
        say(f"{len(records) - len(dropped)} records without them: {', '.join(map(str, files))}")
    elif dropped:
        raise ScenarioError(f"{source} holds duplicates; --out FOLDER writes the set without them")


@app.command()
def stats(
    source: Annotated[str, _SOURCE],
    split: Annotated[Literal["train", "test"], _SPLIT] = "train",
    tokenizer: Annotated[str | None, typer.Option(help="A model whose tokens lengths are in; else characters.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it as well, to this PNG.")] = None,
) -> None:
    """Print how balanced a set is, by scene, seed, length and anchors."""
    with _needs_the_extra():
        from ctcgrpo.factory.stats import stats_of, tables_of, write_picture

    count: Callable[[str], int] | None = None
    if tokenizer is not None:
        announce_loading(f"counting the tokens of {source}")
        from ctcgrpo.policy.loading import load_tokenizer

        loaded = load_tokenizer(tokenizer)

        def count(text: str) -> int:
            return len(loaded.encode(text, add_special_tokens=False))

    found = stats_of(_valid(source, split), count)
    for table in tables_of(found, source):
        _console().print(table)
    if picture is not None:
        from ctcgrpo.factory.storage import writing

        with writing(picture):
            write_picture(found, picture)
        say(f"drawn: {picture}")


@app.command()
def split(
    source: Annotated[str, _SOURCE],
    out: Annotated[Path, typer.Argument(help="A new folder; train/ and test/ are written there.")],
    share: Annotated[float, typer.Option(min=0.0, max=0.9, help="Held out, of each scene.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threshold: Annotated[float, _THRESHOLD] = 0.5,
) -> None:
    """Split a set by scene; records that are alike stay on one side."""
    with _needs_the_extra():
        from ctcgrpo.factory.splitting import held_out
        from ctcgrpo.factory.storage import check_new, write_layout

    check_new(out)
    records = _records(source, "train")
    chosen = held_out(records, share=share, seed=seed, threshold=threshold)
    parts = {
        name: [record for record, is_test in zip(records, chosen, strict=True) if is_test == wanted]
        for name, wanted in (("train", False), ("test", True))
    }
    if empty := next((name for name, part in parts.items() if not part), None):
        raise ScenarioError(f"{source}: with --share {share:g} no record is left for {empty}")
    for name, part in parts.items():
        write_layout(part, out / name)
        say(f"{out / name}: {len(part)} records")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Scenarios as files, or a dataset: its folder, or hf://datasets/OWNER/NAME.")
    ],
    target: Annotated[str, typer.Argument(help="A new folder; or hf://datasets/OWNER/NAME to upload (private).")],
    licence: Annotated[str | None, typer.Option(help="Of records that say none.")] = None,
    origin: Annotated[str | None, typer.Option("--source", help="Of records that say none.")] = None,
) -> None:
    """Convert a set between EIBench's layout and `datasets` (Arrow, Hub) without loss."""
    from ctcgrpo.factory.storage import HUB, check_new, load_splits, save_dataset, with_origin, write_layout

    if source.startswith(HUB) or any((Path(source) / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        if target.startswith(HUB):
            raise RecipeError("one dataset is not converted to another; the Hub copies them")
        check_new(Path(target))
        found = load_splits(source)
        for name, loaded in found.items():
            records = [with_origin(record, licence=licence, source=origin) for record in loaded]
            folder = Path(target) / name if len(found) > 1 or has_splits(source) else Path(target)
            say(f"{', '.join(map(str, write_layout(records, folder)))}: {len(records)} records")
        return
    names: Sequence[Split] = ("train", "test") if has_splits(source) else ("train",)
    splits: dict[str, list[dict[str, Any]]] = {
        name: [with_origin(record, licence=licence, source=origin) for record in _records(source, name)] for name in names
    }
    save_dataset(splits, target)
    say(f"{target}: {', '.join(f'{len(records)} {name}' for name, records in splits.items())}")


def _valid(source: str, split: Split) -> list[Scenario]:
    """The scenarios of a source; its invalid records are named on standard error."""
    found = load_set(source, split)
    for line in found.report():
        say(line, sys.stderr)
    return found.scenarios


def _records(source: str, split: Split) -> list[dict[str, Any]]:
    """The raw records of a source, each of which is a scenario. Raises ScenarioError where one is not."""
    load_scenarios(source, split)
    return [record for _, record in read_records(source, split)]


def _pairs_table(
    title: str, pairs: Sequence[Any], records: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> Table:
    table = Table(title=escape(title), show_lines=True)
    for name in ("", "record", "is like", "what they say"):
        table.add_column(name)
    for pair in pairs:
        a, b = records[pair.a], others[pair.b]
        table.add_row(str(pair), *map(escape, (str(a.get("id")), str(b.get("id")), f"{_excerpt(a)}\n{_excerpt(b)}")))
    return table


def _excerpt(record: Mapping[str, Any]) -> str:
    opening = (record.get("aggressor_profile") or {}).get("opening_line") or record.get("goal_one_liner") or ""
    return f"{record.get('title', '')}: {opening}"[:110]


def _console() -> Terminal:
    return Terminal(132)


@contextlib.contextmanager
def _needs_the_extra() -> Iterator[None]:
    """Around imports of what `pip install ctcgrpo[factory]` brings."""
    try:
        yield
    except ImportError as error:
        raise RecipeError(f"this needs the extra factory: pip install 'ctcgrpo[factory]' ({error})") from None
