"""Cleaning a set: anchors by the smallest move; the layout of personas by rule where a rule can, and by a model where none can. No
word may be lost or come in.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ctcgrpo.errors import SimulatorReplyError, SimulatorTransportError
from ctcgrpo.factory.anchors import repaired
from ctcgrpo.factory.config import FactoryConfig
from ctcgrpo.factory.drafts import json_object
from ctcgrpo.factory.layout import Role, layout_problems, layouts, mended, sections
from ctcgrpo.scenarios import read_record
from ctcgrpo.simulator.llm.account import Account
from ctcgrpo.simulator.llm.backend import ChatModel
from ctcgrpo.simulator.llm.endpoints import EndpointPool
from ctcgrpo.simulator.llm.prompts import Message
from ctcgrpo.simulator.store import Store, content_key

Status = Literal["clean", "mended", "laid out anew", "left"]
_ROLES: tuple[tuple[Role, str], ...] = (("user", "aggressor_profile"), ("policy", "defender_profile"))
_PIECES = re.compile(r"[\u4e00-\u9fff]|[A-Za-z]+(?:'[a-z]+)?|\d+")
_LOST, _NEW = 0.02, 0.02
"""Shares of the words of a persona that may go missing, or come in, when it is laid out anew (bullets, a stray heading)."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of a record. `differences` shows what was there and what is there now; `reasons` why it was left."""

    record: dict[str, Any]
    status: Status
    differences: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def by_rule(record: Mapping[str, Any], place: str) -> Cleaned:
    """Mend what a rule can; `left` with its reasons where problems remain. Raises ScenarioError for what is no scenario."""
    language, scene = _kind(record, place)
    told = json.loads(json.dumps(record))
    reasons, moved = [], []
    try:
        told, moves = repaired(told, scene)
        moved = [str(move) for move in moves]
    except ValueError as error:
        reasons.append(str(error))
    for role, profile in _ROLES:
        before = told[profile]["system_prompt"]
        after = mended(before, role, language)
        _replace(told, profile, after)
        reasons += [f"{profile}: {problem}" for problem in layout_problems(after, role, language)]
    changed = [*moved, *differences(record, told)]
    return Cleaned(told, "left" if reasons else "mended" if changed else "clean", changed, reasons)


def _kind(record: Mapping[str, Any], place: str) -> tuple[str, str]:
    """Language and scene. Anchors are no matter here: `read_record` refuses the very ones that are to be repaired."""
    anchors = ("initial_calibration", "rub_goals", "worst_case")
    scenario = read_record({key: value for key, value in record.items() if key not in anchors}, place)
    return scenario.language, scenario.scene


def by_model(left: Sequence[Cleaned], config: FactoryConfig) -> list[Cleaned]:
    """Have the personas that no rule could mend laid out anew; an answer that loses words, or brings in others, is not taken.
    Answers are paid for once: they are kept in the configuration's store."""

    async def every() -> list[Cleaned]:
        store = Store(config.store)
        pool = EndpointPool(config.writer.llm, Account(config.budget, store))
        room = asyncio.Semaphore(sum(endpoint.concurrency for endpoint in config.writer.endpoints))

        async def one(cleaned: Cleaned) -> Cleaned:
            async with room:
                return await _laid_out(cleaned, config, pool, store)

        try:
            return list(await asyncio.gather(*(one(cleaned) for cleaned in left)))
        finally:
            await pool.close()
            store.close()

    return asyncio.run(every())


async def _laid_out(cleaned: Cleaned, config: FactoryConfig, llm: ChatModel, store: Store) -> Cleaned:
    record = json.loads(json.dumps(cleaned.record))
    language, _ = _kind(record, "record")
    reasons = [reason for reason in cleaned.reasons if not reason.startswith(tuple(profile for _, profile in _ROLES))]
    for role, profile in _ROLES:
        persona = record[profile]["system_prompt"]
        if not list(layout_problems(persona, role, language)):
            continue
        messages = _messages(persona, role, language)
        key = content_key(
            "clean", *sorted(e.model for e in config.writer.endpoints), json.dumps(messages, ensure_ascii=False)
        )
        if (kept := store.get(key)) is not None:
            text = kept.decode()
        else:
            try:
                answer = await llm.complete(
                    messages,
                    dialogue=str(record.get("id")),
                    seed=int.from_bytes(key[:4], "big") >> 1,
                    schema=_schema(role, language),
                    deadline=time.monotonic() + config.writer.deadline,
                )
            except (SimulatorTransportError, SimulatorReplyError) as error:
                reasons.append(f"{profile}: {error}")
                continue
            text = answer.text
            store.put(key, text.encode("utf-8", "replace"))
        found = json_object(text)
        if isinstance(found, str):
            reasons.append(f"{profile}: {found}")
            continue
        after = mended(
            "\n\n".join(f"### {title}\n{found.get(title, '')}" for title in _titles(role, language)), role, language
        )
        problems = [*layout_problems(after, role, language), *_unkept(persona, after)]
        if problems:
            reasons += [f"{profile}: {problem}" for problem in problems]
        else:
            _replace(record, profile, after)
    status: Status = "left" if reasons else "laid out anew"
    return Cleaned(record, status, [*cleaned.differences, *differences(cleaned.record, record)], reasons)


def _messages(persona: str, role: Role, language: str) -> list[Message]:
    titles = ", ".join(repr(title) for title in _titles(role, language))
    system = (
        f"You put the text of a persona under section titles. The titles are: {titles}. Every sentence of the text goes, word by "
        "word, under the title that it belongs to; nothing is added, left out or said differently. Facts are numbered lines: "
        "1. ..., 2. ... . Answer with one JSON object whose keys are the titles, and nothing else."
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": persona}]


def _schema(role: Role, language: str) -> dict[str, Any]:
    titles = _titles(role, language)
    return {
        "type": "object",
        "properties": {title: {"type": "string"} for title in titles},
        "required": titles,
        "additionalProperties": False,
    }


def _titles(role: Role, language: str) -> list[str]:
    return [names[0] for names in layouts()[language].titles[role]]


def _unkept(before: str, after: str) -> list[str]:
    """What a new layout did to the words."""
    old, new = (Counter(_PIECES.findall(_body(text).lower())) for text in (before, after))
    lost, come = old - new, new - old
    told = []
    for words, limit, what in ((lost, _LOST, "loses"), (come, _NEW, "brings in")):
        words = Counter({w: n for w, n in words.items() if not w.isdigit()})
        if words.total() > limit * max(1, old.total()):
            told.append(f"the answer {what} {words.total()} of {old.total()} words ({' '.join(list(words)[:8])})")
    return told


def _body(persona: str) -> str:
    return "\n".join(text for _, text in sections(persona))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Lines of the personas that went (-) and came (+), each with its field."""
    told = []
    for _, profile in _ROLES:
        old, new = (record[profile]["system_prompt"].splitlines() for record in (before, after))
        told += [
            f"{profile}: {line}"
            for line in difflib.unified_diff(old, new, n=0, lineterm="")
            if line[:1] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip()
        ]
    return told


def _replace(record: dict[str, Any], profile: str, persona: str) -> None:
    """In the profile, and in the prompt that repeats it."""
    before = record[profile]["system_prompt"]
    record[profile]["system_prompt"] = persona
    for message in record.get("prompt") or ():
        if (
            message.get("role") == "system"
            and profile == "defender_profile"
            and message["content"].strip() == before.strip()
        ):
            message["content"] = persona
