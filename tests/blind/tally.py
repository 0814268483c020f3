"""From a blind reader's answers and the key to shares with their 95 % intervals (Wilson)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctcgrpo.errors import OutputError
from ctcgrpo.util.files import collect_records, explained, read_json
from ctcgrpo.util.intervals import share_interval
from tests.blind.sheets import LINES, PAIRS, Side

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
_KEY = ConfigDict(strict=True, extra="ignore", frozen=True)


class PairAnswer(BaseModel):
    model_config = _STRICT
    pair: int
    prefers: Literal["A", "B", "tie"]
    reason: str


class LineAnswer(BaseModel):
    model_config = _STRICT
    line: int
    passes: bool
    reason: str = ""


class KeyPair(BaseModel):
    model_config = _KEY
    pair: int
    run: str
    trained: Literal["A", "B"]


class KeyLine(BaseModel):
    model_config = _KEY
    line: int
    side: Side
    runs: list[str]
    dialogue: int


class _PairsKey(BaseModel):
    model_config = _KEY
    pairs: list[KeyPair]


class _LinesKey(BaseModel):
    model_config = _KEY
    lines: list[KeyLine]


class Key(BaseModel):
    """Both keys of a folder by number; one of them may be empty."""

    pairs: dict[int, KeyPair]
    lines: dict[int, KeyLine]


class Reader(BaseModel):
    """The valid answers of one reader by number, each number once, and what is wrong with the other lines of the file."""

    name: str
    pairs: dict[int, PairAnswer]
    lines: dict[int, LineAnswer]
    problems: list[str]


_M = TypeVar("_M", bound=BaseModel)


def tally(folder: Path, answers: Sequence[Path], console: Console) -> list[str]:
    """Print the figures of each reader; what is wrong with the answers. Raises OutputError for a folder without a key, and for
    files of answers that are not there."""
    key = read_key(folder)
    readers = [read_answers(file, key) for file in answers]
    for reader in readers:
        if reader.pairs:
            console.print(preferences(reader, key.pairs))
            _print_reasons(reader, key.pairs, console)
        if reader.lines:
            console.print(passes(reader, key.lines))
    if len(readers) > 1:
        _print_agreement(readers, console)
    problems = [problem for reader in readers for problem in reader.problems]
    for problem in problems:
        console.print(f"warning: {problem}", markup=False, highlight=False, soft_wrap=True)
    return problems


def read_key(folder: Path) -> Key:
    """Raises OutputError where the folder holds neither key, or a damaged one."""
    pairs = _key_file(folder / f"{PAIRS}.key.json", _PairsKey)
    lines = _key_file(folder / f"{LINES}.key.json", _LinesKey)
    if pairs is None and lines is None:
        raise OutputError(f"{folder}: no {PAIRS}.key.json and no {LINES}.key.json; `python -m tests.blind pairs` writes them")
    return Key(pairs={p.pair: p for p in pairs.pairs} if pairs else {}, lines={x.line: x for x in lines.lines} if lines else {})


def _key_file(file: Path, model: type[_M]) -> _M | None:
    if not file.exists():
        return None
    try:
        return model.model_validate(read_json(file))
    except ValidationError as error:
        raise OutputError(f"{file}: {explained(error)}; it is not as it was written") from None


def read_answers(file: Path, key: Key) -> Reader:
    """Raises OutputError for a file that is not there."""
    if not file.is_file():
        raise OutputError(f"{file}: no such file; expected the answers of a reader, one JSON object a line")
    pairs, lines = dict[int, PairAnswer](), dict[int, LineAnswer]()

    def take(record: dict[str, object]) -> None:
        if ("pair" in record) == ("line" in record):
            raise ValueError("expected an answer with either pair or line")
        if "pair" in record:
            pair = PairAnswer.model_validate(record)
            _refuse_number("pair", pair.pair, key.pairs, pairs)
            pairs[pair.pair] = pair
        else:
            line = LineAnswer.model_validate(record)
            _refuse_number("line", line.line, key.lines, lines)
            lines[line.line] = line

    _, problems = collect_records(file, take)
    for what, asked, given in (("pairs", key.pairs, pairs), ("lines", key.lines, lines)):
        missing = [number for number in asked if number not in given]
        if given and missing:
            problems.append(f"{file.name}: no valid answer for {len(missing)} of {len(asked)} {what} ({_listed(missing)})")
    if not pairs and not lines:
        problems.append(f"{file.name}: no valid answer")
    return Reader(name=file.name, pairs=pairs, lines=lines, problems=problems)


def _refuse_number(what: str, number: int, asked: Mapping[int, object], given: Mapping[int, object]) -> None:
    if number not in asked:
        raise ValueError(f"{what} = {number}; expected one of the {len(asked)} in the key")
    if number in given:
        raise ValueError(f"duplicate {what} {number}; the first one counts")


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def preferences(reader: Reader, key: Mapping[int, KeyPair]) -> Table:
    """By run, and of all pairs together: how often the trained policy is preferred."""
    table = Table(title=f"{escape(reader.name)}: which policy is preferred")
    for name in ("run", "pairs", "trained", "untrained", "ties", "trained, of decided (95 %)", "trained, of all (95 %)"):
        table.add_column(name)
    runs = list(dict.fromkeys(pair.run for pair in key.values()))
    groups = [(run, [n for n in reader.pairs if key[n].run == run]) for run in runs]
    for name, numbers in [*groups, *([("all", list(reader.pairs))] if len(runs) > 1 else [])]:
        ties = sum(reader.pairs[n].prefers == "tie" for n in numbers)
        trained = sum(reader.pairs[n].prefers == key[n].trained for n in numbers)
        decided = len(numbers) - ties
        counts = (len(numbers), trained, decided - trained, ties)
        table.add_row(escape(name), *map(str, counts), share(trained, decided), share(trained, len(numbers)))
    first = sum(answer.prefers == "A" for answer in reader.pairs.values())
    table.caption = f"preferred as A: {first} of {sum(a.prefers != 'tie' for a in reader.pairs.values())} decided pairs"
    return table


def passes(reader: Reader, key: Mapping[int, KeyLine]) -> Table:
    """By run and side: lines that pass, and dialogues of which all lines do."""
    table = Table(title=f"{escape(reader.name)}: which lines would pass as a sincere person's")
    for name in ("run", "training", "lines", "lines that pass (95 %)", "dialogues", "whole dialogues that pass (95 %)"):
        table.add_column(name)
    runs = list(dict.fromkeys(run for line in key.values() for run in line.runs))
    for name in [*runs, *(["all"] if len(runs) > 1 else [])]:
        for side in ("before", "after"):
            here = {n: x for n, x in key.items() if x.side == side and (name == "all" or name in x.runs)}
            lines = [reader.lines[n].passes for n in here if n in reader.lines]
            of_dialogue: dict[int, list[bool | None]] = {}
            for n, line in here.items():
                answer = reader.lines.get(n)
                of_dialogue.setdefault(line.dialogue, []).append(None if answer is None else answer.passes)
            whole = [all(answers) for answers in of_dialogue.values() if None not in answers]
            table.add_row(
                escape(name),
                side,
                str(len(lines)),
                share(sum(lines), len(lines)),
                str(len(whole)),
                share(sum(whole), len(whole)),
            )
    return table


def share(successes: int, n: int) -> str:
    """In percent, with its interval; "-" where there is nothing to count."""
    if not n:
        return "-"
    low, high = share_interval(successes, n)
    return f"{successes / n:.1%} ({low:.1%} to {high:.1%})"


def _print_reasons(reader: Reader, key: Mapping[int, KeyPair], console: Console) -> None:
    sides: dict[str, list[str]] = {"for the trained policy": [], "for the untrained policy": [], "for a tie": []}
    for n, answer in sorted(reader.pairs.items()):
        trained = answer.prefers == key[n].trained
        side = "for a tie" if answer.prefers == "tie" else f"for the {'trained' if trained else 'untrained'} policy"
        sides[side].append(f"  pair {n}: {answer.reason}")
    for side, reasons in sides.items():
        if reasons:
            console.print("\n".join([side, *reasons]), markup=False, highlight=False, soft_wrap=True)


def _print_agreement(readers: Sequence[Reader], console: Console) -> None:
    """How often two readers gave the same answer."""
    for k, a in enumerate(readers):
        for b in readers[k + 1 :]:
            pairs = [a.pairs[n].prefers == b.pairs[n].prefers for n in a.pairs if n in b.pairs]
            lines = [a.lines[n].passes == b.lines[n].passes for n in a.lines if n in b.lines]
            for what, same in (("pairs", pairs), ("lines", lines)):
                if same:
                    console.print(
                        f"{a.name} and {b.name} agree on {sum(same)} of {len(same)} {what}", markup=False, highlight=False
                    )
