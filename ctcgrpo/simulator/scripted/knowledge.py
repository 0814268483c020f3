"""What the user of a scenario cares about: from the record's `script`, or, without one, derived from its personas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, Field, ValidationError

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import ScenarioCard
from ctcgrpo.simulator.scripted.language import Language

_HEADING = re.compile(r"^#+.*$", re.MULTILINE)
_FACT = re.compile(r"^\s*\d+[.、)]\s*(.+)$", re.MULTILINE)
_MOST_DETAILS = 6
_MOST_FACTS = 100
"""Sentences of a persona that count."""


@dataclass(frozen=True, slots=True)
class Detail:
    """Something of this user's life, in stems. `words` name it; `field` are the words around it: those that somebody who
    engages with it is likely to use, and those of `line`, which is what the user says to bring it up ("" for none)."""

    about: str
    words: frozenset[str]
    field: frozenset[str]
    line: str


@dataclass(frozen=True, slots=True)
class Knowledge:
    """`musts` name what the scene asks for in this scenario: boundary and offer, or fault and remedy. `vocabulary` is all
    content of the scenario's texts; `matter` the part of it that is not everyday talk. `facts` are what the policy's role knows of
    itself and of the place, and `subjects` what the dialogue is about: the stems of one sentence of its persona, or of the
    goal, each."""

    details: tuple[Detail, ...]
    musts: Mapping[str, frozenset[str]]
    vocabulary: frozenset[str]
    matter: frozenset[str]
    facts: tuple[frozenset[str], ...]
    subjects: tuple[frozenset[str], ...]
    lines: Mapping[str, list[str]]


class _Detail(BaseModel):
    about: str
    words: list[str] = Field(min_length=1)
    sense: list[str]
    line: str


class _Script(BaseModel):
    """The `script` of a record, as the bundled packs write it; every part may be absent."""

    details: list[_Detail] = Field([], max_length=100)
    boundary: dict[str, list[str]] = {}
    repair: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}


def read_knowledge(card: ScenarioCard, language: Language) -> Knowledge:
    """Raises SimulatorReplyError for a `script` that is not of this form."""
    try:
        script = _Script.model_validate(card.script)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, ("script", *first["loc"])))
        raise SimulatorReplyError(f"scenario {card.id!r}: {field}: {first['msg'].lower()}") from None

    def stems(words: list[str]) -> frozenset[str]:
        return frozenset().union(*(language.content(word) for word in words))

    if script.details:
        details = tuple(
            Detail(d.about, stems(d.words), stems(d.sense) | language.uncommon(d.line), d.line) for d in script.details
        )
    else:
        details = _derived_details(card, language)
    parts = script.boundary or script.repair
    user_persona, policy_persona = (_HEADING.sub("", text) for text in (card.user_persona, card.policy_persona))
    texts = [user_persona, policy_persona, card.opening_line, card.goal, *card.success_criteria]
    texts += [d.line for d in details]
    vocabulary = frozenset().union(*(language.content(text) for text in texts), *(d.field for d in details))
    matter = frozenset().union(*(language.uncommon(text) for text in texts))
    return Knowledge(
        details=details,
        musts={name: stems(words) for name, words in parts.items()},
        vocabulary=vocabulary,
        matter=matter,
        facts=_stems_by_sentence(policy_persona, language),
        subjects=_stems_by_sentence(card.goal, language),
        lines={mood: lines for mood, lines in script.lines.items() if lines},
    )


def _stems_by_sentence(text: str, language: Language) -> tuple[frozenset[str], ...]:
    contents = (language.content(sentence) for sentence in language.sentences(text))
    return tuple(content for content in contents if content)[:_MOST_FACTS]


def _derived_details(card: ScenarioCard, language: Language) -> tuple[Detail, ...]:
    """One detail for the opening line and one for each known fact; what all of them share distinguishes none."""
    facts = _FACT.findall(card.user_persona) or language.sentences(card.user_persona)
    texts = [text for text in (card.opening_line, *facts) if text][:_MOST_DETAILS]
    contents = [language.content(text) for text in texts]
    details = []
    for k, (text, content) in enumerate(zip(texts, contents, strict=True)):
        others = frozenset().union(*(c for j, c in enumerate(contents) if j != k))
        own = content - others or content
        details.append(Detail(text[:40], own, content - own, ""))
    return tuple(details)
