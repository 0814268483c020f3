"""A turn as chat messages, from the templates in `prompts/LANGUAGE`. A language is added by adding a folder, a scene by adding a
file to each; one without a file is put in the general words of scenes/other.j2.

Laid out for prefix caches, what changes least first: system message: rules, scene, persona; user message: the dialogue, which only
grows, and at its very end the moment (state and round). Everything that anybody said is one quoted line of text each, so
nothing in it can pass for a message, a role or a control token.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Protocol

import jinja2

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.llm.answers import Unreadable
from ctcgrpo.simulator.protocol import ScenarioCard, TurnRequest
from ctcgrpo.types import Message

_FOLDER = files("ctcgrpo.simulator.llm") / "prompts"
_LONGEST_LINE = 6000
"""Characters of an utterance that the simulator reads: far more than 1,024 tokens of talk."""
_LEAK_WORDS, _LEAK_CHARACTERS = 9, 16
_UNSPACED = r"[\u3040-\u30ff\u3400-\u9fff]"
_CONTROL = re.compile(r"[<>]|\[(?=/?g?s?[A-Z_]{3,}\])")


class Prompts(Protocol):
    """How a turn is put to an LLM. `name` says which prompts these are, down to their wording."""

    name: str

    def check(self, card: ScenarioCard) -> None:
        """Raises SimulatorReplyError for a scenario that there are no prompts for."""
        ...

    def messages(self, request: TurnRequest) -> list[Message]: ...

    def correction(self, card: ScenarioCard, problem: Unreadable) -> str:
        """What is said to an LLM whose answer could not be read."""
        ...


class TemplatePrompts:
    """The project's own prompts. `reflections`: the user's own earlier ones stand in the history."""

    def __init__(self, *, reflections: bool = True) -> None:
        self._reflections = reflections
        self.name = f"ctcgrpo/{_digest()}{'' if reflections else '/no-reflections'}"

    def check(self, card: ScenarioCard) -> None:
        _environment(card.language)
        try:
            _standing(_told_of(card))
        except jinja2.TemplateError as error:
            raise SimulatorReplyError(f"the prompts for {card.scene} in {card.language!r} are broken: {error}") from None

    def messages(self, request: TurnRequest) -> list[Message]:
        card = request.scenario
        moment = _environment(card.language).get_template("moment.j2")
        now = moment.render(
            anger=request.state.anger, trust=request.state.trust, round=request.round, max_rounds=request.max_rounds
        )
        lines = [
            {
                "speaker": u.speaker,
                "quoted": quoted(u.text),
                "reflection": quoted(u.reflection) if u.reflection and self._reflections else "",
            }
            for u in request.history
        ]
        dialogue = _environment(card.language).get_template("dialogue.j2").render(lines=lines)
        return [{"role": "system", "content": _standing(_told_of(card))}, {"role": "user", "content": f"{dialogue}\n{now}"}]

    def correction(self, card: ScenarioCard, problem: Unreadable) -> str:
        return _environment(card.language).get_template("correction.j2").render(problem=problem)


def quoted(text: str) -> str:
    """Text as one line between double quotes (a JSON string): line breaks, control, format and direction characters, angle brackets
    and bracketed control tokens are escaped, and a very long text is cut, with its length said."""
    whole = len(text)
    if whole > _LONGEST_LINE:
        text = text[:_LONGEST_LINE] + f" … (cut: {whole} characters in all)"
    line = json.dumps(text, ensure_ascii=False)
    line = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", line)
    return "".join(_escaped(char) if _is_hidden(char) else char for char in line)


def _is_hidden(char: str) -> bool:
    return char > "~" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[k] << 8 | units[k + 1]:04x}" for k in range(0, len(units), 2))


def gives_away(messages: Sequence[Message], persona: str, reply: str) -> bool:
    """Whether a reply quotes what the LLM was told about its task, in nine words on end or sixteen characters of a script without
    spaces. Its persona is its own to speak of."""
    return bool(_word_runs(reply) & _told_runs(messages[0]["content"].replace(persona, "\n")))


@lru_cache(maxsize=1024)
def _told_runs(text: str) -> frozenset[tuple[str, ...]]:
    return _word_runs(text)


def _word_runs(text: str) -> frozenset[tuple[str, ...]]:
    unspaced = re.findall(_UNSPACED, text)
    words = re.findall(r"[^\W_]+", re.sub(_UNSPACED, " ", text).lower())
    return _runs(words, _LEAK_WORDS) | _runs(unspaced, _LEAK_CHARACTERS)


def _runs(words: Sequence[str], n: int) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


@cache
def _environment(language: str) -> jinja2.Environment:
    folder = _FOLDER / language
    if not re.fullmatch(r"[A-Za-z-]+", language) or not folder.is_dir():
        raise SimulatorReplyError(f"there are no prompts in {language!r}; there are {', '.join(_languages())}")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _read(folder, name)),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _read(folder: Traversable, name: str) -> str | None:
    path = folder
    for part in name.split("/"):
        path = path / part
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _languages() -> list[str]:
    return sorted(entry.name for entry in _FOLDER.iterdir() if entry.is_dir())


def _told_of(card: ScenarioCard) -> str:
    """The user's side of a card. Goal, success criteria and what to avoid are the policy's: in defense they are the opposite of
    what the user wants."""
    return card.model_dump_json(include={"language", "scene", "user_persona"})


@lru_cache(maxsize=4096)
def _standing(card_json: str) -> str:
    """What stays the same throughout a dialogue. Rules come before the scene, the scene before the persona."""
    card: dict[str, Any] = json.loads(card_json)
    environment = _environment(card["language"])
    scene = environment.select_template([f"scenes/{card['scene']}.j2", "scenes/other.j2"])
    parts = (environment.get_template("rules.j2"), scene, environment.get_template("persona.j2"))
    return "\n".join(part.render(card) for part in parts)


def _digest() -> str:
    parts: list[bytes] = []
    for path in _walk(_FOLDER, ""):
        parts.append(path.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def _walk(folder: Traversable, path: str) -> Iterator[str]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _walk(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(".j2"):
            yield f"{path}{entry.name}\n{entry.read_text(encoding='utf-8')}"
