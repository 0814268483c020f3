"""The rules of EQ-Bench 3's rubric part: its files, what a judge is asked, and the score. Pure.

A scenario is a few canned lines of a user. Role-play and drafting scenarios end with a debrief; an analysis does not. A judge
gives each criterion 0 to 20; a task counts with the mean of the criteria that count for its kind, a model with 5 times the mean
over tasks. Scenarios, prompts and criteria are read from the user's copy. Source: EQ-bench/eqbench3.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import json_repair

from ctcgrpo.errors import ScenarioError
from ctcgrpo.evaluation.benches import COUNTED, MOST, Kind
from ctcgrpo.evaluation.results import Line, Result

_ANALYSIS = "analytical interpretation"
_DRAFTING = frozenset(map(str, range(201, 210)))
"""The scenarios that ask for a message to be written, by their numbers: their file does not say so."""
_MASTER = {
    "role-play": "scenario_master_prompt.txt",
    "drafting": "scenario_master_prompt_message_drafting.txt",
    "analysis": "scenario_master_prompt_analysis.txt",
}
_RUBRIC = {"role-play": "", "drafting": "", "analysis": "_analysis"}


class Unreadable(Exception):
    """An answer of the judge that does not give every criterion that counts."""


@dataclass(frozen=True, slots=True)
class EqScenario:
    """`lines` are what the user says, turn by turn."""

    id: str
    category: str
    title: str
    kind: Kind
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EqBench:
    """What a copy of the benchmark's data holds: the scenarios, and by kind the frame of a line, the judge's prompt and its
    criteria."""

    scenarios: tuple[EqScenario, ...]
    frames: Mapping[Kind, str]
    rubrics: Mapping[Kind, str]
    criteria: Mapping[Kind, tuple[str, ...]]
    debrief: str

    @property
    def digest(self) -> str:
        """Of what the judge is told, down to its wording."""
        told = json.dumps([dict(self.rubrics), {kind: list(names) for kind, names in self.criteria.items()}], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:8]

    def asked(self, scenario: EqScenario) -> list[str]:
        """The user's messages, in order, the debrief last where there is one."""
        frame = self.frames[scenario.kind]
        lines = [frame.replace("{scenario_prompt}", line) for line in scenario.lines]
        return lines if scenario.kind == "analysis" else [*lines, self.debrief]

    def judged(self, scenario: EqScenario, asked: Sequence[str], answers: Sequence[str]) -> str:
        """What the judge is asked, from the user's messages and the model's answers. As in the authors' code, marks of formatting
        are left out."""
        said = list(zip(asked, answers, strict=True))
        debrief = "" if scenario.kind == "analysis" else said.pop()[1]
        transcript = "---\n".join(
            f"{who}:\n{text}\n" for pair in said for who, text in zip(("User", "Assistant"), pair, strict=True)
        )
        form: dict[str, Any] = {"chain_of_thought_reasoning": "detailed reasoning about the scores that follow"}
        form |= dict.fromkeys(self.criteria[scenario.kind], 0)
        parts = {
            "{transcript}": transcript,
            "{debrief}": debrief,
            "{output_format}": json.dumps(form, indent=2).replace(": 0", f": 0-{MOST}"),
        }
        text = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], self.rubrics[scenario.kind])
        return text.replace("*", "").replace("#", "")


def load_eqbench(folder: Path) -> EqBench:
    """Raises ScenarioError naming the file that is missing, or what is wrong in it."""

    def read(name: str, *needed: str) -> str:
        file = folder / name
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ScenarioError(
                f"{file} not found: name your copy of the folder data of EQ-bench/eqbench3 (MIT) with --data"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ScenarioError(f"{file} cannot be read as UTF-8 text: {error}") from None
        if missing := [part for part in needed if part not in text]:
            raise ScenarioError(f"{file}: it has no {missing[0]}; is it the file of that name in EQ-bench/eqbench3?")
        return text

    def criteria(kind: Kind) -> tuple[str, ...]:
        name = f"rubric_scoring_criteria{_RUBRIC[kind]}.txt"
        found = tuple(line.strip() for line in read(name).splitlines() if line.strip() and not line.startswith("#"))
        if missing := set(COUNTED[kind]) - set(found):
            raise ScenarioError(f"{folder / name}: it lacks {', '.join(sorted(missing))}, which the score is made of")
        return found

    kinds: tuple[Kind, ...] = ("role-play", "drafting", "analysis")
    rubric_parts = {
        "role-play": ("{transcript}", "{debrief}"),
        "drafting": ("{transcript}", "{debrief}"),
        "analysis": ("{transcript}",),
    }
    return EqBench(
        scenarios=tuple(parse_scenarios(read("scenario_prompts.txt"), str(folder / "scenario_prompts.txt"))),
        frames={kind: read(_MASTER[kind], "{scenario_prompt}") for kind in kinds},
        rubrics={
            kind: read(f"rubric_scoring_prompt{_RUBRIC[kind]}.txt", *rubric_parts[kind], "{output_format}") for kind in kinds
        },
        criteria={kind: criteria(kind) for kind in kinds},
        debrief=read("debrief_prompt.txt").strip(),
    )


def parse_scenarios(text: str, place: str = "scenario_prompts.txt") -> list[EqScenario]:
    """`######## id | category | title`, then blocks of `####### PromptN`. A scenario without prompts is left out, as the authors'
    code does. Raises ScenarioError for a text without scenarios and for an duplicate id."""
    found: dict[str, EqScenario] = {}
    for block in re.split(r"^########(?!#)", text, flags=re.MULTILINE)[1:]:
        heading, _, rest = block.partition("\n")
        parts = [part.strip() for part in heading.split("|")]
        if len(parts) != 3:
            raise ScenarioError(f"{place}: a heading is `######## id | category | title`, this one is {heading.strip()!r}")
        id, category, title = parts
        lines = tuple(part.strip() for part in re.split(r"^#######(?!#)\s*Prompt\d+[^\n]*\n", rest, flags=re.MULTILINE)[1:])
        if id in found:
            raise ScenarioError(f"{place}: duplicate scenario {id}")
        kind: Kind = "analysis" if category.lower() == _ANALYSIS else "drafting" if id in _DRAFTING else "role-play"
        if lines and all(lines):
            found[id] = EqScenario(id, category, title, kind, lines)
    if not found:
        raise ScenarioError(f"{place}: it holds no scenarios (`######## id | category | title`)")
    return list(found.values())


def read_scores(text: str, kind: Kind) -> dict[str, float]:
    """A judge's scores by criterion, each in [0, 20]. Tolerates fences, text around the JSON, and numbers as "15" or "15/20".
    Raises Unreadable where a criterion that counts has no such number."""
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        raise Unreadable("there is no whole JSON object in it")
    value = json_repair.loads(text[start : end + 1])
    return checked_scores(value if isinstance(value, dict) else {}, kind)


def checked_scores(given: Mapping[str, Any], kind: Kind) -> dict[str, float]:
    """As `read_scores`, of an object."""
    scores = {name: number for name, value in given.items() if (number := _number(value)) is not None}
    if missing := [name for name in COUNTED[kind] if name not in scores]:
        raise Unreadable(f"{missing[0]} is {given.get(missing[0])!r}; it is a number from 0 to {MOST}")
    return scores


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:/\s*{MOST})?\s*", value)
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        return None
    return float(value)


def task_score(scores: Mapping[str, float], kind: Kind) -> float:
    """5 x the mean of the criteria that count: from 0 to 100. The benchmark's score is the mean of these."""
    counted = COUNTED[kind]
    return 5 * sum(scores[name] for name in counted) / len(counted)


def read_judgements(file: Path, run: str | None = None) -> tuple[list[Result], dict[str, Any]]:
    """A runs file of the authors' code: results of one run in it, and its model and judge.

    `run` is the key of the run, or its model's name; it may be left out where there is one. Judgements that lack a criterion are
    failed results. Raises ScenarioError for a file or a run that is not there.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScenarioError(f"{file} not found") from None
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{file} is no JSON file: {error}") from None
    runs = (
        {key: r for key, r in data.items() if isinstance(r, dict) and "scenario_tasks" in r}
        if isinstance(data, dict)
        else {}
    )
    chosen = {key: r for key, r in runs.items() if run is None or run in (key, r.get("model_name"))}
    if len(chosen) != 1:
        problem = (
            "no runs with scenario_tasks" if not runs else f"{len(chosen)} runs by that name" if run else f"{len(runs)} runs"
        )
        raise ScenarioError(f"{file} holds {problem}; name one with --run: {', '.join(runs) or 'none'}")
    [found] = chosen.values()
    results = []
    for iteration, tasks in found["scenario_tasks"].items():
        if not str(iteration).isdigit() or not isinstance(tasks, dict):
            raise ScenarioError(f"{file}: scenario_tasks holds {iteration!r}; it maps iterations (numbers) to tasks by id")
        for id, task in tasks.items():
            results.append(_judged(str(id), int(iteration), task))
    judge = found.get("rubric_judge_model") or found.get("judge_model") or "not named"
    return results, {"model": found.get("model_name", "not named"), "judge": judge}


def _judged(id: str, iteration: int, task: Mapping[str, Any]) -> Result:
    kind: Kind = "analysis" if not task.get("debrief_prompt") else "drafting" if id in _DRAFTING else "role-play"
    said = [Line("user" if m["role"] == "user" else "model", m["content"]) for m in task.get("conversation_history") or []]
    debrief = [Line("model", task["debrief_response"])] if task.get("debrief_response") else []
    scores: dict[str, float] = {}
    failure = None
    try:
        scores = checked_scores(task.get("rubric_scores") or {}, kind)
    except Unreadable as error:
        failure = ("judge", str(task.get("error") or error))
    return Result(
        scenario=id,
        repeat=iteration,
        group=kind,
        score=None if failure else task_score(scores, kind),
        measures=scores,
        failure=failure,
        lines=(*said, *debrief),
    )
