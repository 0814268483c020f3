"""A turn as chat messages, from the templates in `prompts/LANGUAGE`. To add a language, add a folder; to add a scene, add a file to
each folder. A scene without a file uses scenes/other.j2.

The layout suits prefix caches. The system message holds rules, scene and persona; the user message holds the dialogue, which only
grows, and at its end the moment (state and round). Each utterance is one quoted line of text, so that it cannot pass for a
message, a role or a control token.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path

import jinja2

from ctcgrpo.errors import SimulatorReplyError
from ctcgrpo.simulator.llm.answers import Unreadable
from ctcgrpo.simulator.protocol import ScenarioCard, TurnRequest
from ctcgrpo.types import Message

_FOLDER = Path(__file__).parent / "prompts"
_LONGEST_LINE = 6000  # characters of an utterance that the simulator reads: far more than 1,024 tokens of talk
_LEAK_WORDS, _LEAK_CHARACTERS = 9, 16
_UNSPACED = r"[\u3040-\u30ff\u3400-\u9fff]"
_CONTROL = re.compile(r"[<>]|\[(?=/?g?s?[A-Z_]{3,}\])")


class TemplatePrompts:
    """The project's own prompts; `name` contains a digest of their text. `reflections`: whether the history includes the user's own
    earlier reflections."""

    def __init__(self, *, reflections: bool = True) -> None:
        self._reflections = reflections
        texts = [f"{p.relative_to(_FOLDER).as_posix()}\n{p.read_text(encoding='utf-8')}" for p in sorted(_FOLDER.rglob("*.j2"))]
        digest = sha256("\0".join(texts).encode()).hexdigest()[:8]
        self.name = f"ctcgrpo/{digest}{'' if reflections else '/no-reflections'}"

    def check(self, card: ScenarioCard) -> None:
        """Raises SimulatorReplyError for a scenario without prompts in its language."""
        try:
            _standing(card.language, card.scene, card.user_persona)
        except jinja2.TemplateError as error:
            raise SimulatorReplyError(f"invalid prompt template for scene {card.scene} in {card.language!r}: {error}") from None

    def messages(self, request: TurnRequest) -> list[Message]:
        card, templates = request.scenario, _environment(request.scenario.language)
        lines = [
            {
                "speaker": u.speaker,
                "quoted": quoted(u.text),
                "reflection": quoted(u.reflection) if u.reflection and self._reflections else "",
            }
            for u in request.history
        ]
        dialogue = templates.get_template("dialogue.j2").render(lines=lines)
        now = templates.get_template("moment.j2").render(
            anger=request.state.anger, trust=request.state.trust, round=request.round, max_rounds=request.max_rounds
        )
        system = _standing(card.language, card.scene, card.user_persona)
        return [{"role": "system", "content": system}, {"role": "user", "content": f"{dialogue}\n{now}"}]

    def correction(self, card: ScenarioCard, problem: Unreadable) -> str:
        """The message to an LLM whose answer could not be read."""
        return _environment(card.language).get_template("correction.j2").render(problem=problem)


def quoted(text: str) -> str:
    """Text as one line between double quotes (a JSON string): line breaks, control, format and direction characters, angle brackets
    and bracketed control tokens are escaped. A very long text is cut, with a note of its length."""
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
    """Whether a reply quotes the LLM's instructions: nine consecutive words, or sixteen characters of a script without spaces. Its
    persona does not count."""
    return bool(_word_runs(reply) & _word_runs(messages[0]["content"].replace(persona, "\n")))


@lru_cache(maxsize=1024)
def _word_runs(text: str) -> frozenset[tuple[str, ...]]:
    unspaced = re.findall(_UNSPACED, text)
    words = re.findall(r"[^\W_]+", re.sub(_UNSPACED, " ", text).lower())
    runs = ((words, _LEAK_WORDS), (unspaced, _LEAK_CHARACTERS))
    return frozenset(tuple(parts[k : k + n]) for parts, n in runs for k in range(len(parts) - n + 1))


@cache
def _environment(language: str) -> jinja2.Environment:
    languages = sorted(entry.name for entry in _FOLDER.iterdir() if entry.is_dir())
    if language not in languages:
        raise SimulatorReplyError(f"no prompts for language {language!r}; expected one of {', '.join(languages)}")
    loader = jinja2.FileSystemLoader(_FOLDER / language)
    return jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False, auto_reload=False
    )


@lru_cache(maxsize=4096)
def _standing(language: str, scene: str, user_persona: str) -> str:
    """The constant part of a dialogue's prompts: rules, scene, persona. The rest of a card belongs to the policy: in defense its
    goal is the opposite of the user's."""
    templates = _environment(language)
    parts = (["rules.j2"], [f"scenes/{scene}.j2", "scenes/other.j2"], ["persona.j2"])
    return "\n".join(templates.select_template(part).render(scene=scene, user_persona=user_persona) for part in parts)
