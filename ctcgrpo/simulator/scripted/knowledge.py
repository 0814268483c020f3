"""What the user of a scenario cares about: from the record's `script`, or, without one, derived from its personas."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ctcgrpo.environments.eibench.records import Scenario
from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.protocol import ScenarioCard
from ctcgrpo.simulator.scripted.language import Language
from ctcgrpo.util.naming import did_you_mean

_HEADING = re.compile(r"^#+.*$", re.MULTILINE)
_FACT = re.compile(r"^\s*\d+[.、)]\s*(.+)$", re.MULTILINE)
_MAX_DETAILS = 6
_MAX_FACTS = 100  # sentences of a persona that count


@dataclass(frozen=True, slots=True)
class Detail:
    """A topic of this user's life, in stems. `words` name it. `field` are related words: those that a reply which engages with it
    is likely to use, and those of `line`. `line` is the message in which the user raises it ("" for none)."""

    about: str
    words: frozenset[str]
    field: frozenset[str]
    line: str


class Knowledge:
    """What the user of a scenario cares about, in stems.

    `requirements`: words of what the scene requires (boundary and offer, or fault and remedy), by name. `vocabulary`: all content
    words of the scenario's texts; `topic_stems`: those that are not everyday words. `facts`: the content of each sentence of the
    policy's persona; `goal_facts`: of each sentence of the goal. `lines`: the user's messages by mood.
    """

    def __init__(self, card: ScenarioCard, language: Language) -> None:
        """Raises SimulatorReplyError for an invalid `script`."""
        try:
            script = _Script.model_validate(card.script)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("script", *first["loc"])))
            raise SimulatorReplyError(f"scenario {card.id!r}: {field}: {first['msg'].lower()}") from None

        def stems(words: list[str]) -> frozenset[str]:
            return frozenset().union(*(language.content(word) for word in words))

        self.card, self.language = card, language
        self.details = tuple(
            Detail(d.about, stems(d.words), stems(d.sense) | language.uncommon(d.line), d.line) for d in script.details
        ) or _derived_details(card, language)
        self.requirements = {name: stems(words) for name, words in (script.boundary or script.repair).items()}
        user_persona, policy_persona = (_HEADING.sub("", text) for text in (card.user_persona, card.policy_persona))
        texts = [user_persona, policy_persona, card.opening_line, card.goal, *card.success_criteria]
        texts += [d.line for d in self.details]
        fields = (d.field for d in self.details)
        self.vocabulary = frozenset().union(*(language.content(text) for text in texts), *fields)
        self.topic_stems = frozenset().union(*(language.uncommon(text) for text in texts))
        self.facts, self.goal_facts = (_stems_by_sentence(text, language) for text in (policy_persona, card.goal))
        self.lines = {mood: lines for mood, lines in script.lines.items() if lines}

    def detail_raised(self, round: int) -> Detail | None:
        """The detail that the user raised before the policy's reply of this round: one per round, in order, then None."""
        index = round - 1 if self.card.opening_line else round - 2
        return self.details[index] if 0 <= index < len(self.details) else None


class _Detail(BaseModel):
    about: str = Field(description="A short name, used in the explanation of a turn.")
    words: list[str] = Field(min_length=1, description="Words that name it. A reply with one of them mentions the detail.")
    sense: list[str] = Field(description="Words that a reply which engages with the detail is likely to use.")
    line: str = Field(description="The message in which the user raises it.")


class _Script(BaseModel):
    """The `script` of a record, as the bundled packs write it; every part may be absent."""

    details: list[_Detail] = Field(
        [], max_length=100, description="Some six topics of this user's life, in the order in which the user raises them."
    )
    boundary: dict[str, list[str]] = Field(
        {},
        description="Requirements of a defense: `words` that state the boundary, `offer`: words of the alternative.",
    )
    repair: dict[str, list[str]] = Field(
        {}, description="Requirements of a repair: `fault`: words that admit it, `remedy`: words of what is offered."
    )
    lines: dict[str, list[str]] = Field(
        {},
        description="The user's messages by mood: warmer, flat, colder, thanks, leaves. Default: those of the language.",
    )


def script_fields() -> Iterator[tuple[str, str]]:
    """(field, meaning) of a record's `script`."""
    for path, model in (("script", _Script), ("script.details[]", _Detail)):
        for name, field in model.model_fields.items():
            yield f"{path}.{name}", field.description or ""


def unscripted_warning(scenarios: Sequence[Scenario], what: str) -> str | None:
    """A warning for scenarios without details in their `script`, which the scripted user plays; None where all have details.
    `what` names the scenarios."""
    without = [scenario.id for scenario in scenarios if not scenario.script.get("details")]
    if not without:
        return None
    named = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
    return (
        f"{len(without)} of {len(scenarios)} {what} have no script.details ({named}): the scripted user derives them from the "
        "personas, and then separates good from bad replies poorly. Write a script (`ctcgrpo scenarios new "
        "FILE` shows one, `ctcgrpo scenarios gate` tests it), or let an LLM play the user (simulator.config, simulator.url)"
    )


def script_problems(script: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, problem) for each part of a record's `script` that the scripted user cannot read."""
    try:
        _Script.model_validate(script)
    except ValidationError as error:
        for problem in error.errors():
            yield ".".join(map(str, ("script", *problem["loc"]))), problem["msg"].lower()
    details = script.get("details")
    parts: list[tuple[str, type[BaseModel], Any]] = [("script", _Script, script)]
    parts += [(f"script.details.{k}", _Detail, d) for k, d in enumerate(details if isinstance(details, list) else ())]
    for field, model, part in parts:
        for key in part if isinstance(part, Mapping) else ():
            if key not in model.model_fields:
                yield f"{field}.{key}", f"is not read by the scripted user; {did_you_mean(key, model.model_fields)}"


def _stems_by_sentence(text: str, language: Language) -> tuple[frozenset[str], ...]:
    contents = (language.content(sentence) for sentence in language.sentences(text))
    return tuple(content for content in contents if content)[:_MAX_FACTS]


def _derived_details(card: ScenarioCard, language: Language) -> tuple[Detail, ...]:
    """One detail for the opening line and for each fact of the user's persona. Words that they share are left out."""
    facts = _FACT.findall(card.user_persona) or language.sentences(card.user_persona)
    texts = [text for text in (card.opening_line, *facts) if text][:_MAX_DETAILS]
    contents = [language.content(text) for text in texts]
    details = []
    for k, (text, content) in enumerate(zip(texts, contents, strict=True)):
        others = frozenset().union(*(c for j, c in enumerate(contents) if j != k))
        own = content - others or content
        details.append(Detail(text[:40], own, content - own, ""))
    return tuple(details)
