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
_MOST_DETAILS = 6
_MOST_FACTS = 100  # sentences of a persona that count


@dataclass(frozen=True, slots=True)
class Detail:
    """Something of this user's life, in stems. `words` name it; `field` are the words around it: those that somebody who
    engages with it is likely to use, and those of `line`, which is what the user says to bring it up ("" for none)."""

    about: str
    words: frozenset[str]
    field: frozenset[str]
    line: str


class Knowledge:
    """What the user of a scenario cares about. `musts` name what the scene asks for in this scenario: boundary and offer, or fault
    and remedy. `vocabulary` is all content of the scenario's texts; `matter` the part of it that is not everyday talk. `facts` are
    what the policy's role knows of itself and of the place, and `subjects` what the dialogue is about: the stems of one sentence of
    its persona, or of the goal, each."""

    def __init__(self, card: ScenarioCard, language: Language) -> None:
        """Raises SimulatorReplyError for a `script` that is not of this form."""
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
        self.musts = {name: stems(words) for name, words in (script.boundary or script.repair).items()}
        user_persona, policy_persona = (_HEADING.sub("", text) for text in (card.user_persona, card.policy_persona))
        texts = [user_persona, policy_persona, card.opening_line, card.goal, *card.success_criteria]
        texts += [d.line for d in self.details]
        fields = (d.field for d in self.details)
        self.vocabulary = frozenset().union(*(language.content(text) for text in texts), *fields)
        self.matter = frozenset().union(*(language.uncommon(text) for text in texts))
        self.facts, self.subjects = (_stems_by_sentence(text, language) for text in (policy_persona, card.goal))
        self.lines = {mood: lines for mood, lines in script.lines.items() if lines}

    def raised(self, round: int) -> Detail | None:
        """The detail that the user brought up before the policy's reply of this round; one after the other, then none."""
        index = round - 1 if self.card.opening_line else round - 2
        return self.details[index] if 0 <= index < len(self.details) else None


class _Detail(BaseModel):
    about: str = Field(description="What it is, in a few words. Explanations of a turn name it so.")
    words: list[str] = Field(min_length=1, description="Words that name it: a reply that holds one takes the detail up.")
    sense: list[str] = Field(description="Words that a reply is likely to hold that engages with it rather than naming it.")
    line: str = Field(description="What the user says to bring it up.")


class _Script(BaseModel):
    """The `script` of a record, as the bundled packs write it; every part may be absent."""

    details: list[_Detail] = Field(
        [], max_length=100, description="Some six things of this user's life, in the order in which they come up."
    )
    boundary: dict[str, list[str]] = Field(
        {},
        description="What a defense asks for: `words` that state the boundary, `offer`: words of what is offered instead.",
    )
    repair: dict[str, list[str]] = Field(
        {}, description="What a repair asks for: words that own the `fault`, words of the `remedy` that is offered."
    )
    lines: dict[str, list[str]] = Field(
        {},
        description="What this user says, by mood: warmer, flat, colder, thanks, leaves. Left out: lines of the language.",
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
