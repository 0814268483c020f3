"""`ctcgrpo scenarios ...`."""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from ctcgrpo.environments.eibench.records import SCENES, Scenario, in_order
from ctcgrpo.environments.eibench.scenario_format import Split
from ctcgrpo.environments.eibench.scenarios import by_scene, has_splits, load_scenarios, load_set, read_records
from ctcgrpo.errors import RecipeError, RunFailed, ScenarioError
from ctcgrpo.run.startup import announce_loading
from ctcgrpo.util.importing import installing
from ctcgrpo.util.terminal import Terminal, log_line

Record = dict[str, Any]
app = typer.Typer(help="Fetch, generate, check and convert sets of scenarios.", no_args_is_help=True)
Source = Annotated[
    str, typer.Argument(help="A path, a bundled pack (english/train), a dataset (eibench/train), or hf://datasets/OWNER/NAME.")
]
Part = Annotated[Split, typer.Option(help="The folder, where the source has both.")]
Threshold = Annotated[float, typer.Option(min=0.05, max=1.0, help="TF-IDF cosine from which two records are duplicates.")]


@app.command()
def validate(
    source: Source,
    split: Annotated[Split, typer.Option(help="The folder, and the defaults for missing anchors.")] = "train",
    loose: Annotated[bool, typer.Option("--loose", help="Report only errors that make a record unplayable.")] = False,
) -> None:
    """Check scenarios against every rule, and list each problem with file, line and field."""
    from ctcgrpo.factory.rules import Problem, problems
    from ctcgrpo.simulator.scripted.knowledge import unscripted_warning

    unreadable: list[Problem] = []

    def bad(place: str, message: str) -> None:
        unreadable.append(Problem(place, "?", "format", "", message))

    records = list(read_records(source, split, bad))
    found = [*unreadable, *problems(records, split)]
    broken = [problem for problem in found if not loose or problem.rule in ("format", "unique")]
    for problem in broken:
        log_line(problem)
    if broken:
        worst, every = len({problem.place for problem in broken}), len(records) + len(unreadable)
        count = f"{len(broken)} {'problem' if len(broken) == 1 else 'problems'} in {worst} of {every} records"
        raise ScenarioError(f"{source}: {count}, all listed above{_consequence(source, split)}")
    valid = load_scenarios(source, split)
    log_line(f"{source}: {len(valid)} scenarios ({by_scene(valid)})" + ("" if loose else "; every rule holds"))
    if own := [scene for scene in in_order(s.scene for s in valid) if scene not in SCENES]:
        log_line(
            f"note: {', '.join(own)}: not a published scene ({', '.join(SCENES)}). The scripted user plays such a scene like "
            f"support, and an LLM user gets only the persona; to train on it, name it in scenarios.scenes"
        )
    if warning := unscripted_warning(valid, "scenarios"):
        log_line(f"note: {warning}")


def _consequence(source: str, split: Split) -> str:
    """What training and evaluation do with the invalid records of a source."""
    from ctcgrpo.environments.eibench.scenarios import read_scenarios

    found = read_scenarios(source, split)
    if found.refusals:
        return "; a run refuses the set"
    left_out = f"; a run with scenarios.invalid=skip leaves out {found.skipped}, and trains on {len(found.scenarios)}"
    return left_out if found.skipped else "; a run plays them all (--loose checks only what a run needs)"


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write, NAME.jsonl; notes on its fields go to NAME.md.")],
    scene: Annotated[str, typer.Option(help="The situation: support, defense, repair, charm, or your own.")] = "support",
    language: Annotated[Literal["en", "zh"], typer.Option(help="Of the example.")] = "en",
) -> None:
    """Write an example record to start your own set from, with notes on what each field is for."""
    from ctcgrpo.factory.example import write_example

    record, notes = write_example(file, scene, language)
    log_line(f"{record}: one complete {scene} scenario; change its texts to yours\n{notes}: what each field is for")
    log_line(f"next: ctcgrpo scenarios validate {record}")


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="eibench")],
    source: Annotated[str | None, typer.Option(help="Another URL, or a folder with its train/ and test/.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the licence without being asked.")] = False,
    unverified: Annotated[bool, typer.Option("--unverified", help="Do not compare with the published commit.")] = False,
) -> None:
    """Fetch a dataset that is not part of this package, under $CTCGRPO_DATA (default ~/.cache/ctcgrpo).

    Each file is compared with the published commit, whose list of files GitHub's API gives."""
    from ctcgrpo.environments.eibench.fetch import DataSet
    from ctcgrpo.environments.eibench.fetch import fetch as fetched

    def agree(found: DataSet) -> bool:
        log_line(f"{found.title}\nlicence: {found.licence}")
        return yes or typer.confirm("Fetch it?")

    log_line(f"written to {fetched(dataset, agree, source=source, verify=not unverified)}")


@app.command()
def generate(
    config: Annotated[Path, typer.Argument(help="Who writes, and from what (configs/factory).")],
    out: Annotated[Path, typer.Argument(help="The folder that the set is written to.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenarios to request.")] = 200,
    against: Annotated[
        list[str] | None, typer.Option(help="A held-out set whose near-duplicates are dropped; repeatable.")
    ] = None,
) -> None:
    """Generate scenarios from seeds with a model; the same command resumes."""
    with _needs_the_extra():
        from ctcgrpo.factory.generate import REPORT, check_target, write_set
        from ctcgrpo.factory.generate import generate as written
    from ctcgrpo.factory.config import load_factory_config
    from ctcgrpo.factory.gate import gate

    settings = load_factory_config(config)
    check_target(out, settings)
    outcomes, spent = written(settings, count=count, held_out=_held_out(against))
    files = write_set(outcomes, out, settings)
    for outcome in outcomes:
        for line in (*outcome.repairs, *outcome.reasons):
            log_line(f"{outcome.asked.id}: {outcome.status}: {line}")
    for verdict in map(gate, load_scenarios(out) if files else ()):
        if verdict.problem:
            log_line(f"{verdict.id}: gate: {verdict.problem}")
    log_line(f"{len(outcomes)} requested: {_counted(outcomes)}; report: {out / REPORT}")
    money = f", {spent['money']:.2f} {spent['currency']}" if spent["money"] else ""  # none without prices
    tokens = f"{spent['prompt_tokens']} + {spent['completion_tokens']} tokens"
    log_line(f"all answers in {settings.store}: {spent['calls']} calls, {tokens}{money}")
    if unanswered := sum(outcome.status == "unanswered" for outcome in outcomes):
        raise RunFailed(f"{unanswered} requests got no answer; the same command re-runs them")


@app.command()
def clean(
    source: Source,
    out: Annotated[Path, typer.Argument(help="A new folder for the set.")],
    split: Part = "train",
    config: Annotated[Path | None, typer.Option(help="A model (configs/factory) for records that no rule can repair.")] = None,
) -> None:
    """Repair anchors and the layout of personas, and show every change."""
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
        for line in (*cleaned.differences, *(f"{cleaned.status}: {reason}" for reason in cleaned.reasons)):
            log_line(f"{cleaned.record.get('id')}: {line}")
    kept = [cleaned.record for cleaned in found if cleaned.status != "no scenario"]
    write_layout(kept, out)
    log_line(f"{source}: {_counted(found)}; {len(kept)} records are in {out}")
    if bad := sum(cleaned.status in ("left", "no scenario") for cleaned in found):
        raise ScenarioError(f"{source}: {bad} records could not be cleaned; the reasons are listed above")


@app.command()
def gate(source: Source, split: Part = "train") -> None:
    """Report scenarios in which the scripted user does not tell good replies from bad ones."""
    from ctcgrpo.factory.gate import gate as played

    verdicts = [played(scenario) for scenario in _valid(source, split)]
    failed = [verdict for verdict in verdicts if verdict.problem]
    for verdict in failed:
        outcomes = f" ({_outcomes(verdict.good, verdict.mediocre, verdict.bad)})"
        log_line(f"{verdict.id}: {verdict.problem}{'' if math.isnan(verdict.good) else outcomes}")
    if failed:
        raise ScenarioError(f"{source}: {len(failed)} of {len(verdicts)} scenarios fail the gate; the reasons are listed above")
    good, mediocre, bad = (fmean(of) for of in zip(*((v.good, v.mediocre, v.bad) for v in verdicts), strict=True))
    log_line(f"{source}: {len(verdicts)} scenarios pass; mean outcomes: {_outcomes(good, mediocre, bad)}")


def _outcomes(good: float, mediocre: float, bad: float) -> str:
    return f"good {good:+.2f}, mediocre {mediocre:+.2f}, bad {bad:+.2f}"


@app.command()
def dedup(
    source: Source,
    against: Annotated[list[str] | None, typer.Option(help="A held-out set to search for near-duplicates; repeatable.")] = None,
    split: Part = "train",
    threshold: Threshold = 0.5,
    out: Annotated[Path | None, typer.Option(help="Write the set there, with the first of those alike.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Pairs to show with their texts.")] = 10,
) -> None:
    """Find near-duplicates in a set and between sets; without --out any of them exits with 3."""
    with _needs_the_extra():
        from ctcgrpo.factory.duplicates import duplicates, to_drop
        from ctcgrpo.factory.storage import check_new, write_layout

    if out is not None:
        check_new(out)
    records = _records(source, split)
    held_out = _held_out(against)
    within = duplicates(records, threshold=threshold)
    leaks = duplicates(records, held_out, threshold=threshold) if held_out else []
    for title, pairs, others in (("within the set", within, records), ("leaks from held-out sets", leaks, held_out)):
        if pairs:
            table = Table("", "record", "is like", "what they say", show_lines=True)
            table.title = escape(f"{source}: {len(pairs)} pairs {title}")
            for pair in pairs[:show]:
                a, b = records[pair.a], others[pair.b]
                table.add_row(str(pair), *map(escape, (str(a.get("id")), str(b.get("id")), f"{_excerpt(a)}\n{_excerpt(b)}")))
            Terminal(132).print(table)
    dropped = to_drop(records, within, held_out, leaks)
    for k, reason in dropped.items():
        log_line(f"{records[k]['id']}: {reason}")
    log_line(
        f"{source}: {len(dropped)} of {len(records)} records are duplicates ({len(within)} pairs within, {len(leaks)} leaks)"
    )
    if out is not None:
        files = write_layout([record for k, record in enumerate(records) if k not in dropped], out)
        log_line(f"{len(records) - len(dropped)} records left: {', '.join(map(str, files))}")
    elif dropped:
        raise ScenarioError(f"{source}: {len(dropped)} duplicates; expected none; --out FOLDER writes the set without them")


@app.command()
def stats(
    source: Source,
    split: Part = "train",
    tokenizer: Annotated[str | None, typer.Option(help="The model whose tokens measure lengths (default: characters).")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw a plot to this PNG file.")] = None,
) -> None:
    """Print statistics of a set's balance: scenes, seeds, lengths, anchors."""
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
        Terminal(132).print(table)
    if picture is not None:
        from ctcgrpo.factory.storage import writing

        with writing(picture):
            write_picture(found, picture)
        log_line(f"drawn: {picture}")


@app.command()
def split(
    source: Source,
    out: Annotated[Path, typer.Argument(help="A new folder; train/ and test/ are written there.")],
    share: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of each scene to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threshold: Threshold = 0.5,
) -> None:
    """Split a set by scene; records that are alike stay on one side."""
    with _needs_the_extra():
        from ctcgrpo.factory.duplicates import held_out
        from ctcgrpo.factory.storage import check_new, write_layout

    check_new(out)
    records = _records(source, "train")
    chosen = held_out(records, share=share, seed=seed, threshold=threshold)
    parts: dict[str, list[Record]] = {"train": [], "test": []}
    for record, is_test in zip(records, chosen, strict=True):
        parts["test" if is_test else "train"].append(record)
    if empty := next((name for name, part in parts.items() if not part), None):
        raise ScenarioError(f"--share = {share:g}: no record of {source} is left for {empty}; try another share")
    for name, part in parts.items():
        write_layout(part, out / name)
        log_line(f"{out / name}: {len(part)} records")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Files of scenarios, or a dataset: a folder, or hf://datasets/OWNER/NAME.")],
    target: Annotated[str, typer.Argument(help="A new folder; or hf://datasets/OWNER/NAME to upload (private).")],
    licence: Annotated[str | None, typer.Option(help="Of records that say none.")] = None,
    origin: Annotated[str | None, typer.Option("--source", help="Of records that say none.")] = None,
) -> None:
    """Convert a set between EIBench's layout and `datasets` (Arrow, Hub) without loss."""
    from ctcgrpo.factory.storage import HUB, check_new, load_splits, save_dataset, with_origin, write_layout

    def complete(records: Sequence[Record]) -> list[Record]:
        return [with_origin(record, licence=licence, source=origin) for record in records]

    if source.startswith(HUB) or any((Path(source) / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        if target.startswith(HUB):
            raise RecipeError("source and target are both datasets; expected files of scenarios for one of them")
        check_new(Path(target))
        found = load_splits(source)
        for name, records in found.items():
            folder = Path(target) / name if len(found) > 1 or has_splits(source) else Path(target)
            log_line(f"{', '.join(map(str, write_layout(complete(records), folder)))}: {len(records)} records")
        return
    names: Sequence[Split] = ("train", "test") if has_splits(source) else ("train",)
    splits: dict[str, list[Record]] = {name: complete(_records(source, name)) for name in names}
    save_dataset(splits, target)
    log_line(f"{target}: {', '.join(f'{len(records)} {name}' for name, records in splits.items())}")


def _valid(source: str, split: Split) -> list[Scenario]:
    found = load_set(source, split)  # whose invalid records are named on standard error
    for line in found.report():
        log_line(line, sys.stderr)
    return found.scenarios


def _held_out(sources: Sequence[str] | None) -> list[Record]:
    return [record for source in sources or () for record in _records(source, "test")]


def _records(source: str, split: Split) -> list[Record]:
    """The raw records of a source, each of which is a scenario. Raises ScenarioError where one is not."""
    load_scenarios(source, split)
    return [record for _, record in read_records(source, split)]


def _counted(results: Sequence[Any]) -> str:
    return ", ".join(f"{n} {status}" for status, n in sorted(Counter(result.status for result in results).items()))


def _excerpt(record: Record) -> str:
    opening = (record.get("aggressor_profile") or {}).get("opening_line") or record.get("goal_one_liner") or ""
    return f"{record.get('title', '')}: {opening}"[:110]


@contextlib.contextmanager
def _needs_the_extra() -> Iterator[None]:
    """Around imports of what the extra factory brings."""
    try:
        yield
    except ImportError as error:
        raise RecipeError(f"this command needs the extra factory: {installing('factory')} ({error})") from None
