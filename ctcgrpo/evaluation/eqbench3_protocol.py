"""The rules of EQ-Bench 3's rubric part: its files, the judge's prompt, and the score. Pure.

A scenario is a few fixed messages of a user. Role-play and drafting scenarios end with a debrief; an analysis does not. A judge
gives each criterion 0 to 20; a task counts with the mean of the criteria that count for its kind, a model with 5 times the mean
over tasks. Scenarios, prompts and criteria are read from the user's copy. Source: EQ-bench/eqbench3.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import json_repair

from ctcgrpo.errors import ScenarioError

Kind = Literal["role-play", "drafting", "analysis"]
MAX_CRITERION = 20  # the highest score of a criterion
_DIALOGUE_CRITERIA = "demonstrated_empathy pragmatic_ei depth_of_insight social_dexterity emotional_reasoning message_tailoring"
_ANALYSIS_CRITERIA = (
    "depth_of_insight emotional_reasoning theory_of_mind subtext_identification intellectual_grounding correctness"
)
COUNTED: Mapping[Kind, Sequence[str]] = {
    "role-play": _DIALOGUE_CRITERIA.split(),
    "drafting": _DIALOGUE_CRITERIA.split(),
    "analysis": _ANALYSIS_CRITERIA.split(),
}
"""The criteria whose mean is a task's score; the others describe a style."""
DRAFTING = frozenset(map(str, range(201, 210)))
"""The scenarios that ask for a message to be written, by their numbers: their file does not say so."""
_FRAME = {"role-play": "", "drafting": "_message_drafting", "analysis": "_analysis"}
_RUBRIC = {**_FRAME, "drafting": ""}  # how the names of a kind's files end


class InvalidVerdict(Exception):
    """A judge's answer that lacks a criterion which counts."""


@dataclass(frozen=True, slots=True)
class EqScenario:
    """`lines`: the user's messages, one per turn."""

    id: str
    category: str
    title: str
    kind: Kind
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EqBench:
    """A copy of the benchmark's data: the scenarios, and by kind the frame of a line, the judge's prompt and its criteria."""

    scenarios: tuple[EqScenario, ...]
    frames: Mapping[Kind, str]
    rubrics: Mapping[Kind, str]
    criteria: Mapping[Kind, tuple[str, ...]]
    debrief: str

    @property
    def digest(self) -> str:
        """A digest of the judge's prompt and criteria."""
        prompts = json.dumps([self.rubrics, self.criteria], sort_keys=True)
        return hashlib.sha256(prompts.encode()).hexdigest()[:8]

    def user_messages(self, scenario: EqScenario) -> list[str]:
        """The user's messages, in order, the debrief last where there is one."""
        frame = self.frames[scenario.kind]
        lines = [frame.replace("{scenario_prompt}", line) for line in scenario.lines]
        return lines if scenario.kind == "analysis" else [*lines, self.debrief]

    def judge_prompt(self, scenario: EqScenario, messages: Sequence[str], answers: Sequence[str]) -> str:
        """The judge's prompt for the user's messages and the model's answers. As in the authors' code, without Markdown."""
        exchanges = list(zip(messages, answers, strict=True))
        debrief = "" if scenario.kind == "analysis" else exchanges.pop()[1]
        transcript = "---\n".join(f"User:\n{line}\n---\nAssistant:\n{answer}\n" for line, answer in exchanges)
        form: dict[str, Any] = {"chain_of_thought_reasoning": "detailed reasoning about the scores that follow"}
        form |= dict.fromkeys(self.criteria[scenario.kind], 0)
        parts = {
            "{transcript}": transcript,
            "{debrief}": debrief,
            "{output_format}": json.dumps(form, indent=2).replace(": 0", f": 0-{MAX_CRITERION}"),
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
            raise ScenarioError(f"{file}: {missing[0]} is missing; expected the file of that name in EQ-bench/eqbench3")
        return text

    def criteria(kind: Kind) -> tuple[str, ...]:
        name = f"rubric_scoring_criteria{_RUBRIC[kind]}.txt"
        found = tuple(line.strip() for line in read(name).splitlines() if line.strip() and not line.startswith("#"))
        if missing := set(COUNTED[kind]) - set(found):
            raise ScenarioError(f"{folder / name}: {', '.join(sorted(missing))} missing; the score needs these criteria")
        return found

    def rubric(kind: Kind) -> str:
        debrief = () if kind == "analysis" else ("{debrief}",)
        return read(f"rubric_scoring_prompt{_RUBRIC[kind]}.txt", "{transcript}", *debrief, "{output_format}")

    kinds: tuple[Kind, ...] = get_args(Kind)
    return EqBench(
        scenarios=tuple(parse_scenarios(read("scenario_prompts.txt"), str(folder / "scenario_prompts.txt"))),
        frames={kind: read(f"scenario_master_prompt{_FRAME[kind]}.txt", "{scenario_prompt}") for kind in kinds},
        rubrics={kind: rubric(kind) for kind in kinds},
        criteria={kind: criteria(kind) for kind in kinds},
        debrief=read("debrief_prompt.txt").strip(),
    )


def parse_scenarios(text: str, place: str) -> list[EqScenario]:
    """`######## id | category | title`, then blocks of `####### PromptN`. A scenario without prompts is left out, as the authors'
    code does. Raises ScenarioError for a text without scenarios and for a duplicate id."""
    found: dict[str, EqScenario] = {}
    for block in re.split(r"^########(?!#)", text, flags=re.MULTILINE)[1:]:
        heading, _, rest = block.partition("\n")
        parts = [part.strip() for part in heading.split("|")]
        if len(parts) != 3:
            raise ScenarioError(f"{place}: heading = {heading.strip()!r}; expected `######## id | category | title`")
        id, category, title = parts
        lines = tuple(part.strip() for part in re.split(r"^#######(?!#)\s*Prompt\d+[^\n]*\n", rest, flags=re.MULTILINE)[1:])
        if id in found:
            raise ScenarioError(f"{place}: duplicate scenario {id}")
        kind: Kind = (
            "analysis" if category.lower() == "analytical interpretation" else "drafting" if id in DRAFTING else "role-play"
        )
        if lines and all(lines):
            found[id] = EqScenario(id, category, title, kind, lines)
    if not found:
        raise ScenarioError(f"{place}: no scenarios; expected headings `######## id | category | title`")
    return list(found.values())


def read_scores(text: str, kind: Kind) -> dict[str, float]:
    """A judge's scores by criterion, each in [0, 20]. Tolerates fences, text around the JSON, and numbers as "15" or "15/20".
    Raises InvalidVerdict where a criterion that counts has no such number."""
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        raise InvalidVerdict("expected a complete JSON object, found none")
    value = json_repair.loads(text[start : end + 1])
    return checked_scores(value if isinstance(value, dict) else {}, kind)


def checked_scores(given: Mapping[str, Any], kind: Kind) -> dict[str, float]:
    """As `read_scores`, of an object."""
    scores = {name: number for name, value in given.items() if (number := _number(value)) is not None}
    if missing := [name for name in COUNTED[kind] if name not in scores]:
        raise InvalidVerdict(f"{missing[0]} = {given.get(missing[0])!r}; expected a number from 0 to {MAX_CRITERION}")
    return scores


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:/\s*{MAX_CRITERION})?\s*", value)
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_CRITERION:
        return None
    return float(value)


def task_score(scores: Mapping[str, float], kind: Kind) -> float:
    """5 x the mean of the criteria that count: from 0 to 100. The benchmark's score is the mean of these."""
    counted = COUNTED[kind]
    return 5 * sum(scores[name] for name in counted) / len(counted)
