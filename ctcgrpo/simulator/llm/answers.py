"""Parsing an LLM's answer as the user: tolerant of form, strict about meaning. Pure; one exception type.

    {"reflection": ..., "anger_delta": -3, "trust_delta": 2, "reply": ..., "continue": "yes", "stop_reason": ""}

Tolerated: reasoning before the answer, code fences, leading plus signs, comments, trailing commas, raw newlines, unescaped
quotes, numbers as strings, an end cut off after the last needed field. An ambiguous answer is refused, with the field to correct.

An answer that is valid JSON from its first brace to its last is taken as it is, whatever its texts quote. An answer that is nearly
JSON is read only if each field occurs once, so that no quoted text can be taken for its verdict. Numbers and the field `continue`
are then read from the text itself; only the other texts come from the repair.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import json_repair

from ctcgrpo.environments.eibench.records import MAX_DELTA, UserState
from ctcgrpo.simulator.protocol import State

ANGER, TRUST, REPLY = "anger_delta", "trust_delta", "reply"
CONTINUE, REFLECTION, STOP_REASON = "continue", "reflection", "stop_reason"

ProblemKind = Literal["empty", "no_object", "several", "missing", "not_a_number", "out_of_range", "not_yes_or_no", "leak"]
_BEYOND = 2 * MAX_DELTA  # A change of up to this much is an exaggeration and is clipped; anything larger is no change at all
_MOST, _MOST_BRACES = 16_000, 60
"""Characters, and opening braces among them: no answer worth reading has more, and repairing one takes seconds."""

_MINUS = str.maketrans("\u2212\uff0d\u2013", "---")
_NUMBER = re.compile(r"([+-]?)(\d{1,6})(?:\.0{1,6})?")
_SPOKEN_THOUGHT = re.compile(r"^<think>.*?</think>", re.DOTALL)
_END_OF_THOUGHT = re.compile(r"</think(?:ing)?>")
_VERDICTS = {"yes": True, "true": True, "no": False, "false": False, "是": True, "否": False}
# What may follow a value that is whole: the next field, the end of the object, or a comment.
_END = r"\s*(?=,\s*(?:[\"'}]|//|/\*|#)|}|//|/\*|#)"


def _key_pattern(name: str) -> str:
    return r"[\"']\s*" + name.replace("_", "[ _-]?") + r"\s*[\"']"


_NAMED = {name: re.compile(_key_pattern(name) + r"\s*:", re.IGNORECASE) for name in (ANGER, TRUST, REPLY, CONTINUE)}
_SPOKEN_OF = {name: re.compile(name.replace("_", "[ _-]?"), re.IGNORECASE) for name in (ANGER, TRUST)}
_VALUE = r"\s*:\s*(?:/\*[^*]*\*/\s*)?"
_WRITTEN = {
    name: re.compile(_key_pattern(name) + _VALUE + r"([\"']?)\s*([+-]?\d{1,6}(?:\.0{1,6})?)\s*\1" + _END, re.IGNORECASE)
    for name in (ANGER, TRUST)
}
_WRITTEN_VERDICT = re.compile(
    _key_pattern(CONTINUE) + _VALUE + r"(?:([\"'])\s*(\w+)\s*\.?\s*\1(?:" + _END + r"|\s*$)|(\w+)" + _END + ")",
    re.IGNORECASE,
)


class Unreadable(Exception):
    """An answer that cannot be read with certainty: the `kind` of problem, and the field and value that it concerns."""

    def __init__(self, kind: ProblemKind, field: str = "", value: str = "") -> None:
        self.kind, self.field, self.value = kind, field, value
        super().__init__(": ".join(part for part in (kind.replace("_", " "), field, value) if part))


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed answer: deltas are whole numbers in [-10, 10]; `reply` is not empty."""

    reply: str
    anger_delta: int
    trust_delta: int
    goes_on: bool
    reflection: str
    stop_reason: str


def read_answer(text: str, state: UserState | State) -> Answer:
    """The user's answer in a completion. `state` is the state before it, which distinguishes a new level from a change.
    Raises Unreadable, and no other exception, for any text."""
    fields = _fields(text)
    anger, trust = _deltas(fields, state)
    reply = _SPOKEN_THOUGHT.sub("", _text(fields, REPLY)).strip()
    if not reply:
        raise Unreadable("missing", REPLY)
    return Answer(reply, anger, trust, _goes_on(fields), _text(fields, REFLECTION), _text(fields, STOP_REASON))


def _fields(text: str) -> Mapping[str, Any]:
    """The fields of the answer's only JSON object."""
    text = text.strip()
    if not text.startswith(
        ("{", "`")
    ):  # reasoning may open it; a thought that is never closed leaves nothing: it may hold drafts
        closed = _END_OF_THOUGHT.search(text)
        text = text[closed.end() :].strip() if closed else "" if text.startswith("<think") else text
    if not text:
        raise Unreadable("empty")
    start = text.find("{")
    if start < 0 or len(text) > _MOST or text.count("{") > _MOST_BRACES:
        raise Unreadable("no_object")
    try:
        value = json.loads(text[start : text.rfind("}") + 1], strict=False, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError):
        return _repaired(text[start:])
    return value if isinstance(value, dict) else {}


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {_key(key): value for key, value in pairs}
    if len(fields) < len(pairs):
        raise Unreadable("several")
    return fields


def _key(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _repaired(text: str) -> dict[str, Any]:
    """An object that is nearly JSON. Its last field is left out where the end is cut off."""
    text = text.translate(_MINUS)
    if any(len(pattern.findall(text)) > 1 for pattern in (*_NAMED.values(), *_SPOKEN_OF.values())):
        raise Unreadable("several")
    try:
        value = json_repair.loads(text, skip_json_loads=True)
    except (ValueError, RecursionError, IndexError, TypeError, AttributeError, KeyError):  # it is a heuristic parser
        raise Unreadable("no_object") from None
    if isinstance(value, list):
        value = next((v for v in value if isinstance(v, dict) and ANGER in v), None)
    if not isinstance(value, dict):
        raise Unreadable("no_object")
    fields = {_key(str(key)): part for key, part in value.items()}
    if fields and not text.rstrip("` \n\t").endswith("}"):
        fields.popitem()
    return fields | _as_written(text, fields)


def _as_written(text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and `continue` as the text has them: a repair drops unknown signs, and takes half a value for a whole one. A field
    whose value is not whole keeps its source text, for the error."""
    written: dict[str, Any] = {}
    for name, pattern in _WRITTEN.items():
        match = pattern.search(text)
        if match:
            written[name] = match[2]
        elif name in fields:
            written[name] = f"{_NAMED[name].split(text, 1)[-1].strip()[:20]} (not a whole number)"
    verdict = _WRITTEN_VERDICT.search(text)
    if CONTINUE in fields or verdict:
        written[CONTINUE] = (verdict[2] or verdict[3]) if verdict else "cut off, or more than one word"
    return written


def _number(fields: Mapping[str, Any], field: str) -> tuple[int, bool]:
    """The number of a field, and whether it has a sign."""
    value = fields.get(field)
    if value is None:
        raise Unreadable("missing", field)
    match = _NUMBER.fullmatch(str(value).translate(_MINUS).strip()) if isinstance(value, int | float | str) else None
    if match is None or not match[2].isascii():  # True and False are none, either
        raise Unreadable("not_a_number", field, _shown(value))
    return int(match[1] + match[2]), bool(match[1])


def _deltas(fields: Mapping[str, Any], state: UserState | State) -> tuple[int, int]:
    """Both as changes; or both as new levels, where they cannot be changes. Raises Unreadable where they can be either."""
    (anger, anger_signed), (trust, trust_signed) = _number(fields, ANGER), _number(fields, TRUST)
    largest, worst = max((abs(anger), ANGER), (abs(trust), TRUST), key=lambda size: size[0])
    changes = largest <= _BEYOND
    levels = not (anger_signed or trust_signed) and all(
        0 <= level <= 100 and abs(level - now) <= _BEYOND for level, now in ((anger, state.anger), (trust, state.trust))
    )
    if largest > MAX_DELTA and changes == levels:
        raise Unreadable("out_of_range", worst, str(anger if worst == ANGER else trust))
    if changes:
        return _clipped(anger), _clipped(trust)
    return _clipped(anger - state.anger), _clipped(trust - state.trust)


def _clipped(delta: int) -> int:
    return max(-MAX_DELTA, min(MAX_DELTA, delta))


def _goes_on(fields: Mapping[str, Any]) -> bool:
    value = fields.get(CONTINUE)
    if value is None:
        raise Unreadable("missing", CONTINUE)
    meant = _VERDICTS.get(str(value).strip().lower().rstrip("."))
    if meant is None:
        raise Unreadable("not_yes_or_no", CONTINUE, _shown(value))
    return meant


def _text(fields: Mapping[str, Any], field: str) -> str:
    """A field's text without control characters and halves of surrogate pairs."""
    value = fields.get(field)
    if not isinstance(value, str):
        return ""
    whole = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")  # joins pairs, drops halves
    return "".join(c for c in whole if c == "\n" or unicodedata.category(c) != "Cc").strip()


def _shown(value: object) -> str:
    return repr(value)[:40]
