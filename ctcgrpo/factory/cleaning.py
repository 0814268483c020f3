"""Cleans a set: anchors with the smallest change; the layout of personas by rule, or else by a model. No word is lost or added."""

import asyncio
import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from ctcgrpo.environments.eibench.scenario_format import read_record
from ctcgrpo.errors import ScenarioError, SimulatorReplyError, SimulatorTransportError
from ctcgrpo.factory.anchors import Move, repaired
from ctcgrpo.factory.asking import Answers
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.factory.drafts import json_object
from ctcgrpo.factory.layout import Role, layout_problems, layouts, mended, without_mark
from ctcgrpo.llm_client.store import Store, content_key
from ctcgrpo.types import Message

Status = Literal["clean", "mended", "laid out again", "left", "no scenario"]
_ROLES: tuple[tuple[Role, str], ...] = (("user", "aggressor_profile"), ("policy", "defender_profile"))
_SENTENCE = re.compile(r"(?<=[.!?。！？…])\s*|\n+")
_PROMPT = (
    "You put the text of a persona under section titles. The titles are: {titles}. Every sentence of the text goes, word by "
    "word, under the title that it belongs to; nothing is added, left out or said differently. Facts are numbered lines: "
    "1. ..., 2. ... . "
    "Answer with one JSON object whose keys are the titles, and nothing else."
)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """The result for a record. `differences`: changed lines, before and after. `reasons`: of a record that could not be cleaned."""

    record: dict[str, Any]
    status: Status
    differences: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def by_rule(record: Mapping[str, Any], place: str) -> Cleaned:
    """Repair a record by rule. Status `left`: problems remain, with reasons; `no scenario`: the record cannot be read."""
    cleaned: dict[str, Any] = json.loads(json.dumps(record))
    try:
        language, scene = _kind(record, place)
    except ScenarioError as error:
        return Cleaned(cleaned, "no scenario", reasons=[str(error)])
    reasons: list[str] = []
    moves: list[Move] = []
    try:
        cleaned, moves = repaired(cleaned, scene)
    except ValueError as error:
        reasons.append(str(error))
    for role, profile in _ROLES:
        before = cleaned[profile]["system_prompt"]
        after = mended(before, role, language)
        if unkept(before, after, language):  # a rule that would lose text is not applied
            after = before
        _replace(cleaned, profile, after)
        reasons += [f"{profile}: {problem}" for problem in layout_problems(after, role, language)]
    changed = [*map(str, moves), *differences(record, cleaned)]
    return Cleaned(cleaned, "left" if reasons else "mended" if changed else "clean", changed, reasons)


def _kind(record: Mapping[str, Any], place: str) -> tuple[str, str]:
    """Language and scene, read without the anchors: `read_record` refuses those that are to be repaired."""
    anchors = ("initial_calibration", "rub_goals", "worst_case")
    scenario = read_record({key: value for key, value in record.items() if key not in anchors}, place)
    return scenario.language, scenario.scene


def by_model(left: Sequence[Cleaned], config: FactoryConfig) -> list[Cleaned]:
    """Have a model lay out the personas that no rule could repair. An answer that loses or adds words is rejected."""

    async def every(store: Store) -> list[Cleaned]:
        async with Answers(config, store, print) as answers:
            return list(await asyncio.gather(*(_laid_out(cleaned, config, answers) for cleaned in left)))

    with closing(Store(config.store)) as store:
        return asyncio.run(every(store))


async def _laid_out(cleaned: Cleaned, config: FactoryConfig, answers: Answers) -> Cleaned:
    record = json.loads(json.dumps(cleaned.record))
    language, _ = _kind(record, "record")
    reasons = [reason for reason in cleaned.reasons if not reason.startswith(tuple(profile for _, profile in _ROLES))]
    for role, profile in _ROLES:
        persona = record[profile]["system_prompt"]
        if not list(layout_problems(persona, role, language)):
            continue
        titles = [names[0] for names in layouts()[language].titles[role]]
        prompt = _PROMPT.format(titles=", ".join(map(repr, titles)))
        messages: list[Message] = [{"role": "system", "content": prompt}, {"role": "user", "content": persona}]
        models = sorted(e.model for e in config.writer.endpoints)
        key = content_key("clean", *models, json.dumps(messages, ensure_ascii=False))
        texts: dict[str, Any] = {title: {"type": "string"} for title in titles}
        schema = {"type": "object", "properties": texts, "required": titles, "additionalProperties": False}
        try:
            text = await answers.ask(key, messages, dialogue=str(record.get("id")), schema=schema)
        except (SimulatorTransportError, SimulatorReplyError) as error:
            reasons.append(f"{profile}: {error}")
            continue
        found = json_object(text)
        if isinstance(found, str) or not all(isinstance(found.get(title, ""), str) for title in titles):
            reasons.append(f"{profile}: {found if isinstance(found, str) else 'the answer has values that are not texts'}")
            continue
        after = mended("\n\n".join(f"### {title}\n{found.get(title, '')}" for title in titles), role, language)
        problems = [*layout_problems(after, role, language), *unkept(persona, after, language)]
        reasons += [f"{profile}: {problem}" for problem in problems]
        if not problems:
            _replace(record, profile, after)
    status: Status = "left" if reasons else "laid out again"
    return Cleaned(record, status, [*cleaned.differences, *differences(cleaned.record, record)], reasons)


def unkept(before: str, after: str, language: str) -> list[str]:
    """Sentences lost or added by a new layout, in any order. Known titles and list marks are ignored."""
    old, new = (Counter(_sentences(text, language)) for text in (before, after))
    lost = [f"{sentence[:60]!r} is lost" for sentence in old - new]
    return lost + [f"{sentence[:60]!r} comes in" for sentence in new - old]


def _sentences(persona: str, language: str) -> list[str]:
    titles = layouts()[language].titles.values() if language in layouts() else ()
    known_titles = {name for of_role in titles for names in of_role for name in names}
    found = []
    for line in persona.splitlines():
        title = re.fullmatch(r"[\s#*【\[]*(.*?)[\s*】\]:：]*", line)
        if title and title[1] in known_titles:
            continue
        bare = without_mark(line.strip().lstrip("#").strip())
        found += [" ".join(sentence.split()) for sentence in _SENTENCE.split(bare) if sentence and sentence.strip()]
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Removed (-) and added (+) lines of the personas, each with its field."""
    found = []
    for _, profile in _ROLES:
        old, new = (record[profile]["system_prompt"].splitlines() for record in (before, after))
        changes = (line for line in difflib.unified_diff(old, new, n=0, lineterm="") if line[:3] not in ("+++", "---"))
        found += [f"{profile}: {line}" for line in changes if line[:1] in "+-" and line[1:].strip()]
    return found


def _replace(record: dict[str, Any], profile: str, persona: str) -> None:
    before = record[profile]["system_prompt"]  # which the prompt repeats
    record[profile]["system_prompt"] = persona
    prompt = record.get("prompt")
    for message in prompt if profile == "defender_profile" and isinstance(prompt, list) else ():
        is_system = isinstance(message, dict) and message.get("role") == "system"
        if is_system and str(message.get("content")).strip() == before.strip():
            message["content"] = persona
