"""What a blind reader is given, and the key to it: only what was said aloud, in an order that a seed decides."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ctcgrpo.environments.eibench.persona import select_sections
from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import OutputError
from ctcgrpo.util.files import write_whole
from tests.held_out import HeldOut, Trace

PAIRS, LINES = "pairs", "lines"
"""Names of the sheets in a folder: NAME.md for the reader, NAME.key.json for the tally."""
Side = Literal["before", "after"]
_T = TypeVar("_T")
_PAIRS_HEAD = """\
# Which dialogue would you rather have had with this person?

Each pair shows one situation and two dialogues, A and B. In both, Person 2 is the same. Person 1 differs: judge Person 1. Texts in
quotation marks are addressed to the one whom they describe. A dialogue ends with a line of Person 1; one may be shorter than the
other.

Prefer the dialogue in which Person 1 answers what was said, makes sense, and speaks as a sincere person would who is in this
situation. Grammar and length matter as much as they would to you in a conversation. Judge by what Person 1 says, not by how
Person 2 takes it. Choose "tie" where neither is better.

Answer with one JSON object a line, for all of the {n} pairs:

{{"pair": 1, "prefers": "A", "reason": "one sentence"}}

`prefers` is "A", "B" or "tie".
"""
_LINES_HEAD = """\
# Which lines would pass as those of a sincere person?

Each dialogue shows one situation and what was said in it. Judge the numbered lines, which are those of Person 1: would this line
pass as said by a sincere person in this situation, at this place in the dialogue? Texts in quotation marks are addressed to the one
whom they describe. Judge each line by itself, not by how Person 2 takes it.

Answer with one JSON object a line, for all of the {n} lines:

{{"line": 1, "passes": true, "reason": "a few words"}}

`passes` is true or false.
"""


class Pair(NamedTuple):
    run: HeldOut
    scenario: Scenario
    before: Trace
    after: Trace


class Single(NamedTuple):
    """A dialogue, and the names of all runs that have it word for word."""

    side: Side
    runs: tuple[str, ...]
    run: HeldOut
    scenario: Scenario
    dialogue: Trace


def write_pairs(runs: Sequence[HeldOut], folder: Path, number: int, seed: int) -> list[str]:
    """Write the sheet of `number` pairs and its key; what there is to say about them. Raises OutputError where the runs have
    fewer pairs, and where the folder has such a sheet already."""
    rng = random.Random(f"pairs/{seed}")
    pairs = _first(number, _pairs(runs, rng), PAIRS)
    rng.shuffle(pairs)
    trained_is = ["A"] * (number // 2) + ["B"] * (number - number // 2)
    rng.shuffle(trained_is)
    text, key = [_PAIRS_HEAD.format(n=number)], []
    for k, (pair, trained) in enumerate(zip(pairs, trained_is, strict=True), 1):
        shown = {trained: pair.after, ("B" if trained == "A" else "A"): pair.before}
        text.append(f"## Pair {k}\n\n{situation(pair.scenario, pair.run)}\n")
        text += [f"### Dialogue {name}\n\n{spoken(shown[name])}\n" for name in ("A", "B")]
        rollouts = {"before": pair.before["rollout"], "after": pair.after["rollout"]}
        key.append({"pair": k, "run": pair.run.name, "scenario": pair.scenario.id, "trained": trained, "rollouts": rollouts})
    said = _written(folder, PAIRS, text, {"seed": seed, "pairs": key}, f"{number} pairs")
    for side in ("before", "after"):
        repeated = Counter((p.scenario.id, spoken(getattr(p, side))) for p in pairs)
        if shared := sum(n for n in repeated.values() if n > 1):
            said.append(f"{shared} of the pairs have their dialogue {side} training in common with another pair")
    return said


def write_lines(runs: Sequence[HeldOut], folder: Path, number: int, seed: int) -> list[str]:
    """Write the sheet of `number` dialogues, half of them before training, and its key; as `write_pairs`."""
    rng = random.Random(f"lines/{seed}")
    half = number // 2
    singles = _first(half, _singles(runs, "before", rng), "dialogues before training")
    singles += _first(number - half, _singles(runs, "after", rng), "dialogues after training")
    rng.shuffle(singles)
    text, key, line = list[str](), list[dict[str, Any]](), 0
    for k, single in enumerate(singles, 1):
        first = line + 1
        for turn in range(1, len(single.dialogue["turns"]) + 1):
            line += 1
            place = {"dialogue": k, "scenario": single.scenario.id, "rollout": single.dialogue["rollout"], "turn": turn}
            key.append({"line": line, "side": single.side, "runs": list(single.runs), **place})
        text.append(f"## Dialogue {k}\n\n{situation(single.scenario, single.run)}\n\n{spoken(single.dialogue, first)}\n")
    head = _LINES_HEAD.format(n=line)
    return _written(folder, LINES, [head, *text], {"seed": seed, "lines": key}, f"{line} lines of {number} dialogues")


def situation(scenario: Scenario, run: HeldOut) -> str:
    """Who speaks to whom, from the first paragraph of each persona, and what the policy was told of its role."""
    role = _prose(select_sections(scenario.policy_persona, run.recipe.policy.persona_sections))
    who, other = _prose(_paragraph(scenario.policy_persona)), _prose(_paragraph(scenario.user_persona))
    lines = [f'- Person 1: "{who}"'] if who not in role else []
    return "\n".join([*lines, f'- Person 1 was told: "{role}"', f'- Person 2: "{other}"'])


def spoken(dialogue: Trace, number: int | None = None) -> str:
    """Everything up to the policy's last reply. `number` is that of its first line, where its lines are numbered."""
    lines = [_line("Person 2", dialogue["opening"])] if dialogue["opening"] else []
    for k, turn in enumerate(dialogue["turns"]):
        name = "Person 1" if number is None else f"[line {number + k}] Person 1"
        lines.append(_line(name, turn["reply"]))
        if k < len(dialogue["turns"]) - 1:
            lines.append(_line("Person 2", turn["message"]))
    return "\n\n".join(lines)


def _line(name: str, text: str) -> str:
    """Further lines of a text are indented: none can look like a heading of the sheet."""
    return f"**{name}:** " + ("\n    ".join(part for part in text.strip().splitlines() if part.strip()) or "(says nothing)")


def _paragraph(persona: str) -> str:
    """The first paragraph, without its heading."""
    return next((part for part in re.split(r"\n\s*\n|^#.*$", persona, flags=re.MULTILINE) if part.strip()), "")


def _prose(text: str) -> str:
    """Without headings and line ends."""
    return " ".join(re.sub(r"^#.*$", "", text, flags=re.MULTILINE).split())


def _pairs(runs: Sequence[HeldOut], rng: random.Random) -> Iterator[Pair]:
    """Every dialogue before with every one after of its scenario: first with the one of the same seed, so that each is read
    once; then with the next ones. Of each run and each scenario one after the other."""
    most = max((len(run.after.of_scenario(name)) for run in runs for name in run.played), default=0)
    samples = max((len(run.before.of_scenario(name)) for run in runs for name in run.played), default=0)

    def pair(run: HeldOut, name: str, k: int, shift: int) -> Pair | None:
        before, after = run.before.of_scenario(name), run.after.of_scenario(name)
        if k >= len(before) or shift >= len(after):
            return None
        return Pair(run, run.scenarios[name], before[k], after[(k + shift) % len(after)])

    for shift in range(most):
        for k in range(samples):
            yield from _by_turns(runs, partial(pair, k=k, shift=shift), rng)


def _singles(runs: Sequence[HeldOut], side: Side, rng: random.Random) -> Iterator[Single]:
    """Of each run and each scenario one after the other, those that are the same word for word once."""

    def words(name: str, dialogue: Trace) -> tuple[str, str]:
        return name, spoken(dialogue)

    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for name in run.played:
            for dialogue in getattr(run, side).of_scenario(name):
                names = found.setdefault(words(name, dialogue), [])
                if run.name not in names:
                    names.append(run.name)

    def single(run: HeldOut, name: str, k: int) -> Single | None:
        dialogues = getattr(run, side).of_scenario(name)
        if k >= len(dialogues):
            return None
        names = found.get(words(name, dialogues[k]))
        return None if names is None else Single(side, tuple(names), run, run.scenarios[name], dialogues[k])

    most = max((len(getattr(run, side).of_scenario(name)) for run in runs for name in run.played), default=0)
    for k in range(most):
        for chosen in _by_turns(runs, partial(single, k=k), rng):
            if found.pop(words(chosen.scenario.id, chosen.dialogue), None) is not None:
                yield chosen


def _by_turns(runs: Sequence[HeldOut], find: Callable[[HeldOut, str], _T | None], rng: random.Random) -> Iterator[_T]:
    """One of each run in turn, the scenarios of each in an order of its own."""
    orders = [rng.sample(run.played, len(run.played)) for run in runs]
    for names in zip_longest(*orders):
        for run, name in zip(runs, names, strict=True):
            found = None if name is None else find(run, name)
            if found is not None:
                yield found


def _first(number: int, found: Iterable[_T], what: str) -> list[_T]:
    every = list(found)
    if not 1 <= number <= len(every):
        raise OutputError(f"{number} {what} were asked for; these runs have {len(every)}")
    return every[:number]


def _written(folder: Path, name: str, text: Sequence[str], key: dict[str, Any], what: str) -> list[str]:
    sheet, key_file = folder / f"{name}.md", folder / f"{name}.key.json"
    for file in (sheet, key_file):
        if file.exists():
            raise OutputError(f"{file} exists; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(key_file, json.dumps(key, indent=1) + "\n")
    write_whole(sheet, "\n".join(text))
    return [f"for the reader  {sheet} ({what})", f"the key         {key_file}"]
