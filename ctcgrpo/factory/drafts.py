"""Drafts: a model's answer, and the record made of it. Errors of form are repaired, errors of content are not."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

import json_repair
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctcgrpo.environments.eibench.records import Scenario, scene_rules
from ctcgrpo.factory.anchors import Move, repaired
from ctcgrpo.factory.layout import Role, layouts, sections, without_mark
from ctcgrpo.factory.rules import problems
from ctcgrpo.factory.sampling import Wanted

_THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)
_MOST, _MOST_BRACES = 40_000, 200
"""Limits of an answer: characters (a record has some 4,000), and opening braces and brackets (some 60)."""
_SCRIPTED: Mapping[str, Mapping[str, str]] = {
    "boundary": {"words": "limit", "offer": "offer"},
    "repair": {"fault": "fault", "remedy": "remedy"},
}  # by the part of a script that a scene has, and its keys: the fields of a draft
_Lines = Annotated[list[str], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", str_strip_whitespace=True, allow_inf_nan=False)


class _User(_Part):
    background: str
    stance: str
    style: str
    facts: list[str] = Field(min_length=3)
    behaviour: str
    aim: str


class _Policy(_Part):
    background: str
    stance: str
    facts: list[str] = Field(min_length=3)
    core_goal: str


class _Anchors(_Part):
    initial_anger: float
    initial_trust: float
    target_anger: float
    target_trust: float
    worst_anger: float
    worst_trust: float


class _Detail(_Part):
    about: str
    words: list[str] = Field(min_length=2)
    sense: list[str] = Field(min_length=4)
    line: str


class _Reactions(_Part):
    warmer: _Lines
    flat: _Lines
    colder: _Lines
    thanks: _Lines
    leaves: _Lines


class Draft(_Part):
    """The JSON schema of an answer. `limit` and `offer` belong to defense, `fault` and `remedy` to repair."""

    title: str
    user: _User
    opening_line: str
    policy: _Policy
    goal: str
    success_criteria: list[str] = Field(min_length=2)
    must_avoid: list[str] = Field(min_length=2)
    anchors: _Anchors
    worst_reason: str
    details: list[_Detail] = Field(min_length=4)
    reactions: _Reactions
    limit: list[str]
    offer: list[str]
    fault: list[str]
    remedy: list[str]


@dataclass(frozen=True, slots=True)
class Written:
    """The result of an answer: a valid `record` with the `moves` of its anchors, or its `faults`."""

    record: dict[str, Any] | None = None
    moves: list[Move] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a draft for structured output: every field required, no others allowed, no defaults."""
    result = Draft.model_json_schema()
    for part in (result, *result.get("$defs", {}).values()):
        part["additionalProperties"] = False
        part["required"] = list(part["properties"])
        part.pop("description", None)
    return result


def read_draft(text: str, asked: Wanted, *, language: str, licence: str, source: str) -> Written:
    """Parse an answer to the request `asked`. Never raises; faults are in the result."""
    data = json_object(text)
    if isinstance(data, str):
        return Written(faults=[data])
    try:
        draft = Draft.model_validate(data)
    except ValidationError as error:
        return Written(faults=[f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()[:8]])
    record = record_of(draft, asked, language=language, licence=licence, source=source)
    record, moves = repaired(record, asked.scene)
    faults = [*_own_faults(draft, asked), *(f"{p.field}: {p.message}" for p in problems([("answer", record)]))]
    return Written(faults=faults) if faults else Written(record, moves)


def json_object(text: str) -> dict[str, Any] | str:
    """The JSON object in an answer, or a description of the problem."""
    text = _THOUGHT.sub("", text).strip()[:_MOST]
    start, end = text.find("{"), text.rfind("}")
    if not text:
        return "the answer is empty"
    if start < 0:
        return f"the answer holds no JSON object, but says {text[:80]!r}"
    if text.count("{") + text.count("[") > _MOST_BRACES:
        return "the answer is not a plausible JSON object: too many braces"
    try:
        found = json.loads(text[start : end + 1], strict=False)
    except ValueError:
        found = json_repair.loads(text[start:])
    return found if isinstance(found, dict) else "the answer is not a JSON object"


def _own_faults(draft: Draft, asked: Wanted) -> Iterator[str]:
    """Faults that the rules of finished records do not cover."""
    rules = scene_rules(asked.scene)
    if rules.policy_opens and draft.opening_line:
        yield "opening_line: the policy speaks first here, so it must be empty"
    for name in _SCRIPTED.get(rules.script or "", {}).values():
        if len(getattr(draft, name)) < 4:
            yield f"{name}: at least four words are needed"
    for k, detail in enumerate(draft.details):
        if not any(word.lower() in detail.line.lower() for word in detail.words):
            yield f"details.{k}.words: none of them is in the line"


def record_of(draft: Draft, asked: Wanted, *, language: str, licence: str, source: str) -> dict[str, Any]:
    """A draft in EIBench's layout, with its seeds, licence and source."""
    user, policy = _persona(language, "user", draft.user), _persona(language, "policy", draft.policy)
    opening = draft.opening_line
    a = draft.anchors
    script: dict[str, Any] = draft.model_dump(include={"details"}) | {"lines": draft.reactions.model_dump()}
    if part := scene_rules(asked.scene).script:
        script[part] = {key: getattr(draft, name) for key, name in _SCRIPTED[part].items()}
    return {
        "id": asked.id,
        "title": draft.title,
        "scene_tag": asked.scene,
        "language": language,
        "aggressor_profile": {"system_prompt": user, "opening_line": opening},
        "defender_profile": {"system_prompt": policy},
        "goal_one_liner": draft.goal,
        "success_criteria": draft.success_criteria,
        "must_avoid": draft.must_avoid,
        "initial_calibration": {"initial_anger": a.initial_anger, "initial_trust": a.initial_trust},
        "rub_goals": {"target_anger": a.target_anger, "target_trust": a.target_trust},
        "worst_case": {"worst_anger_min": a.worst_anger, "worst_trust_min": a.worst_trust, "reason": draft.worst_reason},
        "prompt": [{"role": "system", "content": policy}, *([{"role": "user", "content": opening}] if opening else [])],
        "data_source": source,
        "licence": licence,
        "seed": asked.seed._asdict(),
        "script": script,
    }


def _persona(language: str, role: Role, parts: BaseModel) -> str:
    written = []
    for names, (_, part) in zip(layouts()[language].titles[role], parts, strict=True):
        text = part if isinstance(part, str) else "\n".join(f"{k}. {without_mark(fact)}" for k, fact in enumerate(part, 1))
        written.append(f"### {names[0]}\n{text}")
    return "\n\n".join(written)


def shown(record: Mapping[str, Any], scenario: Scenario) -> str:
    """A finished record as a draft, for use as an example; "" if its script or sections are incomplete."""
    script = scenario.script
    if not script.get("details") or not script.get("lines") or scenario.language not in layouts():
        return ""
    titles = layouts()[scenario.language].titles

    def parts(persona: str, role: Role, keys: Iterable[str]) -> dict[str, Any]:
        found = dict(sections(persona))
        values: dict[str, Any] = {}
        for key, names in zip(keys, titles[role], strict=True):
            text = next((found[name] for name in names if name in found), "")
            values[key] = [without_mark(line) for line in text.splitlines()] if key == "facts" else text
        return values

    states = scenario.anchors._asdict().items()
    draft = {
        "title": scenario.title,
        "user": parts(scenario.user_persona, "user", _User.model_fields),
        "opening_line": scenario.opening_line,
        "policy": parts(scenario.policy_persona, "policy", _Policy.model_fields),
        "goal": scenario.goal,
        "success_criteria": scenario.success_criteria,
        "must_avoid": scenario.must_avoid,
        "anchors": {f"{name}_{axis}": level for name, state in states for axis, level in state._asdict().items()},
        "worst_reason": (record.get("worst_case") or {}).get("reason", ""),
        "details": [{k: d[k] for k in ("about", "words", "sense", "line")} for d in script["details"]],
        "reactions": script["lines"],
        **{name: script.get(part, {}).get(key, []) for part, names in _SCRIPTED.items() for key, name in names.items()},
    }
    return json.dumps(draft, ensure_ascii=False)
